"""The steps of a numeric verdict: each takes the comparison and what is known so far, and returns what it adds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import KW_ONLY, Field, dataclass, fields
from typing import Any

from ibnorm_export.runtimes.norm_executions import NormExecution
from ibnorm_export.verifier.comparison import Comparison
from ibnorm_export.verifier.finding import Finding
from ibnorm_export.verifier.report import (
    ErrorAttribution,
    LayersReport,
    MappingReport,
    NumericReport,
    OutputParity,
    Quality,
)

__all__ = ["NOTHING", "Part", "Step", "run_steps"]


@dataclass(frozen=True, slots=True)
class Part:
    """What a step adds to a numeric report. It has a field for each part of the report, and most are empty.

    Args:
        method: what was run, in words.
        samples: how many inputs were compared.
        outputs, findings, notes, ran, not_run, norms, quality: as in `NumericReport`; those of later steps follow.
        attribution, mapping, layers, exact: as in `NumericReport`.
        explained: whether a finding names the cause, so that no step of the export is responsible.
    """

    method: str = ""
    samples: int = 0
    _: KW_ONLY
    outputs: tuple[OutputParity, ...] = ()
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()
    ran: tuple[str, ...] = ()
    not_run: tuple[str, ...] = ()
    norms: tuple[NormExecution, ...] = ()
    quality: tuple[Quality, ...] = ()
    attribution: ErrorAttribution | None = None
    mapping: MappingReport | None = None
    layers: LayersReport | None = None
    exact: NumericReport | None = None
    explained: bool = False

    def __add__(self, later: Part) -> Part:
        """Both parts: lists are joined, and anything else is that of the later part if it has one."""
        return Part(**{f.name: self._join(later, f) for f in fields(self)})

    def _join(self, later: Part, part: Field[Any]) -> Any:
        old, new = getattr(self, part.name), getattr(later, part.name)
        if isinstance(old, tuple):
            return (*old, *new)
        return old if new == part.default else new

    def report(self, comparison: Comparison) -> NumericReport:
        """The report of these parts."""
        stored = comparison.file.metadata.quantization
        return NumericReport(
            comparison.options.backend,
            f"int{stored.bits}" if stored else comparison.reference.dtype.value,
            coverage=comparison.options.coverage,
            **{f.name: getattr(self, f.name) for f in fields(self) if f.name != "explained"},
        )


#: What is known before the first step.
NOTHING = Part()

#: A step of the verdict. It gets what the steps before it have added.
Step = Callable[[Comparison, Part], Part]


def run_steps(comparison: Comparison, steps: Iterable[Step]) -> Part:
    """Run some steps in turn, and close what they have opened.

    Args:
        comparison: what is compared.
        steps: the steps.
    """
    found = NOTHING
    try:
        for step in steps:
            found += step(comparison, found)
    finally:
        comparison.variants.close()
    return found
