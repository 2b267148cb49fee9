"""What comparing the user's own norms with those that are exported found."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from ibnorm_export.findings.code import FindingCode
from ibnorm_export.text_report import Report, counted
from ibnorm_export.verifier.finding import Finding, verdict_word

__all__ = ["MappingReport", "NormMapping"]


@dataclass(frozen=True, slots=True)
class NormMapping:
    """A norm of the user's own class, and what replaces it in the export.

    Args:
        module: its path in PyTorch.
        norm: the user's class.
        replacement: what it is exported as, in words.
        error: error of the replacement over all values that reached it, norm-wise relative to the user's class; both
            are computed in float64.
        tolerance: the largest error that passes.
    """

    module: str
    norm: str
    _: KW_ONLY
    replacement: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the replacement computes what the user's class does."""
        return self.error <= self.tolerance


@dataclass(frozen=True, slots=True)
class MappingReport(Report):
    """The user's own module against the one with IBNorm in place, both in float64.

    Args:
        norms: every norm of the user's own class that ran.
        idle: paths of those that did not run.
        error: largest error of an output, norm-wise relative to the user's module.
        tolerance: the largest such error that passes.
    """

    norms: tuple[NormMapping, ...]
    idle: tuple[str, ...]
    _: KW_ONLY
    error: float
    tolerance: float

    def __bool__(self) -> bool:
        return self.error <= self.tolerance and all(norm.passed for norm in self.norms)

    def __str__(self) -> str:
        worst = max((norm.error for norm in self.norms), default=0.0)
        return (
            f"mapping: {counted(len(self.norms), 'norm')} of your own classes against what is exported, in float64: "
            f"largest error of a norm {worst:.2e}, of the outputs {self.error:.2e}: {verdict_word(bool(self))}"
        )

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Every norm that is not what the user's class computes; the outputs only if no norm is."""
        failed = tuple(
            Finding(
                f"mapping of norm {norm.module}",
                f"it is exported as {norm.replacement}, whose relative error against your class {norm.norm} is "
                f"{norm.error:.3g} in float64, the tolerance is {norm.tolerance:.3g}: correct the lambda, epsilon or "
                "convention that your adapter or factory states for it",
                code=FindingCode.MAPPING_NORM,
            )
            for norm in self.norms
            if not norm.passed
        )
        if failed or self:
            return failed
        return (
            Finding(
                "mapping",
                f"the outputs of the exported module differ from those of your own module by {self.error:.3g} in "
                f"float64, the tolerance is {self.tolerance:.3g}, although every norm agrees; does your model use its "
                "norms outside their forward, for example their weights?",
                code=FindingCode.MAPPING_OUTPUTS,
            ),
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """What was not measured."""
        if not self.idle:
            return ()
        shown = ", ".join(self.idle[:5]) + (", ..." if len(self.idle) > 5 else "")
        return (f"{counted(len(self.idle), 'norm')} did not run, so their mapping is not measured: {shown}",)
