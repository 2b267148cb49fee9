"""AnalysisReport -> one self-contained page: kurtosis, variance and information by depth."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ibnorm_export.analysis.norms import AnalysisReport, LayerAnalysis
from ibnorm_export.environment import environment
from ibnorm_export.html_page import Curve, Section, curves, render

__all__ = ["write_analysis"]

_Value = Callable[[LayerAnalysis], float]


def _groups(report: AnalysisReport) -> dict[str, list[LayerAnalysis]]:
    """Rows by type and lambda, each in the order of the model."""
    groups: dict[str, list[LayerAnalysis]] = {}
    for row in report.rows:
        name = f"{row.dtype}, " + ("the model's own lambda" if row.own else f"lambda {row.lambd:g}")
        groups.setdefault(name, []).append(row)
    return groups


def _plot(title: str, unit: str, *, lines: Mapping[str, tuple[list[LayerAnalysis], _Value]]) -> Markup:
    made = [Curve(name, list(range(len(rows))), [value(r) for r in rows]) for name, (rows, value) in lines.items()]
    return curves(title, "norms, in the order of the model", y_label=unit, lines=made)


def _depth(name: str, rows: list[LayerAnalysis], *, report: AnalysisReport) -> Section:
    """One type with one lambda."""
    kurtosis = _plot(
        "Kurtosis",
        "mean excess kurtosis of a row",
        lines={
            "before compression": (rows, lambda r: r.kurtosis_before),
            "after": (rows, lambda r: r.kurtosis_after),
        },
    )
    variance = _plot("Variance", "variance after over before", lines={"contraction": (rows, lambda r: r.contraction)})
    information = _plot(
        "Information",
        "bits",
        lines={
            "I(T; Y), about the target": (rows, lambda r: r.about_target),
            "I(T; X), about the input": (rows, lambda r: r.about_input),
            f"I(T; Y) - {report.beta:g} I(T; X)": (rows, lambda r: r.bottleneck),
        },
    )
    table = tuple(
        (
            r.module,
            r.compression,
            f"{r.lambd:g}",
            f"{r.deviation:.3g}",
            f"{r.kurtosis_before:.3f}",
            f"{r.kurtosis_after:.3f}",
            f"{r.contraction:.3f}",
            f"{r.about_target:.3f}",
            f"{r.about_input:.3f}",
            f"{r.bottleneck:.3f}",
        )
        for r in rows
    )
    return Section(
        name,
        (),
        head=(
            "norm",
            "kind",
            "lambda",
            "deviation",
            "kurtosis before",
            "after",
            "variance",
            "I(T; Y)",
            "I(T; X)",
            "value",
        ),
        rows=table,
        plots=(
            (kurtosis, "0 is Gaussian, above has heavier tails."),
            (variance, "1 leaves the variance as it is."),
            (information, f"{report.samples} samples; the target is {report.target}."),
        ),
    )


def _side_by_side(groups: Mapping[str, list[LayerAnalysis]]) -> Section:
    """Means over norms, one row a type and lambda."""
    values: dict[str, _Value] = {
        "kurtosis before": lambda r: r.kurtosis_before,
        "kurtosis after": lambda r: r.kurtosis_after,
        "variance": lambda r: r.contraction,
        "I(T; Y)": lambda r: r.about_target,
        "I(T; X)": lambda r: r.about_input,
        "value": lambda r: r.bottleneck,
    }
    rows = tuple(
        (name, *(f"{sum(map(value, group)) / len(group):.3f}" for value in values.values()))
        for name, group in groups.items()
    )
    plots = (
        (
            _plot(
                "Kurtosis after compression",
                "mean excess kurtosis of a row",
                lines={name: (group, values["kurtosis after"]) for name, group in groups.items()},
            ),
            "By type and lambda.",
        ),
        (
            _plot(
                "Variance after over before",
                "variance after over before",
                lines={name: (group, values["variance"]) for name, group in groups.items()},
            ),
            "By type and lambda.",
        ),
    )
    text = "Another lambda is applied to the same values: what the norm would do here, not what training with it gives."
    return Section("Side by side", (text,), head=("type and lambda", *values), rows=rows, plots=plots)


def write_analysis(report: AnalysisReport, path: str | Path, *, about: Mapping[str, Any] | None = None) -> Path:
    """Write the page.

    Args:
        report: of `analyze_checkpoint` or `analyze_file`.
        path: the .html file.
        about: the environment in the footer; None is this machine's.

    Raises:
        IBNormError: the file cannot be written.
    """
    groups = _groups(report)
    parts = [_side_by_side(groups)] if len(groups) > 1 else []
    parts += [_depth(name, rows, report=report) for name, rows in groups.items()]
    how = (
        f"Matrix-based Renyi entropies of order {report.alpha:g}, Gaussian kernel of width {report.width}, Gram "
        f"matrices of trace 1 over {report.samples} samples. X is what reaches the first norm, T a norm's output, Y "
        f"{report.target}."
    )
    parts.append(Section("How", (how, *report.notes)))
    footer = environment() if about is None else about
    return render(
        path, f"What the norms of {report.source} do", passed=True, summary=how, sections=parts, environment=footer
    )
