"""The first step of the numeric verdict: every output of the file, over all samples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ibnorm_export.artifacts.tensors import DType
from ibnorm_export.errors import ModelFileError
from ibnorm_export.runtimes.runner import Runner
from ibnorm_export.verifier.comparison import Comparison
from ibnorm_export.verifier.error_accumulator import ErrorSums
from ibnorm_export.verifier.report import Finding, OutputParity, StepReport
from ibnorm_export.verifier.tolerances import BOUNDS

__all__ = ["compare", "compare_runner", "describe_error"]


def compare(comparison: Comparison) -> StepReport:
    """Run the file on every sample, with each way of running the norms."""
    steps = [compare_runner(comparison, runner, norms=norms) for norms, runner in comparison.variants.items()]
    outputs = tuple(output for step in steps for output in step.outputs)
    findings = [finding for step in steps for finding in step.findings]
    findings += [
        Finding(f"output {output.name}", describe_error(output, comparison.reference.dtype))
        for output in outputs
        if not output.passed
    ]
    return StepReport(outputs, tuple(findings))


def compare_runner(comparison: Comparison, runner: Runner, *, norms: str) -> StepReport:
    """Run one runner on every sample.

    Args:
        comparison: what is compared.
        runner: a runner of the file.
        norms: how its norms run, as named in the report.

    Returns:
        A parity for each output, and findings for samples that cannot be compared.
    """
    names = comparison.reference.model.outputs
    sums = {name: ErrorSums() for name in names}
    findings: list[Finding] = []
    for index, sample in enumerate(comparison.reference.samples):
        comparison.progress(f"comparing, norms {norms}", index, len(comparison.reference.samples))
        try:
            actual = runner.run(comparison.feed(sample.inputs))
        except ModelFileError as error:
            findings.append(Finding(f"sample {index}", str(error)))
            continue
        for name in names:
            expected = sample.truth[name].shape
            if name not in actual or actual[name].shape != expected:
                what = f"has shape {actual[name].shape}" if name in actual else "is missing"
                findings.append(Finding(f"output {name}", f"sample {index}: {what}; its shape must be {expected}"))
                continue
            a, b, t = (sample.select(arrays, name) for arrays in (actual, sample.baseline, sample.truth))
            findings += [
                Finding(f"output {name}", f"sample {index}: {problem}")
                for problem in _nonfinite_problems(a, b, truth=t, dtype=comparison.reference.dtype)
            ]
            sums[name].add(a, b, truth=t)
    comparison.progress("comparing", len(comparison.reference.samples), len(comparison.reference.samples))
    bound = BOUNDS[comparison.reference.dtype]
    return StepReport(
        tuple(added.judge(name, norms, bound=bound) for name, added in sums.items() if added), tuple(findings)
    )


def describe_error(output: OutputParity, dtype: DType) -> str:
    """The error of an output and its tolerance, in words."""
    return (
        f"relative error {output.error:.3g} against float64 (worst sample {output.worst_sample_error:.3g}); PyTorch in "
        f"{dtype.value} has {output.baseline_error:.3g}, the tolerance is {output.tolerance:.3g}; norms ran "
        f"{output.norms}"
    )


def _nonfinite_problems(
    actual: NDArray[Any], baseline: NDArray[Any], *, truth: NDArray[Any], dtype: DType
) -> Iterator[str]:
    """The first cause of NaN and infinity: the checkpoint, its dtype, or the file."""
    if not np.isfinite(truth).all():
        yield "the checkpoint itself gives NaN or infinity"
    elif not np.isfinite(baseline).all():
        yield f"PyTorch itself overflows in {dtype.value}: the model does not fit this dtype"
    elif not np.isfinite(actual).all():
        count = int((~np.isfinite(actual)).sum())
        yield (
            f"{count} of {actual.size} values are NaN or infinity where PyTorch's are finite: an overflow in "
            f"{dtype.value}"
        )
