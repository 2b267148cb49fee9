"""Hold a checkpoint, and the file that was exported from it, to values that the training code saved."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import numpy as np

from ibnorm_export.artifacts.loaded_model import torch_dtype
from ibnorm_export.artifacts.tensors import Arrays, DType
from ibnorm_export.errors import ModelFileError
from ibnorm_export.findings.code import FindingCode
from ibnorm_export.runtimes.torch import TorchRunner
from ibnorm_export.verifier.checkpoint.reference import Reference
from ibnorm_export.verifier.checkpoint.samples import refusals
from ibnorm_export.verifier.comparison import Comparison, with_rounding
from ibnorm_export.verifier.expected.file import ExpectedValues, read_expected
from ibnorm_export.verifier.expected.readings import fitting_reading
from ibnorm_export.verifier.report import ExpectedParity, ExpectedReport, Finding
from ibnorm_export.verifier.tolerances import BOUNDS, MAX_BASELINE_ERROR

__all__ = ["check_expected"]

_CHECKPOINT: Final = "checkpoint in float64"


def _relative_error(actual: Arrays, expected: Arrays, name: str) -> float:
    """Norm-wise relative error of one output; infinite if it is missing or its shape differs."""
    if name not in actual or actual[name].shape != expected[name].shape:
        return float("inf")
    wanted = expected[name].astype(np.float64)
    length = float(np.linalg.norm(wanted))
    error = float(np.linalg.norm(actual[name].astype(np.float64) - wanted))
    return error / length if length else error


def check_expected(comparison: Comparison, path: Path, *, dtype: DType | None = None) -> ExpectedReport:
    """Compare the checkpoint in float64, and the file, with the values in a file.

    Args:
        comparison: the file and its reference.
        path: the file of expected values; see `read_expected`.
        dtype: the type that the training code computed in; None takes that of the values.

    Raises:
        ModelFileError: the file of values is damaged or does not fit the model, or PyTorch cannot run on its inputs.
    """
    reference = comparison.reference
    values = read_expected(path, reference.model, dtype=dtype)
    with refusals(0, values.inputs):
        exact = reference.exact(reference.truth).run(values.inputs)
    for name, array in values.outputs.items():
        if exact[name].shape != array.shape:
            raise ModelFileError(f"{path}: {name} has shape {array.shape}; the checkpoint gives {exact[name].shape}")
    baseline = _baseline_errors(reference, values, exact, values.dtype)
    unfit = tuple(_find_unfit(baseline, values))
    if unfit:
        return ExpectedReport(str(path), values.dtype.value, rows=(), findings=unfit)
    tolerances = {name: BOUNDS[values.dtype].tolerance(error) for name, error in baseline.items()}
    rows = [
        ExpectedParity(name, _CHECKPOINT, error=_relative_error(exact, values.outputs, name), tolerance=tolerance)
        for name, tolerance in tolerances.items()
    ]
    findings = [] if all(row.passed for row in rows) else [_explain(reference, values, rows)]
    found, problems = _compare_file(comparison, values, exact, tolerances=tolerances)
    return ExpectedReport(str(path), values.dtype.value, rows=(*rows, *found), findings=(*findings, *problems))


def _baseline_errors(reference: Reference, values: ExpectedValues, exact: Arrays, dtype: DType) -> Mapping[str, float]:
    """Errors of PyTorch in `dtype` against float64, by output."""
    runner = TorchRunner(reference.model, reference.model.in_dtype(torch_dtype(dtype)))
    mapped = exact if reference.mapped is reference.truth else reference.exact(reference.mapped).run(values.inputs)
    plain = runner.run(values.inputs)
    return {name: _relative_error(plain, mapped, name) for name in values.outputs}


def _find_unfit(baseline: Mapping[str, float], values: ExpectedValues) -> Iterator[Finding]:
    for name, error in baseline.items():
        if not error <= MAX_BASELINE_ERROR:
            yield Finding(
                f"expected {name}",
                f"PyTorch in {values.dtype.value} differs from float64 by {error:.0%} on these inputs, too much for a "
                "comparison: save values that were computed in fp32, or other inputs",
                code=FindingCode.EXPECTED_UNFIT,
            )


def _compare_file(
    comparison: Comparison, values: ExpectedValues, exact: Arrays, *, tolerances: Mapping[str, float]
) -> tuple[list[ExpectedParity], list[Finding]]:
    """The file with each way of running the norms. Its own rounding is added to that of the training code."""
    if comparison.file.metadata.quantization:
        return [], []
    own = _baseline_errors(comparison.reference, values, exact, comparison.reference.dtype)
    bound = BOUNDS[comparison.reference.dtype]
    rows: list[ExpectedParity] = []
    findings: list[Finding] = []
    with tempfile.TemporaryDirectory() as folder:
        runnable = with_rounding(comparison, Path(folder))
        try:
            for norms, runner in runnable.variants.items():
                actual = runner.run(runnable.feed(values.inputs))
                rows += [
                    ExpectedParity(
                        name,
                        f"file, norms {norms}",
                        error=_relative_error(actual, values.outputs, name),
                        tolerance=tolerance + bound.tolerance(own[name]),
                    )
                    for name, tolerance in tolerances.items()
                ]
        except ModelFileError as error:
            findings.append(
                Finding(
                    "expected values",
                    f"the file cannot be run on their inputs: {error}",
                    code=FindingCode.EXPECTED_REFUSED,
                )
            )
        finally:
            runnable.variants.close()
    findings += [
        Finding(
            f"expected {row.output}",
            f"{row.what}: relative error {row.error:.3g} against the values of the training code, the tolerance is "
            f"{row.tolerance:.3g}",
            code=FindingCode.EXPECTED_FILE,
        )
        for row in rows
        if not row.passed
    ]
    return rows, findings


def _explain(reference: Reference, values: ExpectedValues, rows: list[ExpectedParity]) -> Finding:
    """Why the checkpoint does not give the expected values, and which reading of its config would."""
    worst = max(rows, key=lambda row: row.error / row.tolerance)
    measured = (
        f"the checkpoint in float64 differs by {worst.error:.3g} from what the training code computed, the tolerance "
        f"of {values.dtype.value} is {worst.tolerance:.3g}"
    )
    where = f"expected {worst.output}"
    half = ""
    if values.dtype is DType.FP32:
        half = ". If the training code computed in half precision, say so: --expected-dtype bf16 (or fp16)"
    if reference.model.replaced_norms:
        return Finding(
            where,
            f"{measured}. Its norms are your own classes, so the weights, the inputs or the model's mode differ{half}",
            code=FindingCode.EXPECTED_CHECKPOINT,
        )

    def error() -> float:
        actual = reference.exact(reference.mapped).run(values.inputs)
        return max(_relative_error(actual, values.outputs, row.output) / row.tolerance for row in rows)

    fitting = fitting_reading(reference.model, reference.mapped, error=error, tolerance=1.0)
    if fitting is None:
        return Finding(
            where,
            f"{measured}. No other convention, usual lambda (1, 2, 3, 4, 5, 8, ...) or epsilon 10 or 100 times as "
            "large or small fits either: compare lambda and epsilon with those of the training code, the weights, the "
            f"inputs, and that the model was in evaluation mode{half}",
            code=FindingCode.EXPECTED_CHECKPOINT,
        )
    what = f"{measured}. This reading fits: {fitting}. Correct the ibnorm section, and export again"
    return Finding(where, what, code=FindingCode.EXPECTED_CHECKPOINT)
