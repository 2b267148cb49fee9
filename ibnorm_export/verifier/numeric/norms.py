"""The norms: whether they are the user's own, which implementation ran for each, and whether it is the required one."""

from __future__ import annotations

from ibnorm_export.findings.code import FindingCode
from ibnorm_export.runtimes.norm_executions import norm_executions
from ibnorm_export.runtimes.registry import BACKENDS, fused_library
from ibnorm_export.verifier.comparison import FUNCTIONS, FUSED, Comparison
from ibnorm_export.verifier.finding import Finding
from ibnorm_export.verifier.steps import NOTHING, Part

__all__ = ["compare_norms", "find_unfused", "observe_norms"]


def compare_norms(comparison: Comparison, _found: Part = NOTHING) -> Part:
    """Compare the user's own norms with those that are exported, if there are any; see `MappingMeasurement`."""
    mapping = comparison.reference.mapping
    return Part() if mapping is None else Part(mapping=mapping, findings=mapping.findings, notes=mapping.notes)


def observe_norms(comparison: Comparison, _found: Part = NOTHING) -> Part:
    """Find out what ran for every norm, from the profile of one pass; nothing for a backend without a profile."""
    options = comparison.options
    if not BACKENDS[options.backend].runs_fused_kernels or options.provider is not None:
        return Part()
    variants = comparison.variants
    variants.make_room()
    library = fused_library(options.backend, options.kernels)
    executions = norm_executions(
        comparison.running,
        comparison.feed(comparison.reference.inputs[0]),
        library=library,
        backend=options.backend,
        maps_weights=comparison.maps_weights,
        keep=lambda runner: variants.put(FUNCTIONS if library is None else FUSED, runner),
    )
    return Part(norms=executions)


def find_unfused(comparison: Comparison, found: Part) -> Part:
    """Name every norm that did not run as a fused kernel, if `require_fused` is set."""
    if not comparison.options.require_fused:
        return Part()
    if comparison.file.metadata.inlined:
        problem = "inlined in this file, so no kernel can replace them: export without --inline"
        return Part(findings=(Finding("norms", problem, code=FindingCode.NOT_FUSED),))
    if not found.norms:
        problem = f"backend {comparison.options.backend} cannot show that a fused kernel ran"
        return Part(findings=(Finding("norms", problem, code=FindingCode.NOT_FUSED),))
    unfused = [norm for norm in found.norms if norm.problem]
    return Part(
        findings=tuple(Finding(f"norm {norm.module}", norm.problem, code=FindingCode.NOT_FUSED) for norm in unfused)
    )
