"""The result of `check`, case by case."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from ibnorm_export.evaluation.report import EvaluationReport
from ibnorm_export.findings.code import FindingCode
from ibnorm_export.text_report import Report
from ibnorm_export.verifier.report import ParityReport

__all__ = ["Case", "CheckReport", "Outcome"]


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
        return f"{text} [{self.code}]" if self.red and self.code else text


@dataclass(frozen=True, slots=True)
class CheckReport(Report):
    """All cases in the order in which they were tried; true when there are some and none of them is red.

    Args:
        config: the file that was checked.
        cases: the cases.
        parity: report of every comparison, by export and backend.
        environment: machine and package versions.
        seconds: how long it took.
        evaluations: report of every evaluation, by export, task and data.
        files: the report files that were written.
        notes: remarks on the report files.
    """

    config: str
    cases: tuple[Case, ...]
    _: KW_ONLY
    parity: Mapping[str, ParityReport]
    environment: Mapping[str, Any]
    seconds: float
    evaluations: Mapping[str, EvaluationReport] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.cases) and not self.red

    def __str__(self) -> str:
        shown = [case for case in self.cases if case.outcome is not Outcome.PASS or ".layers" not in case.suite]
        lines = [f"{self.config}: {self.counts}, {self.seconds:.0f} s", *map(str, shown)]
        lines += [f"note: {note}" for note in self.notes]
        if self.files:
            lines.append(f"written: {', '.join(self.files)}")
        return "\n".join((*lines, f"verdict: {'pass' if self else 'fail'}"))

    @property
    def red(self) -> tuple[Case, ...]:
        """The cases that make the report false."""
        return tuple(case for case in self.cases if case.red)

    @property
    def counts(self) -> str:
        """How many cases have which outcome, e.g. "12 pass, 1 fail"."""
        counted = Counter(case.outcome for case in self.cases)
        return ", ".join(f"{counted[outcome]} {outcome.value}" for outcome in Outcome if counted[outcome])

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "verdict": "pass" if self else "fail",
            "config": self.config,
            "seconds": self.seconds,
            "cases": [
                {
                    "suite": case.suite,
                    "name": case.name,
                    "outcome": case.outcome.value,
                    "code": None if case.code is None else case.code.value,
                    "message": case.message,
                    "seconds": case.seconds,
                    "figures": dict(case.figures),
                }
                for case in self.cases
            ],
            "parity": {name: report.to_dict() for name, report in self.parity.items()},
            "evaluations": {name: report.to_dict() for name, report in self.evaluations.items()},
            "environment": dict(self.environment),
            "written": list(self.files),
            "notes": list(self.notes),
        }
