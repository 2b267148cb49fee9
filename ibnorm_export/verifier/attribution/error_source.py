"""Find the step that adds the error: mapping, dtype, exporter, ONNX Runtime's optimiser, or the fused kernels.

The user's own norms in float64 --mapping--> IBNorm in float64 --dtype--> PyTorch in the file's dtype --exporter-->
functions, not optimised --optimiser--> functions, optimised --kernel--> fused kernels. A step is responsible when the
variant before it is within its tolerance and the variant after it is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ibnorm_export.findings.code import FindingCode
from ibnorm_export.text_report import counted
from ibnorm_export.verifier.attribution.optimiser_levels import measure_levels
from ibnorm_export.verifier.comparison import FUNCTIONS, FUSED, Comparison
from ibnorm_export.verifier.finding import Finding
from ibnorm_export.verifier.report_parts.attribution import ErrorAttribution, ErrorSource, OptimiserLevel
from ibnorm_export.verifier.report_parts.mapping import MappingReport
from ibnorm_export.verifier.report_parts.outputs import OutputParity
from ibnorm_export.verifier.steps import Part

__all__ = ["attribute", "attribute_error", "needs_levels"]


@dataclass(frozen=True, slots=True)
class _Variants:
    """One output with each way of running the norms; at least one was compared."""

    functions: OutputParity | None
    fused: OutputParity | None

    @property
    def present(self) -> tuple[OutputParity, ...]:
        return tuple(variant for variant in (self.functions, self.fused) if variant is not None)

    @property
    def base(self) -> OutputParity:
        """The variant with functions if it was compared, otherwise the fused one."""
        return self.present[0]

    @property
    def failed(self) -> bool:
        return not all(variant.passed for variant in self.present)

    @property
    def excess(self) -> float:
        return max(variant.excess for variant in self.present)


def attribute_error(comparison: Comparison, found: Part) -> Part:
    """Attribute the error of the worst output, and measure the optimiser's levels where they may be responsible."""
    levels = measure_levels(comparison) if needs_levels(found.outputs) else ()
    attribution = attribute(
        found.outputs, comparison.reference.dtype.value, levels=levels, mapping=comparison.reference.mapping
    )
    if attribution is None or not attribution.source or found.explained:
        return Part(attribution=attribution)
    finding = Finding(f"error source {attribution.source}", attribution.summary, code=FindingCode.ERROR_SOURCE)
    return Part(attribution=attribution, findings=(finding,))


def needs_levels(outputs: Sequence[OutputParity]) -> bool:
    """Whether an output exceeds its tolerance without fused kernels, so that the optimiser may be responsible."""
    functions = [output for output in outputs if output.norms == FUNCTIONS]
    return not all(output.passed for output in functions or outputs)


def attribute(
    outputs: Sequence[OutputParity],
    dtype: str,
    *,
    levels: Sequence[OptimiserLevel] = (),
    mapping: MappingReport | None = None,
) -> ErrorAttribution | None:
    """Attribute the error of the worst output to the steps that lead to it.

    Args:
        outputs: parities with norms "fused" and "as functions".
        dtype: short name of the file's dtype.
        levels: errors at the levels of ONNX Runtime's optimiser, lowest first; empty if they were not measured.
        mapping: the user's own norms against those that are exported; None if there are none.

    Returns:
        The attribution, or None if nothing was compared.
    """
    name, variants = _worst_output(outputs)
    if variants is None:
        return None
    mapping_source = _judge_mapping(mapping)
    dtype_source = ErrorSource(
        "dtype",
        variants.base.baseline_error,
        not (np.isfinite(variants.base.baseline_error) or mapping_source.responsible),
        f"PyTorch in {dtype} against PyTorch in float64",
    )
    earlier = mapping_source.responsible or dtype_source.responsible
    optimiser = _judge_optimiser(levels)
    if mapping_source.responsible:
        optimiser = replace(optimiser, responsible=False)
    exporter = ErrorSource(
        "exporter",
        levels[0].error if levels else variants.base.error,
        not (variants.base.passed or earlier or optimiser.responsible),
        f"the file with norms {variants.base.norms}{', not optimised' if levels else ''}",
    )
    kernel = _judge_kernel(variants, earlier_fails=earlier)
    sources = (mapping_source, dtype_source, exporter, optimiser, kernel)
    return ErrorAttribution(
        name, dtype, sources=sources, levels=tuple(levels), summary=_summarise(name, dtype, variants, sources=sources)
    )


def _worst_output(outputs: Sequence[OutputParity]) -> tuple[str, _Variants | None]:
    """The output that failed by the most, or, if none did, the one nearest to its tolerance."""
    variants: dict[str, _Variants] = {}
    for output in outputs:
        if output.norms in (FUSED, FUNCTIONS):
            by_norms = {other.norms: other for other in outputs if other.name == output.name}
            variants[output.name] = _Variants(by_norms.get(FUNCTIONS), by_norms.get(FUSED))
    if not variants:
        return "", None
    return max(variants.items(), key=lambda item: (item[1].failed, item[1].excess))


def _judge_mapping(mapping: MappingReport | None) -> ErrorSource:
    if mapping is None:
        return ErrorSource("mapping", None, False, "no norm of the user's own code was replaced")
    failed = [finding.where.removeprefix("mapping of ") for finding in mapping.findings]
    explanation = "IBNorm in place of your own norms, in float64"
    if failed:
        explanation += f"; {counted(len(failed), 'finding')}, the first is of {failed[0]}"
    return ErrorSource("mapping", mapping.error, not mapping, explanation)


def _judge_optimiser(levels: Sequence[OptimiserLevel]) -> ErrorSource:
    if not levels:
        return ErrorSource("optimiser", None, False, "levels are measured only if the functions exceed their tolerance")
    first, last = levels[0], levels[-1]
    if last.passed:
        return ErrorSource("optimiser", last.error, False, "the error is within its tolerance at every level")
    if not first.passed:
        return ErrorSource("optimiser", last.error, False, f"the error also occurs without it (level {first.name})")
    failed = next(level for level in levels if not level.passed)
    return ErrorSource(
        "optimiser",
        last.error,
        True,
        f"level {first.name} has error {first.error:.2e}, level {failed.name} {failed.error:.2e}; the tolerance is "
        f"{failed.tolerance:.2e}",
    )


def _judge_kernel(variants: _Variants, *, earlier_fails: bool) -> ErrorSource:
    functions, fused = variants.functions, variants.fused
    if fused is None or functions is None:
        return ErrorSource("kernel", None, False, "only one way of running the norms was compared")
    explanation = "the file with fused kernels"
    if not fused.passed and not functions.passed:
        explanation += "; the functions exceed their tolerance too"
    return ErrorSource("kernel", fused.error, functions.passed and not fused.passed and not earlier_fails, explanation)


def _summarise(name: str, dtype: str, variants: _Variants, *, sources: Sequence[ErrorSource]) -> str:
    errors = " and ".join(
        f"{variant.error:.2e} {'with fused kernels' if variant.norms == FUSED else variant.norms}"
        for variant in variants.present
    )
    measured = f"{name}: PyTorch in {dtype} has an error of {variants.base.baseline_error:.2e}, the file {errors}"
    responsible = next((source for source in sources if source.responsible), None)
    if responsible is None:
        return f"{measured}; no step exceeds its tolerance"
    later = ", if nothing changed the file since" if responsible.name == "exporter" else ""
    return f"{measured}. The {responsible.name} is responsible{later}: {responsible.explanation}"
