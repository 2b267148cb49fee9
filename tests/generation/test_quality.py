"""Predictions of a trained model in every type, on 512 positions of held-out text, against the project's targets."""

from __future__ import annotations

from pathlib import Path

import pytest

from ibnorm_export import models
from ibnorm_export.artifacts.tensors import DType
from ibnorm_export.cli.demo_app.tasks import read_training_text, training_split
from ibnorm_export.cli.demo_app.train import train_checkpoint
from ibnorm_export.exporter.export import ExportOptions
from ibnorm_export.exporter.text_folder import export_folder
from ibnorm_export.graph.quantization import Quantization
from ibnorm_export.runtimes.runner import Kernels
from ibnorm_export.verifier.outputs.quality import POSITIONS
from ibnorm_export.verifier.verify import VerifyOptions, verify

#: Minimum agreement, and maximum ratio to PyTorch's perplexity. The demo LLaMA agrees to 99.80% (int8), 97.66% (int4).
TARGETS = {
    "fp32": (ExportOptions(), 1.0, 1.0 + 1e-6),
    "fp16": (ExportOptions(DType.FP16), 0.995, 1.001),
    "int8": (ExportOptions(quantization=Quantization(8)), 0.985, 1.005),
    "int4": (ExportOptions(quantization=Quantization(4)), 0.94, 1.02),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The demo's LLaMA after a few training steps, and text that was held out."""
    folder = tmp_path_factory.mktemp("quality") / "llama"
    evaluations = train_checkpoint("llama", folder, max_steps=50)
    assert evaluations[-1].loss < 4.5, "bits per byte; an untrained model has 8"
    _, held_out = training_split(read_training_text())
    return folder, held_out[: POSITIONS + 1].decode(errors="replace")


@pytest.mark.parametrize("kind", TARGETS)
def test_predictions_of_a_trained_model(trained: tuple[Path, str], tmp_path: Path, kind: str) -> None:
    options, agreement, perplexity = TARGETS[kind]
    checkpoint, text = trained
    exported = export_folder(models.load(checkpoint, task="text-generation"), tmp_path / "out", options=options)
    model = models.load(checkpoint, task="text-generation")
    report = verify(exported, model, options=VerifyOptions(samples=1, kernels=Kernels.FUNCTION), text=text)
    assert report, report.findings
    assert report.numeric is not None
    (quality,) = report.numeric.quality
    assert (quality.kind, quality.positions) == (kind, POSITIONS)
    assert quality.agreement >= agreement
    assert quality.perplexity / quality.baseline_perplexity <= perplexity
