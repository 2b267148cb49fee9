"""Plots of the pages: each function draws one kind and returns it as inline SVG."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from markupsafe import Markup

from ibnorm_export.errors import printable
from ibnorm_export.html_page.inline_svg import (
    COLOURS,
    FAIL,
    FAIL_AREA,
    INK,
    MARKERS,
    MUTED,
    PACKAGE,
    PAPER,
    PASS,
    label_of,
    new_figure,
    svg,
)
from ibnorm_export.optional_packages import import_package

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "Curve",
    "Distribution",
    "Point",
    "curves",
    "distributions",
    "dots",
    "histograms",
    "images",
    "intervals",
    "scatter",
    "tolerance_dots",
]

#: Characters of a label of a row, which shares the width with the plot.
_ROW_LIMIT: Final = 24

#: Characters of a label beside a point, and the area that a ring adds to a circle, in square points of print.
_POINT_LIMIT: Final = 32
_RING: Final = 250.0

#: Inches for one row of a plot of rows.
_ROW: Final = 0.27

#: Percentages that are drawn; those beyond are drawn at the edge.
_LEAST, _MOST = 1e-3, 1e5


@dataclass(frozen=True, slots=True)
class Curve:
    """One line of a plot, on the left axis or on the right axis."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    right: bool = False


@dataclass(frozen=True, slots=True)
class Distribution:
    """Values of one candidate, and percentiles of its single measurements (p50, p90, p99) if they are known."""

    label: str
    values: Sequence[float]
    percentiles: tuple[float, float, float] | None = None


@dataclass(frozen=True, slots=True)
class Point:
    """One point of a scatter plot.

    Args:
        label: the text beside it.
        x, y: its place.
        low, high: ends of the interval of y; infinite ends are drawn to the edge.
        area: share of the largest circle, from 0 to 1.
        filled: whether the circle is filled.
        marked: whether a ring is drawn around it.
    """

    label: str
    x: float
    _: KW_ONLY
    y: float
    low: float
    high: float
    area: float = 1.0
    filled: bool = True
    marked: bool = False


def _row_labels(names: Sequence[str]) -> list[str]:
    """Names, where one is too long without the part that all begin with, and with "…" in those that remain too long."""
    shared = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(min(names), max(names), strict=False))
    common = "".join(one for one, _ in shared) if len(set(names)) > 1 else ""
    common = common[: common.rfind(".") + 1] if max(map(len, names), default=0) > _ROW_LIMIT else ""
    labels, half = [], _ROW_LIMIT // 2
    for name in names:
        name = printable(name.removeprefix(common))
        shown = name if len(name) <= _ROW_LIMIT else f"{name[: half - 1]}…{name[-half:]}"
        labels.append(label_of(shown))
    return labels


def _legend(axis: Any, handles: Sequence[Any]) -> None:
    """A legend below the plot: inside, it would always hide something."""
    axis.figure.legend(handles=handles, loc="outside lower center", ncols=2, handlelength=1.6, columnspacing=1.2)


def _rows_axis(figure: Figure, names: Sequence[str], x_label: str) -> Any:
    """An axis with one row for each name, the first at the top."""
    axis = figure.subplots()
    axis.set_xlabel(label_of(x_label))
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.set_yticks(range(len(names)), labels=_row_labels(names))
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
    axis.grid(axis="x")
    axis.locator_params(axis="x", nbins=4)  # long numbers would run into each other
    axis.ticklabel_format(axis="x", useOffset=False)
    return axis


def curves(
    title: str,
    x_label: str,
    *,
    y_label: str,
    lines: Sequence[Curve],
    right_label: str = "",
    log: bool = False,
    log_x: bool = False,
) -> Markup:
    """Lines over a common axis, as inline SVG."""
    with new_figure(3.0, title) as figure:
        left = figure.subplots()
        right = left.twinx() if any(line.right for line in lines) else left
        if right is not left:
            right.spines["right"].set_visible(True)
            right.set_ylabel(label_of(right_label))
        handles = []
        for line, colour, marker in zip(lines, itertools.cycle(COLOURS), itertools.cycle(MARKERS), strict=False):
            handles += (right if line.right else left).plot(
                line.x,
                line.y,
                color=colour,
                marker=marker if len(line.x) <= 60 else "",
                markersize=4,
                label=label_of(line.label),
                linestyle="--" if line.right else "-",
            )
        left.set(xlabel=label_of(x_label), ylabel=label_of(y_label))
        if log:
            left.set_yscale("log")
        if log_x:
            left.set_xscale("log", base=2)
        left.grid(axis="y")
        if len(lines) > 1:
            _legend(left, handles)
        shown = "; ".join(f"{line.label} ends at {line.y[-1]:.3g}" for line in lines if len(line.y))
        return svg(figure, f"{title}, {y_label} over {x_label}. {shown}.")


def intervals(
    title: str, x_label: str, *, rows: Sequence[tuple[str, float, float, float]], limit: float | None = None
) -> Markup:
    """Estimates with their intervals, one below the other, as inline SVG.

    Args:
        title: heading of the plot.
        x_label: label of the axis of values.
        rows: (label, value, low, high) each; ends that are infinite are drawn to the edge.
        limit: value of a vertical line; None draws none.
    """
    finite = [x for _, *ends in rows for x in ends if math.isfinite(x)] + ([] if limit is None else [limit])
    edge_low, edge_high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    room = 0.05 * (edge_high - edge_low) or 0.05
    with new_figure(0.6 + 0.34 * len(rows), title) as figure:
        axis = _rows_axis(figure, [label for label, *_ in rows], x_label)
        for y, ((_, value, low, high), colour) in enumerate(zip(rows, itertools.cycle(COLOURS), strict=False)):
            shown = max(low, edge_low - room), min(high, edge_high + room)
            axis.plot(shown, (y, y), color=colour, linewidth=2.5, solid_capstyle="round")
            if math.isfinite(value):
                axis.plot(value, y, color=colour, marker="o", markersize=7)
        if limit is not None:
            axis.axvline(limit, color=FAIL, linestyle="--", linewidth=1.2)
        axis.set_xlim(edge_low - room, edge_high + room)
        stated = "; ".join(f"{name} {value:.4g} ({low:.4g} to {high:.4g})" for name, value, low, high in rows)
        return svg(figure, f"{title} in {x_label}: {stated}.")


def scatter(title: str, x_label: str, *, y_label: str, points: Sequence[Point], limit: float | None = None) -> Markup:
    """Points with intervals, as inline SVG; the area of each circle is a third figure.

    Args:
        title: heading of the plot.
        x_label, y_label: labels of the axes; both begin at the data.
        points: what is drawn; those without a finite place are left out.
        limit: value of a horizontal line; None draws none.
    """
    points = [point for point in points if math.isfinite(point.x) and math.isfinite(point.y)]
    heights = [end for p in points for end in (p.y, p.low, p.high) if math.isfinite(end)]
    heights += [] if limit is None else [limit]
    bottom, top = (min(heights), max(heights)) if heights else (0.0, 1.0)
    widths = [point.x for point in points] or [0.0, 1.0]
    room_y, room_x = 0.2 * (top - bottom) or 0.05, 0.2 * (max(widths) - min(widths)) or 0.05 * abs(max(widths)) or 1.0
    with new_figure(3.6, title) as figure:
        axis = figure.subplots()
        axis.set_xlim(min(widths) - room_x, max(widths) + room_x)
        axis.set_ylim(bottom - room_y, top + room_y)
        for point, colour in zip(points, itertools.cycle(COLOURS), strict=False):
            ends = max(point.low, bottom - room_y), min(point.high, top + room_y)
            axis.plot((point.x, point.x), ends, color=colour, linewidth=1.5, alpha=0.6)
            size, inside = _circle(point), colour if point.filled else PAPER
            axis.scatter(point.x, point.y, s=size, facecolor=inside, edgecolor=colour, linewidth=1.5, zorder=3)
            if point.marked:
                ring: dict[str, Any] = {"facecolor": "none", "edgecolor": PASS, "linewidth": 2}
                axis.scatter(point.x, point.y, s=size + _RING, zorder=4, **ring)
        if limit is not None:
            axis.axhline(limit, color=FAIL, linestyle="--", linewidth=1.2)
        axis.set(xlabel=label_of(x_label), ylabel=label_of(y_label))
        axis.grid()
        figure.canvas.draw()  # places of labels follow from the final layout
        for point, (x, y) in zip(points, _label_places(axis, points), strict=True):
            style: dict[str, Any] = {"va": "center", "ha": "left" if x > 0 else "right", "zorder": 5}
            if y:  # a line to the point, where the label is not beside it
                end = (0.0 if x > 0 else 1.0, 0.5)
                style["arrowprops"] = {"arrowstyle": "-", "color": MUTED, "linewidth": 0.8, "relpos": end}
            label = label_of(point.label, _POINT_LIMIT)
            axis.annotate(label, (point.x, point.y), xytext=(x, y), textcoords="offset points", **style)
        stated = "; ".join(f"{point.label} at {point.x:.3g}, {point.y:.3g}" for point in points)
        return svg(figure, f"{title}, {y_label} over {x_label}: {stated}.")


def _circle(point: Point) -> float:
    """The area of a circle in square points of print."""
    return 30.0 + 270.0 * point.area


def _label_places(axis: Any, points: Sequence[Point]) -> list[tuple[float, float]]:
    """Offsets of labels from their points, in points of print, so that none covers another one, a circle or an axis.

    A label stands on the side of its circle that has more room, and is moved up or down where the place is taken.
    """
    scale = 72.0 / axis.figure.dpi
    box = axis.get_window_extent()
    places = [[float(value) * scale for value in axis.transData.transform((p.x, p.y))] for p in points]
    radii = [math.sqrt((_circle(point) + _RING * point.marked) / math.pi) for point in points]
    half, found = 6.0, []
    bottom, top = box.y0 * scale + half, box.y1 * scale - half
    steps = sorted(range(-20, 21), key=lambda step: (abs(step), -step))  # 0, 1, -1, 2, -2 and so on
    taken = [(x - radius, x + radius, y, radius) for (x, y), radius in zip(places, radii, strict=True)]
    for point, (x, y), radius in zip(points, places, radii, strict=True):
        away, width = 5.0 + radius, 5.6 * len(label_of(point.label, _POINT_LIMIT))
        right = x <= (box.x0 + box.x1) / 2.0 * scale
        begin = x + away if right else x - away - width
        for step in steps:
            middle = y + step * 2.0 * half
            if bottom <= middle <= top and all(
                abs(middle - m) >= half + height or begin + width < left or begin > end
                for left, end, m, height in taken
            ):
                break
        taken.append((begin, begin + width, middle, half))
        found.append((away if right else -away, middle - y))
    return found


def dots(
    title: str,
    x_label: str,
    *,
    names: Sequence[str],
    series: Mapping[str, Sequence[float]],
    log: bool = False,
    joined: bool = False,
) -> Markup:
    """Values by name, one row each, as inline SVG.

    Args:
        title: heading of the plot.
        x_label: label of the axis of values.
        names: one row each, in the given order.
        series: values by the name of the series, each with its own marker.
        log: whether the axis is logarithmic.
        joined: whether a line joins the values of a series, for names in an order such as the depth of a model.
    """
    with new_figure(1.1 + _ROW * len(names), title) as figure:
        axis = _rows_axis(figure, names, x_label)
        handles: list[Any] = []
        for (name, values), colour, marker in zip(
            series.items(), itertools.cycle(COLOURS), itertools.cycle(MARKERS), strict=False
        ):
            style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 5, "linewidth": 0.8}
            if not joined:  # without a fill and of growing size, equal values of several series are seen
                style |= {"linewidth": 0.0, "markersize": 5 + 3 * min(len(handles), 3)}
                style |= {"fillstyle": "none", "markeredgewidth": 1.5}
            handles += axis.plot(values, range(len(names)), label=label_of(name), **style)
        if log:
            axis.set_xscale("log")
        if len(series) > 1:
            _legend(axis, handles)
        ranges = "; ".join(f"{name} from {min(v):.3g} to {max(v):.3g}" for name, v in series.items() if len(v))
        return svg(figure, f"{title}, {x_label} by name. {ranges}.")


def _percent(value: float) -> float:
    """A percentage within what is drawn."""
    return min(max(value, _LEAST), _MOST)


def tolerance_dots(
    title: str, *, names: Sequence[str], series: Mapping[str, Sequence[float]], baseline: Sequence[float] = ()
) -> Markup:
    """Errors in percent of their tolerance on a logarithmic axis: red to the right of 100%, green to the left.

    Args:
        title: heading of the plot.
        names: one row each, in the given order.
        series: percentages by the way of running, each with its own marker; NaN is not drawn.
        baseline: percentages of the baseline error, drawn in grey; empty draws none.
    """
    lines_of = import_package("matplotlib.lines", **PACKAGE).Line2D
    drawn = [_percent(value) for values in (*series.values(), baseline) for value in values if value == value]
    low, high = min([*drawn, 10.0]) / 2, max([*drawn, 100.0]) * 3
    legend = [(name, INK, marker) for name, marker in zip(series, itertools.cycle(MARKERS), strict=False)]
    with new_figure(1.1 + _ROW * len(names), title) as figure:
        axis = _rows_axis(figure, names, "error in % of the tolerance")
        axis.set_xscale("log")
        axis.set_xlim(low, high)
        axis.axvspan(100.0, high, color=FAIL_AREA, linewidth=0)
        axis.axvline(100.0, color=FAIL, linewidth=1.2)
        if baseline:
            shown = [_percent(value) for value in baseline]
            axis.plot(shown, range(len(names)), linestyle="", marker="|", color=MUTED, markersize=9)
            legend.append(("baseline error", MUTED, "|"))
        for (_, values), marker in zip(series.items(), itertools.cycle(MARKERS), strict=False):
            for y, value in enumerate(values):
                if value == value:
                    axis.plot(_percent(value), y, marker=marker, color=FAIL if value > 100.0 else PASS, markersize=6)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}%")
        for index, tick in enumerate(axis.get_yticklabels()):
            if any(values[index] > 100.0 for values in series.values()):
                tick.set_color(FAIL)
                tick.set_fontweight("bold")
        handles = [lines_of([], [], linestyle="", marker=m, color=c, label=label_of(name)) for name, c, m in legend]
        _legend(axis, handles)
        return svg(figure, f"{title}: {_excesses(names, series)}")


def _excesses(names: Sequence[str], series: Mapping[str, Sequence[float]]) -> str:
    """What the dots show, in words."""
    found = [
        (value, name) for values in series.values() for value, name in zip(values, names, strict=True) if value == value
    ]
    over = sum(value > 100.0 for value, _ in found)
    value, name = max(found, default=(0.0, "none"))
    largest = f"the largest is {value:.3g}% ({name})"
    return f"{over} of {len(found)} errors are above 100% of the tolerance; {largest}."


def distributions(title: str, x_label: str, *, rows: Sequence[Distribution]) -> Markup:
    """Every value as a dot, one row for each candidate; bars from p50 to p90 and to p99, as inline SVG."""
    lines_of = import_package("matplotlib.lines", **PACKAGE).Line2D
    with new_figure(0.9 + 0.55 * len(rows), title) as figure:
        axis = _rows_axis(figure, [row.label for row in rows], x_label)
        for y, (row, colour) in enumerate(zip(rows, itertools.cycle(COLOURS), strict=False)):
            if row.percentiles is not None:
                p50, p90, p99 = row.percentiles
                axis.plot((p50, p99), (y + 0.2, y + 0.2), color=colour, linewidth=1.2)
                axis.plot((p50, p90), (y + 0.2, y + 0.2), color=colour, linewidth=5, solid_capstyle="butt")
                axis.plot(p50, y + 0.2, color=colour, marker="|", markersize=11, markeredgewidth=2)
            # a fixed pattern in place of random jitter: equal data gives equal bytes
            places = [y - 0.12 + 0.16 * (((7 * index) % 11) / 10 - 0.5) for index in range(len(row.values))]
            axis.plot(row.values, places, linestyle="", marker="o", color=colour, markersize=3.5, alpha=0.6)
        axis.set_xlim(left=0.0)
        dot = lines_of([], [], linestyle="", marker="o", color=MUTED, markersize=4, label="median of a round")
        handles = [dot] if any(len(row.values) for row in rows) else []
        if any(row.percentiles is not None for row in rows):
            handles.append(lines_of([], [], color=MUTED, linewidth=5, label="p50 to p90, line to p99"))
        if handles:
            _legend(axis, handles)
        stated = "; ".join(f"{row.label} median {np.median(row.values):.3g}" for row in rows if len(row.values))
        return svg(figure, f"{title} in {x_label}: {stated}.")


def histograms(title: str, x_label: str, *, edges: Sequence[float], series: Mapping[str, Sequence[float]]) -> Markup:
    """Shares of values by bin, one outline for each series, as inline SVG.

    Args:
        title: heading of the plot.
        x_label: label of the axis of values.
        edges: ends of the bins, one more than the shares.
        series: share of the values in each bin, by name.
    """
    with new_figure(2.3, title) as figure:
        axis = figure.subplots()
        axis.set(xlabel=label_of(x_label), ylabel="share of values")
        axis.grid(axis="y")
        handles = []
        for (name, shares), colour, dashes in zip(
            series.items(), itertools.cycle(COLOURS), itertools.cycle(("--", "-", ":")), strict=False
        ):
            handles.append(
                axis.stairs(shares, edges, color=colour, linestyle=dashes, linewidth=1.6, label=label_of(name))
            )
            axis.stairs(shares, edges, color=colour, fill=True, alpha=0.12, linewidth=0)
        axis.locator_params(axis="x", nbins=5)
        axis.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
        _legend(axis, handles)
        peaks = "; ".join(f"{name} has its peak at {_peak(edges, shares):.2g}" for name, shares in series.items())
        return svg(figure, f"{title}: histogram over {x_label}. {peaks}.")


def _peak(edges: Sequence[float], shares: Sequence[float]) -> float:
    index = int(np.argmax(shares))
    return (edges[index] + edges[index + 1]) / 2


def images(title: str, *, pictures: Sequence[tuple[Any, str, bool]], columns: int = 6) -> Markup:
    """Grey pictures with a line of text below each, in green if it is right and in red if it is wrong.

    Args:
        title: heading of the plot.
        pictures: (values (height, width) with the largest drawn darkest, text, whether the text is right) each.
        columns: pictures in a row.
    """
    rows = max(1, math.ceil(len(pictures) / columns))
    with new_figure(0.1 + 0.85 * rows, title) as figure:
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for axis in grid:
            axis.set_axis_off()
        for axis, (values, text, right) in zip(grid, pictures, strict=False):
            axis.imshow(np.asarray(values), cmap="Greys", interpolation="nearest")
            sign = "✓" if right else "✗"
            axis.set_title(f"{sign} {label_of(text, 12)}", fontsize=10, y=-0.32, color=PASS if right else FAIL)
        right_ones = sum(right for *_, right in pictures)
        return svg(figure, f"{title}: {right_ones} of {len(pictures)} pictures are recognised.")
