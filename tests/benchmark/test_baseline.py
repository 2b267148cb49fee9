"""Baselines: written, read, compared; and the error for a damaged file."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ibnorm_export.benchmark.baseline import Baseline, baseline_of, compare_baselines, read_baseline, write_baseline
from ibnorm_export.benchmark.html import write_comparison
from ibnorm_export.benchmark.options import Difference
from ibnorm_export.benchmark.report import BenchReport
from ibnorm_export.benchmark.statistics import Decision
from ibnorm_export.errors import IBNormError, ModelFileError

VERSIONS = {"onnxruntime": "1", "onnx": "1"}


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
        environment={"processor": "p", "packages": VERSIONS},
        precision="fp32",
        kernels="fused",
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
    assert lines[-1].startswith("B over A: ratio 1.20 (95% interval")
    assert compare_baselines(before, recorded(1.2, seed=1), max_ratio=1.3).passed


@pytest.mark.parametrize("number", [1, 2])
def test_older_formats_are_read_too(tmp_path: Path, number: int) -> None:
    file = write_baseline(recorded(1.0), tmp_path / "a.json")
    content = json.loads(file.read_text(encoding="utf-8"))
    del content["precision"], content["kernels"]
    if number == 1:
        content["yardstick_ms"] = content.pop("reference_ms")
    file.write_text(json.dumps({**content, "format": number}), encoding="utf-8")
    old = read_baseline(file)
    assert old == replace(recorded(1.0), precision="", kernels="")
    (note,) = compare_baselines(old, recorded(1.0)).notes
    assert note.startswith("A does not record its precision and kernels")


@pytest.mark.parametrize(
    ("name", "change", "what"),
    [
        ("inputs", {"inputs": {"x": [4, 2]}}, "{'x': [1, 2]} in A, {'x': [4, 2]} in B (measure B with the --batch"),
        ("inputs", {"inputs": {"y": [1, 2]}}, "{'x': [1, 2]} in A, {'y': [1, 2]} in B"),
        ("backend", {"backend": "reference"}, "ort-cpu in A, reference in B (measure B with --backend ort-cpu)"),
        ("threads", {"threads": 1}, "2 in A, 1 in B (measure B with --threads 2)"),
        ("precision", {"precision": "fp16"}, "fp32 in A, fp16 in B (measure both files together"),
        ("kernels", {"kernels": "function"}, "fused in A, function in B (measure both with the same --kernels)"),
        ("processor", {"environment": {"processor": "q", "packages": VERSIONS}}, "p in A, q in B (measure both on one"),
        (
            "runtime",
            {"environment": {"processor": "p", "packages": {**VERSIONS, "onnxruntime": "2"}}},
            "{'onnxruntime': '1'} in A, {'onnxruntime': '2'} in B (measure A again",
        ),
    ],
)
def test_what_is_not_comparable_is_refused_by_name(name: str, change: dict[str, Any], what: str) -> None:
    before, after = recorded(1.0), replace(recorded(1.0, seed=1), **change)
    with pytest.raises(IBNormError, match=re.escape(f"not comparable. {name}: {what}")) as found:
        compare_baselines(before, after, allow=[other for other in Difference if other != name])
    assert f"--allow {name}" in str(found.value)
    (note,) = compare_baselines(before, after, allow=[name]).notes
    assert note.startswith(f"{name} differs: {what.partition(' (')[0]}")
    with pytest.raises(IBNormError, match="allow is 'weather'; it must be one of inputs"):
        compare_baselines(before, after, allow=["weather"])


def test_every_difference_is_named_at_once() -> None:
    after = replace(recorded(1.0), threads=1, precision="fp16")
    with pytest.raises(IBNormError, match=r"threads: .*; precision: .* --allow threads,precision$"):
        compare_baselines(recorded(1.0), after)


def test_other_packages_are_a_note() -> None:
    after = replace(recorded(1.0), environment={"processor": "p", "packages": {**VERSIONS, "onnx": "2"}})
    assert compare_baselines(recorded(1.0), after).notes == ("the versions of other packages differ [IBN313]",)


def test_the_page_says_what_the_verdict_says(tmp_path: Path) -> None:
    few = replace(recorded(1.0, seed=1), times_ms=(10.0, 11.0), reference_ms=(10.0, 10.0))
    for after, word in ((recorded(0.5), "pass"), (recorded(2.0), "fail"), (few, "cannot tell")):
        comparison = compare_baselines(recorded(1.0), after)
        assert comparison.verdict.decision.value == word
        text = write_comparison(comparison, tmp_path / "c.html").read_text(encoding="utf-8")
        (shown,) = re.findall(r'<div class="verdict (\w+)"[^<]*<p class="word"><span[^<]*</span> ([^<]*)</p>', text)
        assert shown == ("unsure" if word == "cannot tell" else word, word.capitalize())


def test_a_baseline_needs_the_reference_load() -> None:
    report = BenchReport({}, 1, threads=1, rounds=0, latencies=(), ratios=(), environment={})
    with pytest.raises(IBNormError, match="--save-baseline"):
        baseline_of(report)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.pop("format"),
        lambda d: d.update(format=4),
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


def test_a_file_of_another_kind_is_not_replaced(tmp_path: Path) -> None:
    write_baseline(recorded(1.0), write_baseline(recorded(1.2), tmp_path / "a.json"))
    assert read_baseline(tmp_path / "a.json") == recorded(1.0)
    (tmp_path / "package.json").write_text("{}")
    with pytest.raises(IBNormError, match=r"package\.json exists and is not a baseline: it would be lost"):
        write_baseline(recorded(1.0), tmp_path / "package.json")
