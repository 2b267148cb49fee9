"""The numeric verdict: the file's error against PyTorch in float64, judged by the baseline error."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ibnorm_export.artifacts.metadata import Target
from ibnorm_export.artifacts.tensors import DType
from ibnorm_export.errors import ModelFileError
from ibnorm_export.verifier.attribution import attribute, needs_levels
from ibnorm_export.verifier.comparison import Comparison, with_rounding, without_rounding
from ibnorm_export.verifier.decoding import decode
from ibnorm_export.verifier.layers import compare_layers
from ibnorm_export.verifier.norms import find_unfused, observe_norms
from ibnorm_export.verifier.optimiser_levels import measure_levels
from ibnorm_export.verifier.outputs import compare
from ibnorm_export.verifier.quality import check_quality
from ibnorm_export.verifier.report import Finding, LayersReport, NumericReport, OutputParity
from ibnorm_export.verifier.tolerances import MAX_BASELINE_ERROR

__all__ = ["check_numbers", "check_numeric", "locate"]

_EXACT: Final = (
    "a copy in float32 that rounds nothing, against PyTorch in float32 and float64 with the weights of the file"
)


def check_numeric(comparison: Comparison, *, tokens: NDArray[np.int64] | None) -> NumericReport:
    """Compare the numbers of a file, and, if there is a text, its predictions.

    Args:
        comparison: the file as it is, and its reference.
        tokens: a text (n,) for a language model to predict, or None.
    """
    with tempfile.TemporaryDirectory() as folder:
        runnable = with_rounding(comparison, Path(folder))
        report = check_numbers(runnable)
        quality = () if tokens is None else check_quality(runnable, tokens, kind=comparison.reference.dtype.value)
        runnable.variants.close()
        norms = observe_norms(runnable)
    findings = (*report.findings, *(Finding("quality", str(q)) for q in quality if not q.passed))
    report = replace(report, quality=quality, norms=norms, findings=findings)
    report = locate(report, comparison)
    if not comparison.rounds:
        report = _with_exact(report, comparison)
    return replace(report, findings=(*report.findings, *find_unfused(comparison, norms)))


def locate(report: NumericReport, comparison: Comparison) -> NumericReport:
    """The report with the error of every layer if that was requested; with the first that fails if an output fails."""
    if comparison.options.layers:
        return with_layers(report, compare_layers(comparison))
    if all(output.passed for output in report.outputs):
        return report
    layers = compare_layers(comparison)
    found = (Finding("layer", layers.first_failure),) if layers.first_failure else ()
    return replace(report, findings=(*report.findings, *found))


def _with_exact(report: NumericReport, comparison: Comparison) -> NumericReport:
    """The report with the verdict on a copy that rounds nothing: rounding hides arithmetic that is slightly wrong."""
    if comparison.file.metadata.target is Target.ORT_GENAI:
        left_out = "arithmetic without rounding: onnxruntime-genai stores rounded tables of the rotary embedding"
        return replace(report, not_run=(*report.not_run, left_out))
    try:
        with tempfile.TemporaryDirectory() as folder:
            unrounded = without_rounding(comparison, Path(folder))
            exact = check_numbers(unrounded)
            unrounded.variants.close()
            exact = locate(exact, unrounded)
    except ModelFileError as error:
        return replace(report, findings=(*report.findings, Finding("without rounding", str(error))))
    exact = replace(exact, method=_EXACT)
    findings = tuple(Finding(f"without rounding, {found.where}", found.what) for found in exact.findings)
    return replace(report, exact=exact, findings=(*report.findings, *findings))


def check_numbers(comparison: Comparison) -> NumericReport:
    """Compare every output, decode with a cache, and attribute the error."""
    dtype = comparison.reference.dtype
    compared = compare(comparison)
    decoded = decode(comparison)
    outputs = (*compared.outputs, *decoded.outputs)
    levels = measure_levels(comparison) if needs_levels(outputs) else ()
    mapping = comparison.reference.mapping
    attribution = attribute(outputs, dtype.value, levels=levels, mapping=mapping)
    findings = [
        *(mapping.findings if mapping is not None else ()),
        *compared.findings,
        *decoded.findings,
        *_find_unfit_dtype(outputs, dtype),
    ]
    if attribution is not None and attribution.source and not compared.explained:
        findings.append(Finding(f"error source {attribution.source}", attribution.summary))
    return NumericReport(
        comparison.options.backend,
        dtype.value,
        method=_describe_method(comparison),
        samples=len(comparison.reference.samples),
        outputs=outputs,
        findings=tuple(findings),
        attribution=attribution,
        mapping=mapping,
        coverage=comparison.options.coverage,
        notes=() if mapping is None else mapping.notes,
    )


def with_layers(report: NumericReport, layers: LayersReport) -> NumericReport:
    """The report with its layers. The first that fails is a finding only if the report fails without it."""
    if not layers.first_failure:
        return replace(report, layers=layers)
    if report:
        note = f"{layers.first_failure}; every output is within its tolerance"
        return replace(report, layers=layers, notes=(*report.notes, note))
    return replace(report, layers=layers, findings=(*report.findings, Finding("layer", layers.first_failure)))


def _find_unfit_dtype(outputs: Sequence[OutputParity], dtype: DType) -> list[Finding]:
    """Outputs whose baseline error is too large for a comparison."""
    return [
        Finding(
            f"{dtype.value} of output {output.name}",
            f"PyTorch in {dtype.value} differs from float64 by {output.baseline_error:.0%}, too much for a comparison: "
            f"the model does not fit this dtype, so export it in another; norms ran {output.norms}",
        )
        for output in outputs
        if output.baseline_error > MAX_BASELINE_ERROR
    ]


def _describe_method(comparison: Comparison) -> str:
    if comparison.rounds:
        return "the file as it is"
    dtype = comparison.reference.dtype.value
    return (
        f"a copy that rounds every node's output to {dtype} by explicit Casts and does arithmetic in float32: backend "
        f"{comparison.options.backend} computes {dtype} graphs in float32 without that rounding, or not at all"
    )
