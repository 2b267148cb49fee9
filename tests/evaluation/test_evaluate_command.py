"""The command `evaluate`, and its page."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.cli import main
from ibnorm_export.cli.evaluate import parse_share
from ibnorm_export.errors import ExitCode
from tests.support.json_documents import read_document
from tests.support.messages import messages


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "val.npz"
    rng = np.random.default_rng(0)
    np.savez(file, images=rng.standard_normal((60, 1, 8, 8), dtype=np.float32), labels=rng.integers(0, 10, 60))
    return file


def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["ibnorm-export", "evaluate", *map(str, words)])
    code = main.main()
    found = capfd.readouterr()
    return code, found.out, found.err


def test_it_prints_json_and_writes_a_page(
    vit_checkpoint: Path,
    exported_vit: ExportedModel,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plots` is not installed")
    page = tmp_path / "page.html"
    words = [exported_vit.path, "--against", vit_checkpoint, "--task", "classification", "--data", data]
    code, out, err = run(monkeypatch, capfd, *words, "--max-drop", "20%", "--report", page, "--json")
    assert code == ExitCode.SUCCESS, err
    found = read_document(out, "evaluate")
    assert found["verdict"] == "pass"
    assert [c["name"] for c in found["candidates"]] == [f"{vit_checkpoint.name} (torch)", exported_vit.path.name]
    text = page.read_text(encoding="utf-8")
    assert text.count("<svg") == 7, "two metrics, three differences, calibration, and classes"
    assert "Differences from" in text
    assert "Error by class" in text


def test_one_file_on_two_runtimes(
    exported_vit: ExportedModel, data: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [f"{exported_vit.path}@reference", "--against", exported_vit.path, "--task", "classification"]
    code, out, err = run(monkeypatch, capfd, *words, "--data", data, "--limit", 20)
    assert code == ExitCode.SUCCESS, err
    assert f"{exported_vit.path.name} (reference) against {exported_vit.path.name}: drop of top-1 +0.000%" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["nowhere.onnx", "--data", "x"],
            "nowhere.onnx does not exist; give an exported file or folder, a checkpoint, or http://HOST:PORT/v1",
        ),
        (["nowhere.onnx@ort-cpu", "--data", "x"], "nowhere.onnx does not exist"),
        (["http://", "--data", "x"], "'http://' is not the address of a text endpoint; it must be http://HOST:PORT/v1"),
        (["x", "--data", "x", "--max-drop", "much"], "'much' is not a share such as 0.5% or 0.005"),
        (["x", "--data", "x", "--max-drop", "1%0"], "'1%0' is not a share such as 0.5% or 0.005"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(monkeypatch, capfd, *words, "--task", "classification")
    assert code == ExitCode.BAD_INPUT
    assert message in err
    assert len(messages(err)) == 1


def test_triton_without_an_address_names_the_option_of_this_command(
    exported_vit: ExportedModel, data: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [f"{exported_vit.path}@triton", "--task", "classification", "--data", data]
    code, _, err = run(monkeypatch, capfd, *words)
    assert code == ExitCode.BAD_INPUT
    assert "needs the running server of" in err
    assert "add --url HOST:PORT" in err
    assert "verify" not in err


@pytest.mark.parametrize("task", ["perplexity", "choice", "lm-eval"])
def test_a_task_of_texts_is_refused_for_what_takes_images(
    exported_vit: ExportedModel,
    data: Path,
    task: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    code, _, err = run(monkeypatch, capfd, exported_vit.path, "--task", task, "--data", data)
    assert code == ExitCode.BAD_INPUT
    assert f"takes images, and --task {task} is for language models: use --task classification" in err


@pytest.mark.parametrize(("text", "share"), [("0.5%", 0.005), ("0.005", 0.005), (" 2 %", 0.02), ("0", 0.0)])
def test_shares(text: str, share: float) -> None:
    assert parse_share(text) == pytest.approx(share)


def test_a_missing_backend_is_reported_before_a_checkpoint_is_read(
    exported_vit: ExportedModel, data: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("the checkpoint is read first")

    monkeypatch.setattr("ibnorm_export.models.loading.load", load)
    monkeypatch.setitem(sys.modules, "openvino", None)
    words = [f"{exported_vit.path}@openvino", "--against", "checkpoint", "--task", "classification", "--data", data]
    code, _, err = run(monkeypatch, capfd, *words)
    assert code == ExitCode.UNAVAILABLE
    assert "backend openvino needs the package openvino" in err
