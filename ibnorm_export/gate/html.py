"""The page of a check: the verdict, failures by cause, a summary of every export on every backend, and all cases."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

from ibnorm_export.evaluation.html import sections as evaluation_sections
from ibnorm_export.gate.case import Case, Outcome
from ibnorm_export.gate.report import CheckReport
from ibnorm_export.gate.summary import summary_table
from ibnorm_export.html_page import Section, State, Verdict, demand_plots, render
from ibnorm_export.text_report import counted, ratio_text
from ibnorm_export.verifier.causes import next_steps
from ibnorm_export.verifier.html import sections

__all__ = ["page_verdict", "write_page"]

#: The order of the table of cases: what needs attention first.
_ORDER: Final = {
    outcome: rank
    for rank, outcome in enumerate((Outcome.FAIL, Outcome.ERROR, Outcome.CANNOT_TELL, Outcome.SKIPPED, Outcome.PASS))
}

#: What differs between messages of one cause.
_PARTICULAR: Final = re.compile(r"\S*\d\S*")

#: Reasons that the verdict lists.
_REASONS: Final = 5


def write_page(report: CheckReport, path: Path) -> None:
    """Write the page.

    Raises:
        IBNormError: the file cannot be written.
        BackendUnavailable: matplotlib is not installed.
    """
    demand_plots()
    parts = [*_failures(report), *_summary(report), _cases(report)]
    for name, parity in report.parity.items():
        parts += [replace(section, title=f"{name}: {section.title}") for section in sections(parity)]
    for name, evaluation in report.evaluations.items():
        parts += [replace(part, title=f"{name}: {part.title}") for part in evaluation_sections(evaluation)]
    render(
        path,
        "IBNorm export check",
        verdict=page_verdict(report),
        summary=f"{report.counts}; `{report.config}`, {report.seconds:.0f} s.",
        sections=parts,
        environment=report.environment,
        data=report.to_dict(),
    )


def _causes(report: CheckReport) -> list[list[Case]]:
    """Red cases grouped by what their messages state: first what is wrong in a file itself, then the largest group."""
    groups: dict[tuple[str | None, str], list[Case]] = {}
    for case in report.red:
        groups.setdefault((case.code, _PARTICULAR.sub("", case.message)), []).append(case)
    return sorted(groups.values(), key=lambda group: (not group[0].suite.endswith(".static"), -len(group)))


def page_verdict(report: CheckReport) -> Verdict:
    """The verdict of the page: what is red, why, and what to do.

    A check that has undecided cases passes, since "cannot tell" is not a failure, but its page does not show a pass.
    """
    undecided = [case for case in report.cases if case.outcome is Outcome.CANNOT_TELL]
    if report.red:
        groups = _causes(report)
        reasons = tuple(_reason(group) for group in groups[:_REASONS])
        steps = tuple(dict.fromkeys(step for parity in report.parity.values() for step in next_steps(parity)))
        summary = (
            f"{len(report.red)} of {counted(len(report.cases), 'case')} failed, for {counted(len(groups), 'reason')}."
        )
        return Verdict(State.FAIL, summary, reasons=reasons, next_steps=steps)
    if not report.cases:
        return Verdict(State.FAIL, "Nothing was checked.", next_steps=(f"Name an export in `{report.config}`.",))
    if undecided:
        summary = f"Nothing failed, but {counted(len(undecided), 'case')} could not be decided."
        step = "Measure more rounds (`max_rounds`) or samples, on a machine that does nothing else."
        reasons = tuple(_reason([case]) for case in undecided[:_REASONS])
        return Verdict(State.CANNOT_TELL, summary, reasons=reasons, next_steps=(step,))
    return Verdict(State.PASS, f"Nothing failed in {counted(len(report.cases), 'case')}.")


def _reason(group: list[Case]) -> str:
    first, *others = group
    text = f"{first.suite}, {first.name}: {first.message}" if first.message else f"{first.suite}, {first.name}"
    text = f"{text} [{first.code}]" if first.code else text
    return f"{text}. The same in {counted(len(others), 'other case')}." if others else text


def _failures(report: CheckReport) -> Iterator[Section]:
    rows = tuple(
        (
            str(number),
            "" if case.code is None else case.code.value,
            case.suite,
            case.name,
            case.outcome.value,
            case.message,
        )
        for number, group in enumerate(_causes(report), 1)
        for case in group
    )
    if rows:
        text = "Cases with the same cause have the same number."
        yield Section("Failures", (text,), head=("cause", "code", "where", "what", "outcome", "message"), rows=rows)


def _summary(report: CheckReport) -> Iterator[Section]:
    """One row for each export on each backend."""
    head, rows = summary_table(report.summary)
    if rows:
        text = (
            "The error is the largest of an output, in percent of its tolerance. MB is the file with its weights, and "
            "ms the median time of a pass, where a budget asks for one."
        )
        yield Section("Exports and backends", (text,), head=head, rows=tuple(rows))
    times = [
        (case.suite, case.name, case.outcome.value, ratio_text(case.figures["ratio"]))
        for case in report.cases
        if "ratio" in case.figures
    ]
    if times:
        about = "Times over what each budget compares them with: below 1 is faster."
        yield Section("Latency", (about,), head=("where", "what", "outcome", "ratio"), rows=tuple(times))


def _cases(report: CheckReport) -> Section:
    ordered = sorted(report.cases, key=lambda case: _ORDER[case.outcome])
    rows = tuple((c.outcome.value, c.suite, c.name, c.message, f"{c.seconds:.2f}") for c in ordered)
    return Section(
        "All cases", (f"{report.counts}.",), head=("outcome", "where", "what", "message", "seconds"), rows=rows
    )
