"""Error attribution: the step that adds the error is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ibnorm_export import models
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.tensors import Arrays
from ibnorm_export.runtimes.ort import OrtRunner
from ibnorm_export.runtimes.runner import Runner
from ibnorm_export.verifier.attribution.error_source import attribute
from ibnorm_export.verifier.numeric.verdict import check_numeric
from ibnorm_export.verifier.report import OptimiserLevel, OutputParity
from tests.support.comparisons import compare_runners


def parity(norms: str, error: float, baseline_error: float = 1e-7) -> OutputParity:
    tolerance = 3 * baseline_error + 1e-6
    return OutputParity(
        "logits",
        norms,
        max_abs=error,
        error=error,
        baseline_error=baseline_error,
        worst_sample=0,
        worst_sample_error=error,
        worst_sample_tolerance=tolerance,
        worst_sample_covers="",
        tolerance=tolerance,
        ratio=error / baseline_error,
        cosine=1.0,
        top1_agreement=None,
        elements=4,
        passed=bool(error <= tolerance),
    )


def level(name: str, error: float) -> OptimiserLevel:
    return OptimiserLevel(name, error, 1.3e-6, error <= 1.3e-6)


GOOD, BAD = 2e-7, 1e-3


@pytest.mark.parametrize(
    ("functions", "fused", "levels", "source", "words"),
    [
        (GOOD, GOOD, (), "", "no step exceeds its tolerance"),
        (BAD, BAD, (BAD, BAD), "exporter", "exporter is responsible"),
        (BAD, GOOD, (BAD, BAD), "exporter", "exporter is responsible"),
        (BAD, BAD, (GOOD, BAD), "optimiser", "level basic 1.00e-03"),
        (GOOD, BAD, (), "kernel", "kernel is responsible"),
        (float("nan"), GOOD, (BAD, float("nan")), "exporter", "exporter"),
    ],
)
def test_the_step_between_a_good_variant_and_a_bad_one_is_responsible(
    functions: float, fused: float, levels: tuple[float, ...], source: str, words: str
) -> None:
    measured = [level(name, error) for name, error in zip(("none", "basic"), levels, strict=False)]
    attribution = attribute([parity("fused", fused), parity("as functions", functions)], "fp32", levels=measured)
    assert attribution is not None
    assert attribution.source == source
    assert words in attribution.summary


def test_an_overflow_in_pytorch_is_attributed_to_the_dtype() -> None:
    attribution = attribute([parity("as functions", float("nan"), float("inf"))], "fp16")
    assert attribution is not None
    assert attribution.source == "dtype"


def test_nothing_is_attributed_where_nothing_was_compared() -> None:
    assert attribute([], "fp32") is None


class WrongRunner:
    """Every value is wrong by one part in a thousand."""

    name = "ort-cpu"

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def run(self, inputs: Arrays) -> Arrays:
        return {name: array * np.float32(1.001) for name, array in self._runner.run(inputs).items()}


def test_a_wrong_kernel_is_distinguished_from_a_wrong_file(exported_vit: ExportedModel, vit_checkpoint: Path) -> None:
    model = models.load(vit_checkpoint)
    functions = OrtRunner(exported_vit.path)
    comparison = compare_runners(
        exported_vit,
        model,
        runners={"fused": WrongRunner(functions), "as functions": functions},
        inputs=[model.sample(np.random.default_rng(0), 0)],
    )
    report = check_numeric(comparison)
    assert any(f.where == "error source kernel" for f in report.findings), report.findings
