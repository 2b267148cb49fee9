"""A self-contained HTML page with plots: it loads nothing, its only script sorts, and equal data gives equal bytes."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import jinja2
from markupsafe import Markup

from ibnorm_export.errors import IBNormError, printable, shortened
from ibnorm_export.files import Kind, new_file
from ibnorm_export.optional_packages import demand_package, import_package

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "PAGE",
    "Curve",
    "Point",
    "Section",
    "bars",
    "curves",
    "demand_plots",
    "heat_map",
    "intervals",
    "render",
    "scatter",
]

_BLUE, _ORANGE, _GREY, _RED = "#2563eb", "#d97706", "#9ca3af", "#dc2626"
_COLOURS = (_BLUE, _ORANGE, _GREY, _RED, "#059669", "#7c3aed", "#0891b2", "#be185d")

_STYLE = {
    "svg.hashsalt": "ibnorm-export",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
}

#: The pages of this package, of which a later one may take the place.
PAGE: Final = Kind.marked("a page of ibnorm-export", b'<meta name="generator" content="ibnorm-export">')

#: Characters of a label of a plot, and of a cell or paragraph of the page.
_LABEL_LIMIT: Final = 60
_CELL_LIMIT: Final = 2000

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="generator" content="ibnorm-export">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
 body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 62rem; padding: 1rem; color: #111827; }
 h1, h2, p, footer { overflow-wrap: anywhere; }
 h1 { margin-bottom: .2rem; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #e5e7eb; }
 .verdict { display: inline-block; padding: .1rem .6rem; border-radius: .3rem; color: #fff; font-weight: 600; }
 .pass { background: #15803d; } .fail { background: #b91c1c; } .neither { background: #b45309; }
 .scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; }
 th, td { padding: .25rem .5rem; text-align: right; border-bottom: 1px solid #e5e7eb; white-space: nowrap; }
 th:first-child, td:first-child { text-align: left; } th { cursor: pointer; }
 th[aria-sort=ascending]::after { content: " ▲"; } th[aria-sort=descending]::after { content: " ▼"; }
 td.long { white-space: normal; min-width: 18rem; text-align: left; }
 .plots { display: flex; flex-wrap: wrap; gap: 1rem; } .plots figure { margin: 0; flex: 1 1 24rem; min-width: 0; }
 svg { max-width: 100%; height: auto; } figcaption, .note { color: #4b5563; font-size: .85rem; }
 footer { margin-top: 3rem; color: #6b7280; font-size: .8rem; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p><span class="verdict {{ colour }}">{{ verdict }}</span> {{ summary }}</p>
{% for section in sections %}
<h2>{{ section.title }}</h2>
{% for paragraph in section.text %}<p>{{ paragraph }}</p>
{% endfor %}
{% if section.rows %}
<div class="scroll"><table>
<thead><tr>{% for head in section.head %}<th tabindex="0">{{ head }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in section.rows %}<tr>{% for cell in row -%}
<td{% if cell|length > 60 %} class="long"{% endif %}>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
{% endif %}
{% if section.plots %}<div class="plots">
{% for plot, caption in section.plots %}<figure>{{ plot }}<figcaption>{{ caption }}</figcaption></figure>
{% endfor %}</div>{% endif %}
{% endfor %}
<footer>{% for key, value in environment.items() %}{{ key }}: {{ value }}{% if not loop.last %} &middot; {% endif %}
{% endfor %}</footer>
<script>
// A click on a heading sorts its table, ascending first, then descending; numbers sort as numbers.
for (const th of document.querySelectorAll("th")) {
  const sort = () => {
    const up = th.getAttribute("aria-sort") !== "ascending";
    const text = row => row.cells[th.cellIndex].textContent.trim();
    const compare = (a, b) => {
      const difference = parseFloat(a) - parseFloat(b);
      return isNaN(difference) ? a.localeCompare(b) : difference;
    };
    for (const other of th.parentNode.cells) other.removeAttribute("aria-sort");
    th.setAttribute("aria-sort", up ? "ascending" : "descending");
    const body = th.closest("table").tBodies[0];
    body.append(...[...body.rows].sort((a, b) => compare(text(a), text(b)) * (up ? 1 : -1)));
  };
  th.addEventListener("click", sort);
  th.addEventListener("keydown", event => { if (event.key === "Enter") sort(); });
}
</script>
</body>
</html>
"""


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page: a heading, paragraphs, one table, and plots with captions."""

    title: str
    text: tuple[str, ...] = ()
    _: KW_ONLY
    head: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    plots: tuple[tuple[Markup, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Curve:
    """One line of a plot, on the left axis or on the right axis."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    right: bool = False


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


#: The extra that installs matplotlib, and what needs it.
_PLOTS: Final = {"extra": "plots", "purpose": "an HTML report"}


def demand_plots() -> None:
    """Check before long work that plots can be drawn.

    Raises:
        BackendUnavailable: matplotlib is not installed.
    """
    demand_package("matplotlib", **_PLOTS)


@contextmanager
def _new_figure(width: float, height: float) -> Iterator[Figure]:
    """A figure of this size in inches, in the style of the pages while the block runs."""
    figures = import_package("matplotlib.figure", **_PLOTS)
    with import_package("matplotlib", **_PLOTS).rc_context(_STYLE):
        yield figures.Figure(figsize=(width, height))


def _label(text: str) -> str:
    """A label for a plot: not too long, and without what matplotlib would obey.

    It takes the text between two dollar signs for TeX, and leaves labels that begin with an underscore out of a legend.
    """
    text = shortened(printable(text), _LABEL_LIMIT).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def _shown(value: object) -> object:
    """A text as the page shows it: readable and not too long; a plot as it is."""
    return value if isinstance(value, Markup) else shortened(printable(str(value)), _CELL_LIMIT)


def _svg(figure: Figure) -> Markup:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, bbox_inches="tight")
    text = buffer.getvalue()
    # trusted: matplotlib makes it from numbers and labels, and escapes the labels
    return Markup(text[text.index("<svg") :])


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
    with _new_figure(5.2, 3.2) as figure:
        left = figure.subplots()
        right = left.twinx() if any(line.right for line in lines) else left
        if right is not left:
            right.spines["right"].set_visible(True)
            right.set_ylabel(_label(right_label))
        handles = []
        for line, colour in zip(lines, itertools.cycle(_COLOURS), strict=False):
            axis = right if line.right else left
            handles += axis.plot(
                line.x,
                line.y,
                color=colour,
                marker="o",
                markersize=3,
                label=_label(line.label),
                linestyle="--" if line.right else "-",
            )
        left.set(title=_label(title), xlabel=_label(x_label), ylabel=_label(y_label))
        if log:
            left.set_yscale("log")
        if log_x:
            left.set_xscale("log", base=2)
        left.grid(axis="y", color="#e5e7eb")
        if len(lines) > 1:
            # below the axis label: inside, some curve would always be hidden
            below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.18)}
            left.legend(handles=handles, frameon=False, fontsize=8, ncols=2, **below)
        return _svg(figure)


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
    with _new_figure(5.2, 1.1 + 0.32 * len(rows)) as figure:
        axis = figure.subplots()
        for y, ((_, value, low, high), colour) in enumerate(zip(rows, itertools.cycle(_COLOURS), strict=False)):
            shown = max(low, edge_low - room), min(high, edge_high + room)
            axis.plot(shown, (y, y), color=colour, linewidth=2)
            if math.isfinite(value):
                axis.plot(value, y, color=colour, marker="o", markersize=6)
        if limit is not None:
            axis.axvline(limit, color=_RED, linestyle="--", linewidth=1)
        axis.set(title=_label(title), xlabel=_label(x_label), ylim=(len(rows) - 0.5, -0.5))
        axis.set_xlim(edge_low - room, edge_high + room)
        axis.set_yticks(range(len(rows)), labels=[_label(label) for label, *_ in rows])
        axis.grid(axis="x", color="#e5e7eb")
        return _svg(figure)


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
    room_y, room_x = 0.12 * (top - bottom) or 0.05, 0.15 * (max(widths) - min(widths)) or 0.05 * abs(max(widths)) or 1.0
    with _new_figure(8.0, 4.6) as figure:
        axis = figure.subplots()
        axis.set_xlim(min(widths) - room_x, max(widths) + 2.0 * room_x)  # room for labels to the right
        axis.set_ylim(bottom - room_y, top + room_y)
        for point, colour in zip(points, itertools.cycle(_COLOURS), strict=False):
            ends = max(point.low, bottom - room_y), min(point.high, top + room_y)
            axis.plot((point.x, point.x), ends, color=colour, linewidth=1.5, alpha=0.6)
            size, inside = 40.0 + 560.0 * point.area, colour if point.filled else "white"
            axis.scatter(point.x, point.y, s=size, facecolor=inside, edgecolor=colour, linewidth=1.5, zorder=3)
            if point.marked:
                axis.scatter(point.x, point.y, s=size + 350.0, facecolor="none", edgecolor=_RED, linewidth=2, zorder=4)
        if limit is not None:
            axis.axhline(limit, color=_RED, linestyle="--", linewidth=1)
        for point, (x, y) in zip(points, _label_places(axis, points), strict=True):
            axis.annotate(
                _label(point.label),
                (point.x, point.y),
                xytext=(x, y),
                textcoords="offset points",
                fontsize=9,
                va="center",
                zorder=5,
            )
        axis.set(title=_label(title), xlabel=_label(x_label), ylabel=_label(y_label))
        axis.grid(color="#e5e7eb")
        axis.set_axisbelow(True)
        return _svg(figure)


def _label_places(axis: Any, points: Sequence[Point]) -> list[tuple[float, float]]:
    """Offsets of labels from their points, in points of print, so that no label covers another one.

    Labels stand to the right of their circles, and are moved up or down where the place is taken.
    """
    scale = 72.0 / axis.figure.dpi
    height, taken, found = 12.0, list[tuple[float, float, float]](), []
    for point in points:
        x, y = (float(value) * scale for value in axis.transData.transform((point.x, point.y)))
        right = 6.0 + math.sqrt((40.0 + 560.0 * point.area + 350.0 * point.marked) / math.pi)
        width = 5.2 * len(_label(point.label))
        for step in (0, 1, -1, 2, -2, 3, -3, 4, -4):
            begin, middle = x + right, y + step * height
            free = all(
                abs(middle - other) >= height or begin + width < left or begin > end for left, end, other in taken
            )
            if free:
                break
        taken.append((begin, begin + width, middle))
        found.append((right, middle - y))
    return found


def heat_map(title: str, rows: Sequence[str], *, columns: Sequence[str], values: Sequence[Sequence[float]]) -> Markup:
    """Positive values by row and column, with colours on a logarithmic scale, as inline SVG."""
    shown = [[value if 0.0 < value < float("inf") else float("nan") for value in row] for row in values]
    with _new_figure(5.2, 1.0 + 0.26 * len(rows)) as figure:
        axis = figure.subplots()
        axis.imshow(shown, norm="log", cmap="YlOrRd", aspect="auto")
        axis.set(title=_label(title), xticks=range(len(columns)), xticklabels=[*map(_label, columns)])
        axis.set_yticks(range(len(rows)), labels=[*map(_label, rows)], fontsize=7)
        axis.tick_params(length=0)
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                axis.text(x, y, f"{value:.1e}", ha="center", va="center", fontsize=7)
        return _svg(figure)


def bars(
    title: str, y_label: str, *, groups: Sequence[str], series: Mapping[str, Sequence[float]], log: bool = False
) -> Markup:
    """Grouped bars, as inline SVG."""
    with _new_figure(5.2, 3.2) as figure:
        axis = figure.subplots()
        width = 0.8 / max(1, len(series))
        for index, ((label, values), colour) in enumerate(
            zip(series.items(), (_BLUE, _ORANGE, _GREY, _RED), strict=False)
        ):
            places = [g + (index - (len(series) - 1) / 2) * width for g in range(len(groups))]
            axis.bar(places, values, width * 0.92, label=_label(label), color=colour)
        axis.set(title=_label(title), ylabel=_label(y_label), xticks=range(len(groups)))
        axis.set_xticklabels([*map(_label, groups)])
        if log:
            axis.set_yscale("log")
        axis.grid(axis="y", color="#e5e7eb")
        axis.set_axisbelow(True)
        axis.legend(frameon=False, fontsize=8)
        return _svg(figure)


def render(
    path: str | Path,
    title: str,
    *,
    passed: bool,
    summary: str,
    sections: Sequence[Section],
    environment: Mapping[str, Any],
    verdict: str = "",
) -> Path:
    """Write the page, whole or not at all.

    Args:
        path: the file.
        title: the heading of the page.
        passed: whether the verdict is shown as a pass.
        summary: the line after the verdict.
        sections: the parts of the page.
        environment: what the footer shows.
        verdict: the verdict in place of "pass" or "fail", for one that is neither.

    Raises:
        IBNormError: the file cannot be written.
    """
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, finalize=_shown).from_string(_PAGE)
    flat = {
        k: ", ".join(f"{n} {v}" for n, v in x.items()) if isinstance(x, Mapping) else x for k, x in environment.items()
    }
    text = template.render(
        title=title,
        verdict=verdict or ("pass" if passed else "fail"),
        colour="neither" if verdict else "pass" if passed else "fail",
        summary=summary,
        sections=sections,
        environment=flat,
    )
    path = Path(path)
    with new_file(path, IBNormError, kind=PAGE) as folder:
        (folder / path.name).write_text(text, encoding="utf-8")
    return path
