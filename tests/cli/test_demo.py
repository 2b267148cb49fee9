"""The demo with little training: all files exist, verification passes, and the verdict follows the training."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ibnorm_export.cli.demo_app import app
from ibnorm_export.cli.demo_app import train as training
from ibnorm_export.cli.demo_app.app import DemoResult, run_demo
from ibnorm_export.cli.demo_app.report import write_report
from ibnorm_export.cli.demo_app.tasks import Goal, Metric, Plan, plan
from ibnorm_export.cli.demo_app.train import Evaluation, train
from ibnorm_export.errors import CheckpointError
from ibnorm_export.json_document import json_document
from ibnorm_export.json_text import json_text
from ibnorm_export.models.new_models import new_model
from tests.support.json_documents import read_document


def one_layer(name: str, text: Path | None = None) -> Plan:
    """The demo's plan with one layer of four: exports, which take most of the time, are three times as quick."""
    planned = plan(name, text)
    return replace(planned, config={**planned.config, "num_hidden_layers": 1})


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> DemoResult:
    with pytest.MonkeyPatch.context() as patch:
        for module in (app, training):
            patch.setattr(module, "plan", one_layer)
        return run_demo(tmp_path_factory.mktemp("demo"), max_steps=30)


def test_two_checkpoints_and_their_files(short: DemoResult) -> None:
    folder = Path(short.folder)
    for name in ("llama", "vit"):
        assert (folder / name / "config.json").is_file()
        assert (folder / name / "model.safetensors").is_file()
        assert (folder / f"{name}.onnx").is_file()
        assert (folder / f"{name}.fp16.onnx").is_file()
    assert len((folder / "held-out.txt").read_text(encoding="utf-8")) >= 500
    with np.load(folder / "digits.npz") as digits:
        assert digits["pixel_values"].shape == (360, 1, 8, 8)
    assert np.load(folder / "labels.npy").shape == (360,)


def test_parity_passes_in_fp32_and_fp16(short: DemoResult) -> None:
    for model in short.models:
        assert all(model.parity), [str(f) for r in model.parity for f in r.findings]
        assert [r.numeric.dtype for r in model.parity if r.numeric] == ["fp32", "fp16"]
        fp32 = model.parity[0].numeric
        assert fp32 is not None
        assert fp32.outputs[0].error <= 2e-6, "the function path at model level"


def test_its_json_is_as_its_schema_says(short: DemoResult) -> None:
    document = json_document("demo", {**short.to_dict(), "report": "report.html"})
    assert read_document(json_text(document), "demo")["sweeps"]


def test_the_verdict_follows_the_goals(short: DemoResult) -> None:
    llama, vit = short.models
    assert llama.reached == (llama.evaluations[-1].loss <= 3.2)
    assert vit.reached == (vit.evaluations[-1].accuracy >= 0.9)
    assert not short, "30 steps are too few for the ViT"
    assert bool(short) == (llama.reached and vit.reached and bool(short.text) and all(short.sweeps))
    assert short.to_dict()["verdict"] == ("pass" if short else "fail")


def train_vit(goal: Goal, delay: float, *, max_steps: int = 200) -> tuple[Evaluation, ...]:
    """Train the demo's ViT; every step takes `delay` seconds longer, as on a machine that is busy with other work."""
    planned = plan("vit")
    model = new_model(planned.config, planned.spec)
    return train(
        model, planned.task, goal=goal, max_steps=max_steps, progress=lambda what, done, total: time.sleep(delay)
    )


def test_a_slow_machine_gets_the_same_curve_and_the_same_verdict() -> None:
    goal = Goal(Metric.ACCURACY, 0.3)
    quick, starved = train_vit(goal, 0.0), train_vit(goal, 0.01)
    assert quick == starved
    assert quick[-1].accuracy >= 0.3 > quick[-2].accuracy, "training ends when it is good enough"
    assert quick[-1].step < 200


def test_training_ends_at_the_limit() -> None:
    evaluations = train_vit(Goal(Metric.ACCURACY, 1.1), 0.0, max_steps=30)
    assert [e.step for e in evaluations] == [0, 25, 30]


def test_training_restores_the_number_of_threads() -> None:
    before = torch.get_num_threads()
    train_vit(Goal(Metric.ACCURACY, 0.0), 0.0, max_steps=1)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("goal", "loss", "accuracy", "reached"),
    [
        (Goal(Metric.BITS_PER_BYTE, 3.6), 3.6, 0.0, True),
        (Goal(Metric.BITS_PER_BYTE, 3.6), 3.61, 1.0, False),
        (Goal(Metric.ACCURACY, 0.9), 9.0, 0.9, True),
        (Goal(Metric.ACCURACY, 0.9), 0.1, 0.89, False),
    ],
)
def test_a_goal(goal: Goal, loss: float, accuracy: float, reached: bool) -> None:
    assert goal.reached(loss=loss, accuracy=accuracy) is reached
    assert f"{goal.bound:g}" in goal.describe(loss=loss, accuracy=accuracy) or "90%" in goal.describe(
        loss=loss, accuracy=accuracy
    )


def test_every_form_writes_the_same_text(short: DemoResult) -> None:
    forms = {w.form: w for w in short.text.writings}
    assert list(forms) == ["PyTorch", "ONNX Runtime, portable", "onnxruntime-genai", "onnxruntime-genai, int4"]
    assert len({w.result.text for name, w in forms.items() if "int4" not in name}) == 1
    assert short.text.same
    for name in ("ONNX Runtime, portable", "onnxruntime-genai"):
        parity = forms[name].parity
        assert parity, parity.findings if parity is not None else name
        assert parity.numeric is not None
        assert all((q.positions, q.agreement) == (512, 1.0) for q in parity.numeric.quality)
    written = forms["PyTorch"]
    other = replace(written, result=replace(written.result, tokens=(*written.result.tokens, 1)))
    assert not replace(short.text, writings=(*short.text.writings, other))


def test_every_type_of_weights_does_its_task(short: DemoResult) -> None:
    """Perplexity and top-1 with intervals; fp32 and fp16 are as good as PyTorch, whatever the training."""
    llama, vit = short.sweeps
    assert [file.name for file in llama.files] == ["fp32", "fp16", "int8-block32", "int4-block32"]
    assert all(file.verified for file in llama.files)
    assert [found.samples for found in llama.evaluation.candidates] == [63] * 5
    assert [found.samples for found in vit.evaluation.candidates] == [360] * 3
    assert all("only language models" in file.problem for file in vit.files[2:])
    for report in short.sweeps:
        for name in ("fp32", "fp16"):
            comparison = report.comparison_of(name)
            assert comparison is not None
            assert comparison.low <= comparison.drop <= comparison.high < 0.02
        assert report.recommendation.name


def test_training_is_evaluated(short: DemoResult) -> None:
    for model in short.models:
        assert [e.step for e in model.evaluations] == [0, 25, 30]
        assert model.evaluations[-1].loss < model.evaluations[0].loss
        for e in model.evaluations:
            assert all(np.isfinite([e.kurtosis_in, e.kurtosis_out, e.about_input, e.bottleneck]))
            assert e.about_target > 0


def test_the_report_shows_both_models(short: DemoResult, tmp_path: Path) -> None:
    text = write_report(short, tmp_path / "report.html").read_text(encoding="utf-8")
    assert text.count("<svg") == 17, "five for each model, three for each sweep, and the digits"
    assert text.count(">Pareto front of size, latency and accuracy<") == 2
    vit = short.models[1]
    assert len(vit.digits) == 12
    assert sum(digit.answer != digit.truth for digit in vit.digits) <= 3
    for model in short.models:
        assert model.effort in text
    assert "Byte-level LLaMA" in text
    assert "handwritten digits" in text
    assert "Text that the LLaMA generates" in text
    assert text.count(short.text.prompt) >= 4


def test_a_text_that_is_too_short(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(CheckpointError, match="at least 20000"):
        run_demo(tmp_path / "out", text=tmp_path / "short.txt")
