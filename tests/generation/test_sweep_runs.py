"""Sweeps that export: every file is made and measured, and a sweep that was stopped goes on."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from ibnorm_export import (
    EvaluationOptions,
    ExportOptions,
    IBNormSpec,
    LoadedModel,
    SweepOptions,
    SweepReport,
    export,
    load,
    sweep,
)
from ibnorm_export.artifacts.tokenizer import write_byte_tokenizer
from ibnorm_export.benchmark.statistics import Decision
from ibnorm_export.cli import main
from ibnorm_export.errors import ExitCode
from ibnorm_export.evaluation import sweep as sweep_module
from ibnorm_export.evaluation.sweep_html import pareto_plot
from ibnorm_export.exporter.single_file import SharedBuild
from tests.support.checkpoints import LLAMA, save_checkpoint
from tests.support.json_documents import read_document

TEXT = "Größe zählt nicht. The quick brown fox jumps over the lazy dog; " * 20


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer: what a sweep does with a file does not depend on the number of layers."""
    folder = tmp_path_factory.mktemp("with tokenizer") / "llama"
    save_checkpoint(folder, {**LLAMA, "num_hidden_layers": 1}, IBNormSpec("L", 4.0, epsilon=1e-5, bias=False), seed=0)
    write_byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> LoadedModel:
    return load(checkpoint, task="text-generation")


@pytest.fixture(scope="module")
def shared(model: LoadedModel) -> SharedBuild:
    """The trace of the model, which takes as long as everything else of a sweep."""
    return SharedBuild(model)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


#: Ordinary samples: the others are verify's own concern.
OPTIONS = SweepOptions(("fp32", "int4"), (32,), rounds=2, coverage="fast")  # type: ignore[arg-type]  # names of members are legal
EVALUATION = EvaluationOptions(max_drop=0.5, max_length=32, batch=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sweep") / "out"


@pytest.fixture(scope="module")
def report(model: LoadedModel, shared: SharedBuild, text: Path, folder: Path) -> SweepReport:
    return sweep(model, folder, task="perplexity", data=text, options=OPTIONS, evaluation=EVALUATION, shared=shared)


@dataclass(frozen=True)
class FakeParity:
    """A verification that passes, for tests of what comes after it."""

    findings: tuple[str, ...] = ()


def test_every_file_is_exported_verified_timed_and_evaluated(report: SweepReport, folder: Path) -> None:
    assert [file.name for file in report.files] == ["fp32", "int4-block32"]
    fp32, int4 = report.files
    assert all(file.verified and file.latency_ms > 0.0 for file in report.files)
    assert Path(fp32.path) == folder / "fp32"
    assert (folder / "int4-block32" / "model.onnx").stat().st_size == int4.size_bytes < fp32.size_bytes
    assert fp32.ratio == 1.0
    assert fp32.drop == pytest.approx(0.0, abs=1e-5)  # fp32 against PyTorch
    assert int4.drop != pytest.approx(0.0, abs=1e-5)
    assert [found.name for found in report.evaluation.candidates] == ["PyTorch", "fp32", "int4-block32"]
    assert report.decision is Decision.PASS
    assert report.latency_of == "one decoding step after 63 tokens"
    assert f"recommended: {report.recommendation.name} ({folder / report.recommendation.name})" in str(report)


def test_a_second_run_takes_everything_from_the_folder(
    report: SweepReport, model: LoadedModel, text: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("nothing is to be done again")

    for step in ("export_folder", "verify", "measure", "open_runner"):
        monkeypatch.setattr(f"ibnorm_export.evaluation.sweep.{step}", refuse)
    monkeypatch.setattr("ibnorm_export.evaluation.candidates.open_runner", refuse)
    again = sweep(model, folder, task="perplexity", data=text, options=OPTIONS, evaluation=EVALUATION)
    assert again.files == report.files
    assert again.recommendation == report.recommendation


def test_a_file_that_was_changed_is_exported_again(
    report: SweepReport, model: LoadedModel, shared: SharedBuild, text: Path, folder: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "out"
    shutil.copytree(folder, copy)
    content = (copy / "fp32" / "model.onnx").read_bytes()
    (copy / "fp32" / "model.onnx").write_bytes((copy / "int4-block32" / "model.onnx").read_bytes())
    options = replace(OPTIONS, dtypes=("fp32",))
    again = sweep(model, copy, task="perplexity", data=text, options=options, evaluation=EVALUATION, shared=shared)
    assert (copy / "fp32" / "model.onnx").read_bytes() == content
    assert again.files[0].drop == report.files[0].drop


def test_a_stopped_sweep_goes_on(
    report: SweepReport, model: LoadedModel, text: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is as after the export of the second file. The sweep is stopped in its timing, and goes on there."""
    copy = tmp_path / "out"
    shutil.copytree(folder, copy)
    state = json.loads((copy / "sweep.json").read_text(encoding="utf-8"))
    kept = list(state["results"].items())[:4]  # export, verify and time the first file, and export the second one
    (copy / "sweep.json").write_text(json.dumps({**state, "results": dict(kept)}), encoding="utf-8")
    steps: list[str] = []
    monkeypatch.setattr(sweep_module, "verify", lambda *_, **__: FakeParity())
    for step in ("export_folder", "verify", "measure"):
        done = getattr(sweep_module, step)
        monkeypatch.setattr(
            sweep_module,
            step,
            lambda *words, step=step, done=done, **named: steps.append(step) or done(*words, **named),
        )

    def stop(what: str, done: int, total: int) -> None:
        if what.startswith("int4-block32 (2 of 2, about ") and what.endswith(": measuring"):
            raise KeyboardInterrupt

    arguments = {"task": "perplexity", "data": text, "options": OPTIONS, "evaluation": EVALUATION}
    with pytest.raises(KeyboardInterrupt):
        sweep(model, copy, **arguments, progress=stop)  # type: ignore[arg-type]  # arguments by name
    assert steps == ["verify", "measure"]
    again = sweep(model, copy, **arguments)  # type: ignore[arg-type]  # arguments by name
    assert steps == ["verify", "measure", "measure"]
    assert [file.drop for file in again.files] == [file.drop for file in report.files]


def test_files_of_a_sweep_are_those_of_single_exports(
    report: SweepReport, checkpoint: Path, folder: Path, tmp_path: Path
) -> None:
    """The second file of the sweep comes from the trace of the first one; an export has its own."""
    exported = export(load(checkpoint, task="text-generation"), tmp_path, options=ExportOptions.with_weights("int4"))
    assert exported.path.read_bytes() == (folder / "int4-block32" / "model.onnx").read_bytes()


def test_the_command_writes_a_page(
    report: SweepReport,
    checkpoint: Path,
    text: Path,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The axes are words, as in the help: click puts all but the first one among the models."""
    pytest.importorskip("matplotlib", reason="the extra `plots` is not installed")
    page = tmp_path / "page.html"
    words = [
        "evaluate",
        checkpoint,
        "--sweep",
        "dtype=fp32,int4",
        "block-size=32",
        "-o",
        folder,
        "--task",
        "perplexity",
    ]
    words += ["--data", text, "--max-drop", "50%", "--max-length", 32, "--batch", 4, "--report", page, "--json"]
    monkeypatch.setattr(sys, "argv", ["ibnorm-export", *map(str, words)])
    monkeypatch.setattr(sweep_module, "verify", lambda *_, **__: FakeParity())
    measured = sweep_module.measure
    monkeypatch.setattr(sweep_module, "measure", lambda *given, **named: measured(*given, **{**named, "rounds": 2}))
    code = main.main()
    out, err = capfd.readouterr()
    assert code == ExitCode.SUCCESS, err
    found = read_document(out, "evaluate")
    name = found["recommendation"]["name"]  # the command times more rounds than the report above
    assert name in {file.name for file in report.files}
    content = page.read_text(encoding="utf-8")
    assert content.count(">Pareto front of size, latency and accuracy<") == 1
    assert f"Recommended: {name} (" in content


def test_the_plot_has_every_file_with_its_size(report: SweepReport) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plots` is not installed")
    plot = pareto_plot(report)
    for file in report.files:
        assert f"{file.name}, {file.size_bytes / 1e6:.3g} MB" in plot
    assert "ms, one decoding step after 63 tokens" in plot
