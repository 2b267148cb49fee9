"""Two baselines -> one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from ibnorm_export.benchmark.baseline import Baseline
from ibnorm_export.benchmark.measure import BenchReport
from ibnorm_export.benchmark.statistics import Decision, LatencyVerdict
from ibnorm_export.html_page import Curve, Section, bars, curves, render

__all__ = ["latency_bars", "write_comparison"]


def write_comparison(
    before: Baseline, after: Baseline, *, verdict: LatencyVerdict, notes: Sequence[str], path: str | Path
) -> Path:
    """Write the page: every round of both over its yardstick, and the verdict.

    Raises:
        IBNormError: the file cannot be written.
    """
    lines = [Curve(name, range(len(kept.ratios)), kept.ratios) for name, kept in (("A", before), ("B", after))]
    plot = curves("Time over the yardstick", "round", y_label="ratio", lines=lines)
    section = Section("Rounds", (f"A: {before.model}. B: {after.model}.", *notes), plots=((plot, "Lower is faster."),))
    passed = verdict.decision is not Decision.FAIL
    return render(
        path,
        "B over A",
        passed=passed,
        summary=f"B over A: {verdict}",
        sections=[section],
        environment=after.environment,
    )


def latency_bars(title: str, report: BenchReport) -> Markup:
    """p50, p90 and p99 of every contender."""
    return bars(
        title,
        "ms per pass",
        groups=[latency.name for latency in report.latencies],
        series={
            "p50": [latency.p50_ms for latency in report.latencies],
            "p90": [latency.p90_ms for latency in report.latencies],
            "p99": [latency.p99_ms for latency in report.latencies],
        },
    )
