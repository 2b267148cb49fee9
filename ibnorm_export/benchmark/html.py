"""HTML of benchmarks: the page that compares two baselines, and the bars of a report."""

from __future__ import annotations

from pathlib import Path

from markupsafe import Markup

from ibnorm_export.benchmark.baseline import BaselineComparison
from ibnorm_export.benchmark.report import BenchReport
from ibnorm_export.html_page import Curve, Section, bars, curves, render

__all__ = ["latency_bars", "write_comparison"]


def write_comparison(comparison: BaselineComparison, path: str | Path) -> Path:
    """Write one self-contained page: every round of both baselines over the reference load, and the verdict.

    Raises:
        IBNormError: the file cannot be written.
        BackendUnavailable: matplotlib is not installed.
    """
    before, after = comparison.before, comparison.after
    lines = [
        Curve(name, range(len(baseline.ratios)), baseline.ratios) for name, baseline in (("A", before), ("B", after))
    ]
    plot = curves("Time over the reference load", "round", y_label="ratio", lines=lines)
    text = (f"A: {before.model}. B: {after.model}.", *comparison.notes)
    return render(
        path,
        "B over A",
        passed=comparison.passed,
        summary=f"B over A: {comparison.verdict}",
        sections=[Section("Rounds", text, plots=((plot, "Lower is faster."),))],
        environment=after.environment,
        verdict="" if comparison.decided else comparison.verdict.decision.value,
    )


def latency_bars(title: str, report: BenchReport) -> Markup:
    """Bars of p50, p90 and p99 of every candidate, as inline SVG."""
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
