"""One item of a check, and its outcome."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from ibnorm_export.findings.code import FindingCode

__all__ = ["Case", "Outcome"]


class Outcome(enum.StrEnum):
    """The outcome of one case. A report with a `FAIL` or an `ERROR` is false."""

    PASS = "pass"
    FAIL = "fail"
    ERROR = "error"  # an exception prevented a decision
    SKIPPED = "skipped"  # not tried, or explained by an earlier failure
    CANNOT_TELL = "cannot tell"  # too few rounds for their spread


@dataclass(frozen=True, slots=True)
class Case:
    """One item that was checked.

    Args:
        suite: where: "NAME" of the export, "NAME.BACKEND" or "NAME.BACKEND.layers".
        name: what was checked.
        outcome: the outcome.
        message: the reason or the figures, in words.
        seconds: how long it took.
        figures: the figures by name.
        code: the finding's code; None for a pass.
    """

    suite: str
    name: str
    _: KW_ONLY
    outcome: Outcome
    message: str = ""
    seconds: float = 0.0
    figures: Mapping[str, Any] = field(default_factory=dict)
    code: FindingCode | None = None

    @property
    def red(self) -> bool:
        """Whether the case failed or could not be decided because of an error."""
        return self.outcome in (Outcome.FAIL, Outcome.ERROR)

    def __str__(self) -> str:
        outcome = self.outcome.value.upper() if self.red else self.outcome.value
        text = f"{outcome:11}  {self.suite}  {self.name}"
        text = f"{text}: {self.message}" if self.message else text
        return f"{text} [{self.code}]" if self.code and self.outcome is not Outcome.SKIPPED else text
