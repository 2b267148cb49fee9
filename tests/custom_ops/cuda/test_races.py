"""Proofs from PTX that the kernels have no race, if the verifier is installed; benchmarks/ has every case."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benchmarks.suites import cuda_races, cuda_static


@pytest.fixture(scope="module")
def ptx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("sentryward") is None:
        pytest.skip("sentryward is not on PATH: pip install sentryward")
    try:
        cuda_static.tool("nvcc")
    except cuda_static.ToolMissingError as missing:
        pytest.skip(str(missing))
    made = tmp_path_factory.mktemp("ptx") / "bfloat16.ptx"
    cuda_static.compile_ptx("bfloat16", cuda_races.ARCHITECTURE, made)
    return made


@pytest.mark.parametrize("case", [c for c in cuda_races.CASES if c.skip], ids=lambda c: c.name)
def test_race_free(ptx: Path, case: cuda_races.Case, tmp_path: Path) -> None:
    proof = cuda_races.prove(ptx, case, "bfloat16", folder=tmp_path)
    assert proof.result == "race_free", proof


def test_a_missing_barrier_is_a_race(ptx: Path, tmp_path: Path) -> None:
    """The control: the verifier finds the race in kernels without barriers."""
    broken = tmp_path / "broken.ptx"
    cuda_races.without_barriers(ptx, broken)
    case = next(c for c in cuda_races.CASES if c.method == "block")
    assert cuda_races.prove(broken, case, "bfloat16", folder=tmp_path).result == "potential_race"
