"""The page of an analysis: kurtosis, variance and information by depth."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any, Final

from markupsafe import Markup

from ibnorm_export.analysis.report import AnalysisReport, NormAnalysis
from ibnorm_export.environment import environment
from ibnorm_export.html_page import Section, dots, histograms, render
from ibnorm_export.text_report import counted

__all__ = ["write_analysis"]

_Value = Callable[[NormAnalysis], float]

_KURTOSIS: Final = "mean excess kurtosis of a row"
_VARIANCE: Final = "variance after over before"

_KURTOSIS_BEFORE: Final[_Value] = attrgetter("kurtosis_before")
_KURTOSIS_AFTER: Final[_Value] = attrgetter("kurtosis_after")
_CONTRACTION: Final[_Value] = attrgetter("contraction")
_ABOUT_TARGET: Final[_Value] = attrgetter("about_target")
_ABOUT_INPUT: Final[_Value] = attrgetter("about_input")
_VALUE: Final[_Value] = attrgetter("bottleneck")

#: Norms whose values are shown.
_HISTOGRAMS: Final = 6

#: Figures that are compared side by side, by the name of their column.
_FIGURES: Final[Mapping[str, _Value]] = {
    "kurtosis before": _KURTOSIS_BEFORE,
    "kurtosis after": _KURTOSIS_AFTER,
    "variance": _CONTRACTION,
    "I(T; Y)": _ABOUT_TARGET,
    "I(T; X)": _ABOUT_INPUT,
    "value": _VALUE,
}

_HEAD: Final = (
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
)


def _groups(report: AnalysisReport) -> dict[str, list[NormAnalysis]]:
    """Rows by type and lambda, each in the order of the model."""
    groups: dict[str, list[NormAnalysis]] = {}
    for row in report.rows:
        name = f"{row.dtype}, " + ("the model's own lambda" if row.own else f"lambda {row.lambd:g}")
        groups.setdefault(name, []).append(row)
    return groups


def _plot(title: str, unit: str, *, lines: Mapping[str, tuple[list[NormAnalysis], _Value]]) -> Markup:
    """Figures by norm, in the order of the model."""
    modules = [row.module for row in next(iter(lines.values()))[0]]
    series = {n: [value(r) for r in rows] for n, (rows, value) in lines.items()}
    return dots(title, unit, names=modules, series=series, joined=True)


def _histograms(name: str, rows: list[NormAnalysis]) -> Section | None:
    """Values before and after compression of norms from the first to the last."""
    known = [row for row in rows if row.histogram is not None]
    places = sorted({round(index * (len(known) - 1) / max(1, _HISTOGRAMS - 1)) for index in range(_HISTOGRAMS)})
    plots = []
    for row in [known[place] for place in places] if known else []:
        assert row.histogram is not None
        shares = {"before compression": row.histogram.before, "after": row.histogram.after}
        drawn = histograms(row.module, "x - mean, in units of lambda", edges=row.histogram.ends, series=shares)
        plots.append((drawn, f"Compression {row.compression}, lambda {row.lambd:g}."))
    if not plots:
        return None
    text = (
        "Values of the rows, without their mean, before and after compression. Values beyond the axis count in its "
        "outermost bins."
    )
    if len(plots) < len(known):
        text += f" {len(plots)} of {len(known)} norms are shown, from the first to the last."
    return Section(f"Values before and after compression: {name}", (text,), plots=tuple(plots))


def _by_depth(title: str, rows: list[NormAnalysis], *, report: AnalysisReport) -> Section:
    """Plots over depth and a table of one type with one lambda."""
    plots = (
        (
            _plot(
                "Kurtosis",
                _KURTOSIS,
                lines={"before compression": (rows, _KURTOSIS_BEFORE), "after": (rows, _KURTOSIS_AFTER)},
            ),
            "0 is Gaussian; above 0 the tails are heavier.",
        ),
        (
            _plot("Variance", _VARIANCE, lines={"contraction": (rows, _CONTRACTION)}),
            "1 means that the variance does not change.",
        ),
        (
            _plot(
                "Information",
                "bits",
                lines={
                    "I(T; Y), about the target": (rows, _ABOUT_TARGET),
                    "I(T; X), about the input": (rows, _ABOUT_INPUT),
                    f"I(T; Y) - {report.beta:g} I(T; X)": (rows, _VALUE),
                },
            ),
            f"{report.samples} samples; the target is {report.target}.",
        ),
    )
    return Section(title, (), head=_HEAD, rows=tuple(map(_cells, rows)), plots=plots)


def _cells(row: NormAnalysis) -> tuple[str, ...]:
    figures = (
        row.kurtosis_before,
        row.kurtosis_after,
        row.contraction,
        row.about_target,
        row.about_input,
    )
    described = (row.module, row.compression, f"{row.lambd:g}", f"{row.deviation:#.3g}")
    return (*described, *(f"{figure:.3f}" for figure in figures), row.value_text)


def _side_by_side(groups: Mapping[str, list[NormAnalysis]]) -> Section:
    """Means over norms, one row for each type and lambda."""
    rows = tuple(
        (name, *(f"{sum(map(value, group)) / len(group):.3f}" for value in _FIGURES.values()))
        for name, group in groups.items()
    )
    plots = tuple(
        (_plot(title, unit, lines={name: (group, value) for name, group in groups.items()}), "By type and lambda.")
        for title, unit, value in (
            ("Kurtosis after compression", _KURTOSIS, _KURTOSIS_AFTER),
            ("Variance after over before", _VARIANCE, _CONTRACTION),
        )
    )
    text = (
        "Another lambda is applied to the same values: the figures describe what the norm would do to them, not a "
        "model that was trained with that lambda."
    )
    return Section("Side by side", (text,), head=("type and lambda", *_FIGURES), rows=rows, plots=plots)


def write_analysis(report: AnalysisReport, path: str | Path, *, about: Mapping[str, Any] | None = None) -> Path:
    """Write one self-contained page.

    Args:
        report: the result of `analyze`.
        path: the .html file.
        about: the environment in the footer; None describes this machine.

    Raises:
        IBNormError: the file cannot be written.
        BackendUnavailable: matplotlib is not installed.
    """
    groups = _groups(report)
    sections = [_side_by_side(groups)] if len(groups) > 1 else []
    for name, rows in groups.items():
        sections += [_by_depth(name, rows, report=report)]
        sections += [shown] if (shown := _histograms(name, rows)) else []
    method = (
        f"Matrix-based Renyi entropies of order {report.alpha:g}, Gaussian kernels (width: {report.width}), Gram "
        f"matrices of trace 1 over {report.samples} samples. X is what reaches the first norm, T is the output of a "
        f"norm, and Y is {report.target}."
    )
    sections.append(Section("Method", (method, *report.notes)))
    return render(
        path,
        f"What the norms of {report.source} do",
        verdict=None,
        summary=f"Kurtosis, variance and information of {counted(len({row.module for row in report.rows}), 'norm')}, "
        f"over {report.samples} samples.",
        sections=sections,
        environment=environment() if about is None else about,
        data=report.to_dict(),
    )
