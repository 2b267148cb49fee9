"""The step of the numeric verdict that compares every output of the file, over all samples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from ibnorm_export.artifacts.axes import axis_name
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.tensors import Arrays, DType
from ibnorm_export.errors import ModelFileError
from ibnorm_export.findings.code import FindingCode
from ibnorm_export.runtimes.runner import Runner
from ibnorm_export.verifier.checkpoint.reference import Sample
from ibnorm_export.verifier.comparison import Comparison
from ibnorm_export.verifier.finding import Finding
from ibnorm_export.verifier.outputs.error_accumulator import ErrorSums
from ibnorm_export.verifier.outputs.runtime_faults import find_runtime_fault
from ibnorm_export.verifier.report_parts.outputs import OutputParity
from ibnorm_export.verifier.steps import NOTHING, Part
from ibnorm_export.verifier.tolerances import BOUNDS, MAX_BASELINE_ERROR, Bound

__all__ = ["compare", "compare_runner", "describe_error", "judge_dtype"]


def compare(comparison: Comparison, _found: Part = NOTHING) -> Part:
    """Run the file on every sample, with each way of running the norms."""
    steps = [compare_runner(comparison, runner, norms=norms) for norms, runner in comparison.variants.items()]
    outputs = tuple(output for step in steps for output in step.outputs)
    findings = [finding for step in steps for finding in step.findings]
    findings += [
        Finding(
            f"output {output.name}", describe_error(output, comparison.reference.dtype), code=FindingCode.OUTPUT_ERROR
        )
        for output in outputs
        if not output.passed
    ]
    return Part(
        _describe_method(comparison),
        len(comparison.reference.samples),
        outputs=outputs,
        findings=tuple(findings),
        explained=any(step.explained for step in steps),
    )


def _describe_method(comparison: Comparison) -> str:
    if comparison.rounds:
        return "the file as it is"
    dtype = comparison.reference.dtype.value
    return (
        f"a copy that rounds every node's output to {dtype} by explicit Casts and does arithmetic in float32: backend "
        f"{comparison.options.backend} computes {dtype} graphs in float32 without that rounding, or not at all"
    )


def judge_dtype(comparison: Comparison, found: Part) -> Part:
    """Name the outputs whose baseline error is too large for a comparison."""
    dtype = comparison.reference.dtype.value
    return Part(
        findings=tuple(
            Finding(
                f"{dtype} of output {output.name}",
                f"PyTorch in {dtype} differs from float64 by {output.baseline_error:.0%}, too much for a comparison: "
                f"the model does not fit this dtype, so export it in another; norms ran {output.norms}",
                code=FindingCode.DTYPE_UNFIT,
            )
            for output in found.outputs
            if output.baseline_error > MAX_BASELINE_ERROR
        )
    )


@dataclass(frozen=True, slots=True)
class _OutputSums:
    """Sums of one output: of everything, and without the rows that are masked throughout."""

    everything: ErrorSums = field(default_factory=ErrorSums)
    unmasked: ErrorSums = field(default_factory=ErrorSums)

    def add(self, sample: Sample, actual: Arrays, *, name: str, spread: float) -> None:
        """Add one sample."""
        self._add_to(self.everything, sample, actual, name=name, spread=spread)
        masked = sample.masked_rows
        arrays = (actual, sample.baseline, sample.truth)
        if not masked.any():
            self.unmasked.samples.append(self.everything.samples[-1])
        elif not masked.all() and all(len(a[name]) == len(masked) for a in arrays):
            valid = {n: v[~masked] for n, v in sample.valid.items()}
            kept, baseline, truth = ({name: a[name][~masked]} for a in arrays)
            self._add_to(
                self.unmasked,
                replace(sample, valid=valid, baseline=baseline, truth=truth, least_error={}),
                kept,
                name=name,
                spread=spread,
            )

    def passes_unmasked(self, name: str, norms: str, *, bound: Bound) -> bool:
        """Whether there are rows that are not masked throughout, and they are within the tolerance."""
        return bool(self.unmasked) and self.unmasked.judge(name, norms, bound=bound).passed

    @staticmethod
    def _add_to(sums: ErrorSums, sample: Sample, actual: Arrays, *, name: str, spread: float) -> None:
        a, b, t = (sample.select(arrays, name) for arrays in (actual, sample.baseline, sample.truth))
        sums.add(
            a,
            b,
            truth=t,
            least_error=sample.least_error.get(name),
            spread=spread,
            index=sample.index,
            covers=sample.covers,
        )


def compare_runner(comparison: Comparison, runner: Runner, *, norms: str) -> Part:
    """Run one runner on every sample.

    Args:
        comparison: what is compared.
        runner: a runner of the file.
        norms: how its norms run, as named in the report.

    Returns:
        A parity for each output, and findings for samples that cannot be compared.
    """
    reference = comparison.reference
    sums = {name: _OutputSums() for name in reference.model.outputs}
    findings = list(_declared_problems(comparison))
    explained = False
    for done, sample in enumerate(reference.samples):
        comparison.progress(f"comparing, norms {norms}", done, len(reference.samples))
        try:
            actual = runner.run(comparison.feed(sample.inputs))
        except ModelFileError as error:
            findings.append(Finding(sample.label, str(error), code=FindingCode.SAMPLE_REFUSED))
            continue
        for name, added in sums.items():
            if (problem := _shape_problem(sample, actual, name)) is not None:
                findings.append(problem)
            elif (fault := find_runtime_fault(comparison, sample, actual=actual[name], name=name)) is not None:
                findings.append(fault)
                explained = True
            else:
                added.add(sample, actual, name=name, spread=reference.spread)
                if not added.everything.samples[-1].finite:
                    findings += _nonfinite_problems(sample, actual, name=name, dtype=reference.dtype)
    comparison.progress("comparing", len(reference.samples), len(reference.samples))
    bound = BOUNDS[reference.dtype]
    outputs = tuple(
        added.everything.judge(name, norms, bound=bound) for name, added in sums.items() if added.everything
    )
    masked = [
        _masked_rows(output.name)
        for output in outputs
        if not output.passed and sums[output.name].passes_unmasked(output.name, norms, bound=bound)
    ]
    return Part(outputs=outputs, findings=(*findings, *masked), explained=explained or bool(masked))


def _shape_problem(sample: Sample, actual: Arrays, name: str) -> Finding | None:
    """An output that is missing or has another shape than PyTorch's."""
    expected = sample.truth[name].shape
    if name in actual and actual[name].shape == expected:
        return None
    what = f"has shape {actual[name].shape}" if name in actual else "is missing"
    return Finding(
        f"output {name}", f"{sample.label}: {what}; its shape must be {expected}", code=FindingCode.OUTPUT_SHAPE
    )


def _masked_rows(name: str) -> Finding:
    """The explanation of an output that fails only in rows without a token."""
    return Finding(
        f"masked rows of output {name}",
        "the difference is confined to rows that are masked throughout (attention_mask is 0 everywhere), whose "
        "values have no meaning; give inputs with at least one token in each row",
        code=FindingCode.MASKED_ROWS,
    )


def _declared_problems(comparison: Comparison) -> Iterator[Finding]:
    """Outputs that are declared with other sizes than they have: callers that allocate memory for them get it wrong."""
    reference = comparison.reference
    for tensor in comparison.file.outputs:
        for sample in reference.samples:
            if tensor.name not in sample.truth or not tensor.shape:
                continue
            has = sample.truth[tensor.name].shape
            sizes = _axis_sizes(reference.model, sample.inputs)
            declared = [sizes.get(axis_name(n), n) if isinstance(n, str) else n for n in tensor.shape]
            fixed = [(axis, size) for axis, size in enumerate(declared) if isinstance(size, int) and size > 0]
            if any(axis >= len(has) or size != has[axis] for axis, size in fixed):
                what = f"declares the shape {tuple(tensor.shape)}; it has {has} for {sample.label}"
                yield Finding(f"output {tensor.name}", what, code=FindingCode.OUTPUT_SHAPE)
                break


def _axis_sizes(model: LoadedModel, inputs: Arrays) -> dict[str, int]:
    """Sizes of the dynamic axes of an input, by name."""
    return {
        axis: size
        for spec in model.inputs
        for axis, size in zip(spec.shape, inputs[spec.name].shape, strict=True)
        if isinstance(axis, str)
    }


def describe_error(output: OutputParity, dtype: DType) -> str:
    """The error of an output and its tolerance, in words."""
    covers = f", {output.worst_sample_covers}" if output.worst_sample_covers else ""
    return (
        f"relative error {output.error:.3g} against float64; PyTorch in {dtype.value} has {output.baseline_error:.3g}, "
        f"the tolerance is {output.tolerance:.3g}; sample {output.worst_sample}{covers} has "
        f"{output.worst_sample_error:.3g}, its tolerance is {output.worst_sample_tolerance:.3g}; norms ran "
        f"{output.norms}"
    )


def _nonfinite_problems(sample: Sample, actual: Arrays, *, name: str, dtype: DType) -> Iterator[Finding]:
    """The first cause of NaN and infinity in an output: the checkpoint, its dtype, or the file."""
    values, baseline, truth = (sample.select(arrays, name) for arrays in (actual, sample.baseline, sample.truth))
    if not np.isfinite(truth).all():
        problem = "the checkpoint itself gives NaN or infinity"
    elif not np.isfinite(baseline).all():
        problem = f"PyTorch itself overflows in {dtype.value}: the model does not fit this dtype"
    elif not np.isfinite(values).all():
        count = int((~np.isfinite(values)).sum())
        problem = (
            f"{count} of {values.size} values are NaN or infinity where PyTorch's are finite: an overflow in "
            f"{dtype.value}"
        )
    else:
        return
    yield Finding(f"output {name}", f"{sample.label}: {problem}", code=FindingCode.NOT_FINITE)
