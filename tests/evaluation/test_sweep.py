"""Sweeps: what is tried, the Pareto front, and the recommended file."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from ibnorm_export import EvaluationOptions, ExportOptions, IBNormError, LoadedModel, SweepOptions, load, sweep
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.benchmark.statistics import Decision
from ibnorm_export.cli import main
from ibnorm_export.errors import ExitCode, ModelFileError
from ibnorm_export.evaluation import sweep as sweep_module
from ibnorm_export.evaluation.candidates import ModelCandidate
from ibnorm_export.evaluation.sweep_options import Preference, parse_sweep
from ibnorm_export.evaluation.sweep_report import SweptFile, pareto_front, recommend
from ibnorm_export.exporter.single_file import check_quantization
from tests.support.messages import messages
from tests.support.shared_exports import SharedExports


def swept(name: str, size: int, latency: float, *, drop: float, **others: object) -> SweptFile:
    settings = {"verified": True, "decision": Decision.PASS, "ratio": latency / 10.0, **others}
    return SweptFile(name, "x", size_bytes=size, latency_ms=latency, drop=drop, **settings)  # type: ignore[arg-type]  # settings by name


FILES = (
    swept("fp32", 100, 10.0, drop=0.0),
    swept("fp16", 50, 20.0, drop=0.0),
    swept("int8", 30, 5.0, drop=0.001),
    swept("int8 with larger blocks", 28, 5.1, drop=0.001),
    swept("int4", 20, 4.0, drop=0.05, decision=Decision.FAIL),
    swept("slow", 110, 11.0, drop=0.0),
)


def test_the_front_leaves_out_what_another_file_beats() -> None:
    """fp16 is smaller than fp32, int8 is faster, and only "slow" is worse in size and time and better in nothing."""
    assert pareto_front(FILES) == {"fp32", "fp16", "int8", "int8 with larger blocks", "int4"}
    assert pareto_front((FILES[0], replace(FILES[0], name="equal"))) == {"fp32", "equal"}
    lost = replace(FILES[0], name="lost", drop=float("nan"))
    assert pareto_front((FILES[0], lost)) == {"fp32"}, "an accuracy that is not a number is the worst"


def test_the_fastest_file_that_passes_is_recommended_and_the_smallest_of_equals() -> None:
    found = recommend(FILES, Preference.LATENCY)
    assert found.name == "int8 with larger blocks"  # 2% slower than int8, and smaller
    assert "it is the fastest of 5 files that pass" in found.why
    assert "of 2 that are about as fast, the smallest" in found.why
    assert "int4 is faster, but loses too much (+5.00%)" in found.why
    assert recommend(FILES[:2], Preference.LATENCY).name == "fp32"
    assert recommend(FILES[:2], Preference.SIZE).name == "fp16"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"verified": False}, "no file passes verification and evaluation"),
        ({"decision": Decision.FAIL}, "no file passes verification and evaluation"),
        ({"decision": Decision.CANNOT_TELL}, "the samples do not decide about fp32, fp16: give more samples"),
    ],
)
def test_a_file_that_does_not_pass_is_not_recommended(change: dict[str, object], why: str) -> None:
    files = [replace(file, **change) for file in FILES[:2]]  # type: ignore[arg-type]  # one field by name
    found = recommend(files, Preference.LATENCY)
    assert (found.name, found.why) == ("", why)


def test_the_axes_are_read() -> None:
    found = parse_sweep(["dtype=fp32,int4 block-size=32,128", "runtime=ort-cpu,openvino"])
    assert [variant.name for variant in found.variants()] == [
        *("fp32", "int4-block32", "int4-block128"),
        *("fp32@openvino", "int4-block32@openvino", "int4-block128@openvino"),
    ]
    assert found.variants()[-1].file_name == "int4-block128-openvino"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dtype", "'dtype' is not AXIS=VALUE,VALUE with an axis of dtype, block-size, runtime"),
        ("size=3", "'size=3' is not AXIS=VALUE,VALUE"),
        ("dtype=fp8", "dtypes is 'fp8'"),
        ("dtype=fp32,fp32", "dtypes has a value twice"),
        ("dtype=fp32 dtype=fp16", "dtype is given twice; list all its values once, as in dtype=fp16,..."),
        ("block-size=big", "block-size is 'big'; it must be a whole number, such as 32"),
        ("runtime=cuda", "runtimes is 'cuda'"),
        ("runtime=triton", "a sweep cannot run on triton"),
        ("dtype=,", "dtypes is empty"),
    ],
)
def test_axes_that_are_not_legal(text: str, message: str) -> None:
    with pytest.raises(IBNormError, match=re.escape(message)):
        parse_sweep([text])


@dataclass(frozen=True)
class FakeParity:
    """A verification that passes, for tests of what comes after it."""

    findings: tuple[str, ...] = ()


def test_what_cannot_be_exported_is_listed_and_the_rest_goes_on(
    vit_checkpoint: Path, exports: SharedExports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The export is that of the shared checkpoint; tests/generation/test_sweep_runs.py has sweeps with exports."""

    def copy(model: LoadedModel, path: Path, *, options: ExportOptions, **_: object) -> ExportedModel:
        check_quantization(model, options)
        shutil.copy(exports("vit").path, path)
        return ExportedModel(path)

    monkeypatch.setattr(sweep_module, "verify", lambda *_, **__: FakeParity())
    monkeypatch.setattr(sweep_module, "export_file", copy)
    model = load(vit_checkpoint)
    data = tmp_path / "val.npz"
    rng = np.random.default_rng(0)
    np.savez(data, images=rng.standard_normal((40, 1, 8, 8), dtype=np.float32), labels=rng.integers(0, 10, 40))
    options = SweepOptions(("fp32", "int4"), (32,), rounds=2)  # type: ignore[arg-type]  # names of members are legal
    evaluation = EvaluationOptions(max_drop=0.2)
    found = sweep(model, tmp_path / "out", task="classification", data=data, options=options, evaluation=evaluation)
    assert found.recommendation.name == "fp32"
    assert (tmp_path / "out" / "fp32.onnx").is_file()
    assert "language model" in found.files[1].problem
    assert "note: int4-block32 not run: only language models" in str(found)
    assert found.to_dict()["swept"][1]["problem"] == found.files[1].problem
    only = replace(options, dtypes=("int4",))
    with pytest.raises(IBNormError, match="no file could be exported and run: int4-block32: "):
        sweep(model, tmp_path / "out", task="classification", data=data, options=only, evaluation=evaluation)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a", "b", "-o", "out"], "--sweep takes one checkpoint, not 2: a, b"),
        (["a"], "--sweep writes files; name their folder with --output DIR"),
        (["a", "-o", "out", "--against", "b"], "leave out --against"),
        (["a", "-o", "out", "--results", "b"], "leave out --results"),
        (["a", "-o", "out", "block-size=x"], "block-size is 'x'"),
        (["nowhere", "-o", "out"], "nowhere does not exist"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        sys, "argv", ["ibnorm-export", "evaluate", *words, "--sweep", "dtype=fp32", "--task", "choice", "--data", "x"]
    )
    assert main.main() == ExitCode.BAD_INPUT
    _, err = capfd.readouterr()
    assert message in err
    assert len(messages(err)) == 1


def test_times_are_those_of_the_first_file_that_runs(
    vit_checkpoint: Path, exports: SharedExports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first file is timed, and then fails in the evaluation: no other file may be compared with it."""

    def copy(model: LoadedModel, path: Path, *, options: ExportOptions, **_: object) -> ExportedModel:
        shutil.copy(exports("vit", dtype=options.dtype).path, path)
        return ExportedModel(path)

    def evaluated(self: ModelCandidate, images: NDArray[np.float32]) -> NDArray[np.float32]:
        if self.name == "fp32":
            raise ModelFileError("the runtime fails")
        return classify(self, images)

    timed: list[tuple[str, ...]] = []

    def measured(runners: Mapping[str, object], *words: object, **named: object) -> object:
        timed.append(tuple(runners))
        return measure(runners, *words, **named)

    classify, measure = ModelCandidate.classify, sweep_module.measure
    monkeypatch.setattr(sweep_module, "verify", lambda *_, **__: FakeParity())
    monkeypatch.setattr(sweep_module, "export_file", copy)
    monkeypatch.setattr(sweep_module, "measure", measured)
    monkeypatch.setattr(ModelCandidate, "classify", evaluated)
    data = tmp_path / "val.npz"
    rng = np.random.default_rng(0)
    np.savez(data, images=rng.standard_normal((40, 1, 8, 8), dtype=np.float32), labels=rng.integers(0, 10, 40))
    options = SweepOptions(("fp32", "fp16"), rounds=2)  # type: ignore[arg-type]  # names of members are legal
    evaluation = EvaluationOptions(max_drop=0.2)
    found = sweep(
        load(vit_checkpoint), tmp_path / "out", task="classification", data=data, options=options, evaluation=evaluation
    )
    assert timed == [("fp32",), ("fp16",)]
    assert found.files[0].problem == "the runtime fails"
    assert found.files[1].ratio == 1.0
    assert "time over fp16" in found.table()[0]
    assert "fp32" not in found.recommendation.why
