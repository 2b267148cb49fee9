"""Baselines: written, read, compared; and the error for a damaged file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ibnorm_export.benchmark.baseline import Baseline, baseline_of, compare_baselines, read_baseline, write_baseline
from ibnorm_export.benchmark.report import BenchReport
from ibnorm_export.benchmark.statistics import Decision
from ibnorm_export.errors import IBNormError, ModelFileError


def recorded(factor: float, seed: int = 0, threads: int = 2) -> Baseline:
    """A model that takes 10 ms times `factor`, with 4% of noise, on a machine that slows down by a third."""
    rng = np.random.default_rng(seed)
    drift = np.linspace(1.0, 1.3, 80)
    times, reference = (10.0 * f * drift * np.exp(0.04 * rng.standard_normal(80)) for f in (factor, 1.0))
    return Baseline(
        "m.onnx",
        "ort-cpu",
        inputs={"x": [1, 2]},
        threads=threads,
        times_ms=tuple(times.tolist()),
        reference_ms=tuple(reference.tolist()),
        environment={"processor": "p"},
    )


def test_a_baseline_is_written_read_and_compared(tmp_path: Path) -> None:
    file = write_baseline(recorded(1.0), tmp_path / "a.json")
    before = read_baseline(file)
    assert before == recorded(1.0)
    comparison = compare_baselines(file, recorded(1.2, seed=1))
    assert comparison.verdict.decision is Decision.FAIL
    assert not comparison.passed
    assert comparison.notes == ()
    lines = str(comparison).splitlines()
    assert lines[0].split() == ["baseline", "median", "ms", "median", "over", "reference", "load", "rounds"]
    assert lines[1].startswith("A: m.onnx")
    assert lines[-1].startswith("B over A: ratio 1.196 (95% interval")
    assert compare_baselines(before, recorded(1.2, seed=1), max_ratio=1.3).passed
    (note,) = compare_baselines(before, recorded(1.0, threads=1)).notes
    assert note == "the number of threads differs: 2 in A, 1 in B"


def test_format_1_is_read_too(tmp_path: Path) -> None:
    file = write_baseline(recorded(1.0), tmp_path / "a.json")
    content = json.loads(file.read_text(encoding="utf-8"))
    content["yardstick_ms"] = content.pop("reference_ms")
    file.write_text(json.dumps({**content, "format": 1}), encoding="utf-8")
    assert read_baseline(file) == recorded(1.0)


def test_a_baseline_needs_the_reference_load() -> None:
    report = BenchReport({}, 1, threads=1, rounds=0, latencies=(), ratios=(), environment={})
    with pytest.raises(IBNormError, match="--save-baseline"):
        baseline_of(report)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.pop("format"),
        lambda d: d.update(format=3),
        lambda d: d.pop("times_ms"),
        lambda d: d["times_ms"].pop(),
        lambda d: d.update(times_ms=[0.0] * 80),
        lambda d: d.update(threads_="x"),
        lambda d: d.update(times_ms=[float("inf")] * 80),
        lambda d: d.update(times_ms=[10**400] * 80),
        lambda d: d.update(inputs=[]),
        lambda d: d.update(inputs={"x": 5}),
        lambda d: d.update(inputs={"x": ["y"]}),
        lambda d: d.update(environment=None),
        lambda d: d.update(model=None),
        lambda d: d.update(threads=None),
    ],
)
def test_a_damaged_baseline_is_reported_in_one_line(tmp_path: Path, change: object) -> None:
    file = write_baseline(recorded(1.0), tmp_path / "a.json")
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)  # type: ignore[operator]
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ModelFileError, match=r"a\.json is not a baseline"):
        read_baseline(file)
    with pytest.raises(ModelFileError, match="does not exist"):
        read_baseline(tmp_path / "none.json")


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a": ' * 100_000, "[1]", "null", "{}", ""])
def test_other_json_is_reported_in_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content, encoding="utf-8")
    with pytest.raises(ModelFileError, match=r"a\.json is not a baseline"):
        read_baseline(tmp_path / "a.json")
