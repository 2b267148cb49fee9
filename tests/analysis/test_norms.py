"""Figures of norms on values with known answers; a checkpoint and its exported file give the same figures."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from ibnorm_export import IBNormSpec, models
from ibnorm_export.analysis.capture import used_rows
from ibnorm_export.analysis.html import write_analysis
from ibnorm_export.analysis.information import entropy_bits, gram, information_bottleneck, information_with_errors
from ibnorm_export.analysis.norms import analyze, contraction
from ibnorm_export.analysis.options import AnalysisOptions
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.tensors import DType
from ibnorm_export.cli import main
from ibnorm_export.errors import ModelFileError
from ibnorm_export.op.spec import Compression
from tests.support.json_documents import read_document


@pytest.mark.parametrize(("kind", "g"), [("S", lambda t: t), ("L", np.log1p), ("T", np.tanh)])
@pytest.mark.parametrize("size", [0.01, 3.0, 40.0])
def test_contraction_of_two_values_is_the_square_of_their_compression(kind: str, g: object, size: float) -> None:
    rows = np.tile([size + 7.0, 7.0 - size], (5, 3))
    t = size / 2.0
    exact = float((g(t) / t) ** 2)  # type: ignore[operator]
    assert contraction(rows, IBNormSpec(Compression(kind), 2.0)) == pytest.approx(exact, rel=1e-9)


def test_values_without_variance_are_not_contracted() -> None:
    assert contraction(np.full((3, 4), 5.0), IBNormSpec(Compression.TANH)) == 1.0


def test_entropy_of_order_two_is_the_logarithm_of_the_trace_of_the_square() -> None:
    matrix = gram(np.random.default_rng(0).standard_normal((40, 3)), 0.7)
    assert entropy_bits(matrix, 2.0) == pytest.approx(-np.log2(np.trace(matrix @ matrix)), abs=1e-9)


def test_kernel_width_and_order_change_the_estimate() -> None:
    """A narrow kernel separates all points: I(T; X) is log2 n for every order. A wide kernel separates none."""
    points, labels = np.eye(16) * 10.0, np.arange(16) % 4
    for alpha in (0.5, 1.01, 2.0):
        found = information_bottleneck(points, points, target=labels, alpha=alpha, width=0.1)
        assert (found.about_target, found.about_input) == pytest.approx((2.0, 4.0), abs=1e-6)
    assert information_bottleneck(points, points, target=labels, alpha=1.01, width=1e6).about_input == pytest.approx(
        0.0, abs=1e-3
    )


OPTIONS = AnalysisOptions((1e4,), (DType.FP32, DType.BF16), samples=48)


def test_every_type_and_lambda_has_its_rows(llama_checkpoint: Path, tmp_path: Path) -> None:
    model = models.load(llama_checkpoint)
    inputs = model.sample(np.random.default_rng(0), 0)
    report = analyze(model, inputs, options=OPTIONS)
    assert [r.module for r in report.rows if r.own and r.dtype == "fp32"] == list(model.norms)
    assert len(report.rows) == 4 * len(model.norms)
    for row in report.rows:
        assert 0.0 < row.contraction < 1.0 if row.own else row.contraction == pytest.approx(1.0, abs=1e-3)
        assert 0.0 <= row.about_target <= np.log2(48) + 1e-6
        if not row.own:
            assert row.kurtosis_after == pytest.approx(row.kurtosis_before, abs=1e-2)
    first = [r for r in report.rows if r.module == report.rows[0].module and r.own]
    assert first[0].about_input != first[1].about_input  # in bfloat16 the values differ
    page = write_analysis(report, tmp_path / "a.html", about={"processor": "x"}).read_text(encoding="utf-8")
    shown = min(6, len(model.norms))
    assert page.count("<svg") == 2 + (3 + shown) * 4
    for row in report.rows:
        assert row.histogram is not None
        assert len(row.histogram.ends) == 42
        for shares in (row.histogram.before, row.histogram.after):
            assert sum(shares) == pytest.approx(1.0, abs=1e-12)
        middles = (np.array(row.histogram.ends[1:]) + np.array(row.histogram.ends[:-1])) / 2
        spread = [float(np.dot(middles**2, shares)) for shares in (row.histogram.before, row.histogram.after)]
        # a bin is as wide as 1/20 of the range: the variances agree with the contraction to about that
        assert spread[1] / spread[0] == pytest.approx(row.contraction, abs=0.1)
    assert "the next token" in page


@pytest.mark.parametrize("family", ["llama", "vit"])
def test_a_file_has_the_figures_of_its_checkpoint(request: pytest.FixtureRequest, family: str) -> None:
    model = models.load(request.getfixturevalue(f"{family}_checkpoint"))
    exported: ExportedModel = request.getfixturevalue(f"exported_{family}")
    inputs = model.sample(np.random.default_rng(0), 2 if family == "vit" else 0)
    few = AnalysisOptions(samples=64)
    ours, files = (analyze(one, inputs, checkpoint=model, options=few) for one in (model, exported))
    for a, b in zip(ours.rows, files.rows, strict=True):
        assert (a.module, a.compression) == (b.module, b.compression)
        for name in ("kurtosis_before", "kurtosis_after", "contraction", "about_target", "about_input", "bottleneck"):
            assert getattr(a, name) == pytest.approx(getattr(b, name), abs=1e-4), (a.module, name)
    partial = [row.module for row in ours.rows[-2:]] if family == "vit" else []
    for module in partial:
        assert any(note.startswith(f"{module}: only 1 of ") for note in ours.notes)
        assert any(note.startswith(f"{module}: the file computes 1 of ") for note in files.notes)
    assert len([note for note in (*ours.notes, *files.notes) if " of a sample" in note]) == 2 * len(partial)
    if family == "vit":
        alone = analyze(exported, inputs, options=few)
        assert any(note.startswith(f"{partial[-1]}: the file computes 1 row of") for note in alone.notes)


def test_rows_that_reach_no_output_are_found(vit_checkpoint: Path, llama_checkpoint: Path) -> None:
    vit = models.load(vit_checkpoint)
    masks = list(used_rows(vit, vit.sample(np.random.default_rng(0), 2)).values())
    assert len(masks) == len(vit.norms)
    assert all(mask.all() for mask in masks[:-2])
    for mask in masks[-2:]:  # after the last attention, a classifier uses its class token only
        assert mask[0] and not mask[1:].any()
    llama = models.load(llama_checkpoint)
    assert all(mask.all() for mask in used_rows(llama, llama.sample(np.random.default_rng(0), 0)).values())


def test_the_error_is_the_spread_over_batches() -> None:
    """Batches of the same distribution: the standard error of each is near the standard deviation over them."""

    def batch(seed: int) -> tuple[float, float]:
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, 4, 64)
        x = rng.standard_normal((64, 3)) + 2.0 * np.eye(4)[labels][:, :3]
        found, errors = information_with_errors(x, np.tanh(x), target=labels)
        assert errors is not None
        return found.value(), errors.value

    values, errors = zip(*map(batch, range(24)), strict=True)
    assert 0.5 < np.median(errors) / np.std(values) < 2.0
    few, errors_of_few = information_with_errors(np.eye(4), np.eye(4), target=np.arange(4))
    assert np.isfinite(few.value())
    assert errors_of_few is None


def test_inputs_of_another_model_are_refused(exported_llama: ExportedModel, vit_checkpoint: Path) -> None:
    inputs = models.load(vit_checkpoint).sample(np.random.default_rng(0), 2)
    with pytest.raises(ModelFileError, match=r"takes \['attention_mask', 'input_ids'\]; the inputs are \['pixel"):
        analyze(exported_llama.path, inputs)


def test_a_checkpoint_draws_its_own_inputs_and_a_file_asks_for_them(
    vit_checkpoint: Path, exported_vit: ExportedModel
) -> None:
    model = models.load(vit_checkpoint)
    report = analyze(model)
    assert report.passed
    assert report.rows == analyze(model, model.sample(np.random.default_rng(0), 0)).rows
    with pytest.raises(ModelFileError, match=r"needs inputs to be analysed; its inputs are \['pixel_values'\]"):
        analyze(exported_vit)


def test_the_report_prints_as_text(vit_checkpoint: Path) -> None:
    lines = str(analyze(models.load(vit_checkpoint))).splitlines()
    assert lines[0].endswith("samples, Y is the model's own prediction")
    assert lines[1].split()[:4] == ["norm", "type", "kind", "lambda"]
    assert lines[2].startswith("vit.layers.0.layernorm_before")
    notes = [line for line in lines if line.startswith("note: ")]
    assert len(notes) == 3
    assert lines[-3:] == notes
    assert "order 1.01" in lines[-4]


def test_labels_must_fit(vit_checkpoint: Path) -> None:
    model = models.load(vit_checkpoint)
    inputs = model.sample(np.random.default_rng(0), 2)
    report = analyze(model, inputs, labels=np.arange(5))
    assert report.target == "the given labels"
    assert any("too few" in note for note in report.notes)
    with pytest.raises(ModelFileError, match=r"labels have shape \(4,\)"):
        analyze(model, inputs, labels=np.arange(4))


def test_the_command(
    llama_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    page = tmp_path / "a.html"
    words = ["analyze", str(llama_checkpoint), "--lambdas", "0.5,8", "--report", str(page), "--json"]
    monkeypatch.setattr(sys, "argv", ["ibnorm-export", *words])
    assert main.main() == 0
    found = read_document(capfd.readouterr().out, "analyze")
    assert {row["lambda"] for row in found["rows"]} == {4.0, 0.5, 8.0}
    assert page.is_file()
    for bad in (["--lambdas", "0"], ["--lambdas", "x"], ["--dtypes", "fp8"], ["--alpha", "1"], ["--kernel-width", "0"]):
        monkeypatch.setattr(sys, "argv", ["ibnorm-export", "analyze", str(llama_checkpoint), *bad])
        assert main.main() == 2
