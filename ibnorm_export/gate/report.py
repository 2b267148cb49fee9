"""The result of `check`, case by case."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from ibnorm_export.evaluation.report import EvaluationReport
from ibnorm_export.gate.case import Case, Outcome
from ibnorm_export.gate.summary import SummaryRow, summary_rows, summary_table
from ibnorm_export.text_report import Report, text_table
from ibnorm_export.verifier.report import ParityReport

__all__ = ["CheckReport"]


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
        exported: the file of each export, or its folder if it generates text.
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
    exported: Mapping[str, str] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.cases) and not self.red

    def __str__(self) -> str:
        shown = [case for case in self.cases if case.outcome is not Outcome.PASS or ".layers" not in case.suite]
        lines = [f"{self.config}: {self.counts}, {self.seconds:.0f} s", *map(str, shown)]
        heads, rows = summary_table(self.summary)
        if rows:
            lines.append(text_table("", heads, rows=rows))
        lines += [f"note: {note}" for note in self.notes]
        if self.files:
            lines.append(f"written: {', '.join(self.files)}")
        return "\n".join((*lines, f"verdict: {'pass' if self else 'fail'}"))

    @property
    def red(self) -> tuple[Case, ...]:
        """The cases that make the report false."""
        return tuple(case for case in self.cases if case.red)

    @property
    def summary(self) -> tuple[SummaryRow, ...]:
        """One row for each export on each backend."""
        return summary_rows(self.cases, self.parity)

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
            "summary": [row.to_dict() for row in self.summary],
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
            "exported": dict(self.exported),
            "environment": dict(self.environment),
            "written": list(self.files),
            "notes": list(self.notes),
        }
