"""Which implementation ran for every norm, and whether it is the required one."""

from __future__ import annotations

from collections.abc import Sequence

from ibnorm_export.runtimes.norm_executions import NormExecution, norm_executions
from ibnorm_export.runtimes.registry import BACKENDS, fused_library
from ibnorm_export.verifier.comparison import Comparison
from ibnorm_export.verifier.report import Finding

__all__ = ["find_unfused", "observe_norms"]


def observe_norms(comparison: Comparison) -> tuple[NormExecution, ...]:
    """What ran for every norm, from the profile of one pass; empty for a backend without a profile."""
    options = comparison.options
    if not BACKENDS[options.backend].runs_fused_kernels or options.provider is not None:
        return ()
    return norm_executions(
        comparison.file,
        comparison.feed(comparison.reference.inputs[0]),
        library=fused_library(options.backend, options.kernels),
        backend=options.backend,
    )


def find_unfused(comparison: Comparison, executions: Sequence[NormExecution]) -> tuple[Finding, ...]:
    """Every norm that did not run as a fused kernel, if `require_fused` is set."""
    if not comparison.options.require_fused:
        return ()
    if comparison.file.metadata.inlined:
        return (Finding("norms", "inlined in this file, so no kernel can replace them: export without --inline"),)
    if not executions:
        return (Finding("norms", f"backend {comparison.options.backend} cannot show that a fused kernel ran"),)
    return tuple(Finding(f"norm {norm.module}", norm.problem) for norm in executions if norm.problem)
