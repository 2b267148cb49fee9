"""The page of a sweep: which file to ship, the Pareto plot, and the evaluation of all files."""

from __future__ import annotations

from pathlib import Path

from markupsafe import Markup

from ibnorm_export.benchmark.statistics import CONFIDENCE, Decision
from ibnorm_export.evaluation.html import sections
from ibnorm_export.evaluation.sweep_report import SweepReport
from ibnorm_export.html_page import Point, Section, State, Verdict, render, scatter

__all__ = ["pareto_plot", "sweep_section", "write_sweep"]


def write_sweep(report: SweepReport, path: str | Path) -> Path:
    """Write one self-contained page.

    Raises:
        IBNormError: the file cannot be written.
        BackendUnavailable: matplotlib is not installed.
    """
    chosen, undecided = report.recommendation, report.decision is Decision.CANNOT_TELL
    return render(
        path,
        f"Which file to ship: {Path(report.checkpoint).name}",
        verdict=Verdict(
            State.CANNOT_TELL if undecided else State.PASS if report else State.FAIL,
            f"Ship {chosen.name}: {chosen.why}." if chosen.name else f"No file is recommended: {chosen.why}.",
        ),
        sections=[sweep_section(report), *sections(report.evaluation)],
        environment=report.evaluation.environment,
        data=report.to_dict(),
    )


def sweep_section(report: SweepReport, title: str = "Size, latency and accuracy") -> Section:
    """The table of files, the Pareto plot, and the file to ship."""
    chosen = report.recommended
    head, rows = report.table()
    text = [
        f"Recommended: {report.recommendation.name} ({chosen.path})." if chosen else "No file is recommended.",
        f"Why: {report.recommendation.why}.",
        f"Latency is {report.latency_of}, on {report.threads} thread{'s' * (report.threads > 1)}. "
        "Files on the Pareto front are those for which no other file is at least as good in size, latency and "
        "accuracy, and better in one.",
        *(f"{note[0].upper()}{note[1:]}." for note in (*report.problems(), *report.notes)),
    ]
    caption = (
        f"Down and to the left is better, and so is a small circle, whose area is the size of the file. Bars are "
        f"{CONFIDENCE:.0%} intervals; the dashed line is the largest loss that passes. Filled circles are on the "
        "Pareto front. The green ring marks the recommended file."
    )
    return Section(title, tuple(text), head=head, rows=rows, plots=((pareto_plot(report), caption),))


def pareto_plot(report: SweepReport) -> Markup:
    """Loss of accuracy over latency, with the size of each file as the area of its circle, as inline SVG."""
    largest = max((file.size_bytes for file in report.files), default=0) or 1
    points, limit, metric = [], None, "loss"
    for file in report.files:
        comparison = report.comparison_of(file.name)
        if file.problem or comparison is None:
            continue
        limit = None if comparison.max_drop is None else 100.0 * comparison.max_drop
        metric = comparison.metric
        points.append(
            Point(
                f"{file.name}, {file.size_bytes / 1e6:.3g} MB",
                file.latency_ms,
                y=100.0 * comparison.drop,
                low=100.0 * comparison.low,
                high=100.0 * comparison.high,
                area=file.size_bytes / largest,
                filled=file.on_front,
                marked=file.name == report.recommendation.name,
            )
        )
    return scatter(
        "Pareto front of size, latency and accuracy",
        f"ms, {report.latency_of}",
        y_label=f"{metric}, %",
        points=points,
        limit=limit,
    )
