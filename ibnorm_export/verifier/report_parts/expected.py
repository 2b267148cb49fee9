"""What comparing with values that the training code saved found."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from ibnorm_export.text_report import Report, text_table
from ibnorm_export.verifier.finding import Finding, verdict_word

__all__ = ["ExpectedParity", "ExpectedReport"]


@dataclass(frozen=True, slots=True)
class ExpectedParity:
    """One output against the value that the training code saved. The error is norm-wise relative to that value.

    Args:
        output: its name.
        what: what was compared: the checkpoint in float64, or the file.
        error: its error.
        tolerance: the largest error that passes.
    """

    output: str
    what: str
    _: KW_ONLY
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance."""
        return self.error <= self.tolerance


@dataclass(frozen=True, slots=True)
class ExpectedReport(Report):
    """A checkpoint and a file against values that the training code saved; true when all pass.

    Args:
        path: the file of values.
        dtype: the type that the training code computed in.
        rows: what was compared.
        findings: what is wrong.
    """

    path: str
    dtype: str
    _: KW_ONLY
    rows: tuple[ExpectedParity, ...]
    findings: tuple[Finding, ...]

    def __bool__(self) -> bool:
        return bool(self.rows) and all(row.passed for row in self.rows) and not self.findings

    def __str__(self) -> str:
        rows = [
            (row.output, row.what, f"{row.error:.2e}", f"{row.tolerance:.2e}", verdict_word(row.passed))
            for row in self.rows
        ]
        title = f"against {self.path}, which the training code computed in {self.dtype}"
        return text_table(title, ("output", "", "rel. error", "tolerance", ""), rows=rows) if rows else ""
