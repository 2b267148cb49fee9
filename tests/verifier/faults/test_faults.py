"""Every planted fault fails and is named; no correct export fails. The suite planted_faults writes the whole tables."""

from __future__ import annotations

from pathlib import Path

import pytest

from ibnorm_export.artifacts.tensors import DType
from tests.verifier.faults.hostile import hostile_alarm
from tests.verifier.faults.planted import FAULTS, Base, Fault, bases, correct, false_alarm, judge


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Base]:
    return bases(tmp_path_factory.mktemp("bases"))


def test_there_are_twenty_faults_and_the_numeric_verdict_finds_most() -> None:
    assert len({fault.name for fault in FAULTS}) >= 20
    assert sum(fault.place != "" for fault in FAULTS) >= 15


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_fails_and_is_named(fault: Fault, files: dict[str, Base], tmp_path: Path) -> None:
    outcome = judge(fault, files[fault.base], tmp_path)
    assert outcome.failed
    assert outcome.named, outcome
    assert outcome.numeric_only == (fault.place != ""), outcome


@pytest.mark.parametrize("index", range(0, 18, 2))
def test_a_correct_export_passes(index: int, tmp_path: Path) -> None:
    assert false_alarm(correct(index), tmp_path) == ()


@pytest.mark.parametrize("kind", ["outliers of 1000", "large means", "odd sizes"])
def test_a_right_export_with_hostile_weights_passes(kind: str, tmp_path: Path) -> None:
    assert hostile_alarm(kind, "llama", DType.FP32, folder=tmp_path, seed=0) == ()
