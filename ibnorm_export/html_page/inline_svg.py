"""SVG whose colours follow the page that it is part of: light, dark, or on paper."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from markupsafe import Markup, escape

from ibnorm_export.errors import printable, shortened
from ibnorm_export.optional_packages import demand_package, import_package

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "COLOURS",
    "FAIL",
    "FAIL_AREA",
    "INK",
    "MARKERS",
    "MUTED",
    "PACKAGE",
    "PAPER",
    "PASS",
    "demand_plots",
    "label_of",
    "new_figure",
    "svg",
]

#: Colours of the style sheet's variables: a plot is drawn with these and written with the variables.
_VARIABLES: Final[Mapping[str, str]] = {
    "#1d4ed8": "c1",
    "#b45309": "c2",
    "#0f766e": "c3",
    "#7c3aed": "c4",
    "#be185d": "c5",
    "#64748b": "c6",
    "#0369a1": "c7",
    "#4d7c0f": "c8",
    "#15803d": "pass",
    "#b91c1c": "fail",
    "#fef2f2": "fail-soft",
    "#0f172a": "ink",
    "#475569": "muted",
    "#e2e8f0": "grid",
    "#ffffff": "page",
}

#: One colour and one marker for each series, so that colour is not all that tells them apart.
COLOURS: Final = tuple(_VARIABLES)[:8]
MARKERS: Final = ("o", "s", "D", "^", "v", "P", "X", "*")
PASS, FAIL, INK, MUTED, GRID, PAPER = "#15803d", "#b91c1c", "#0f172a", "#475569", "#e2e8f0", "#ffffff"
FAIL_AREA: Final = "#fef2f2"

_STYLE: Final = {
    "svg.hashsalt": "ibnorm-export",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": False,
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
}

#: Width of every figure in inches. On a phone of 390 pixels it is drawn at 0.9 of its size, so that text of 10 points
#: (13.3 pixels) has 12 pixels.
WIDTH: Final = 4.2

#: Characters of a label.
LABEL_LIMIT: Final = 60

#: The extra that installs matplotlib, and what needs it.
PACKAGE: Final = {"extra": "plots", "purpose": "an HTML report"}


def demand_plots() -> None:
    """Check before long work that plots can be drawn.

    Raises:
        BackendUnavailable: matplotlib is not installed.
    """
    demand_package("matplotlib", **PACKAGE)


@contextmanager
def new_figure(height: float, title: str) -> Iterator[Figure]:
    """A figure in the style of the pages while the block runs, `WIDTH` inches wide, with its title at the top left.

    Args:
        height: in inches, without the title.
        title: the title, which is wrapped.

    Raises:
        BackendUnavailable: matplotlib is not installed.
    """
    figures = import_package("matplotlib.figure", **PACKAGE)
    lines = textwrap.wrap(label_of(title), 46) or [""]
    with import_package("matplotlib", **PACKAGE).rc_context(_STYLE):
        figure = figures.Figure(figsize=(WIDTH, height + 0.2 * len(lines)), layout="constrained")
        figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=11, fontweight="bold")
        yield figure


def svg(figure: Figure, alt: str) -> Markup:
    """The figure as inline SVG in the colours of the page.

    Args:
        figure: a figure of `new_figure`.
        alt: what the plot shows, for readers who do not see it.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for colour, name in _VARIABLES.items():
        text = text.replace(colour, f"var(--{name})")
    # names of groups would occur once in each plot of a page, and the page has a font
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r"font(?:-family)?: [^;\"]*DejaVu[^;\"]*", _font, text)
    text = re.sub(r"<metadata>.*?</metadata>\s*|<!--.*?-->\s*", "", text, flags=re.DOTALL)
    described = escape(shortened(printable(alt), 300))
    # trusted: matplotlib makes it from numbers and labels, and escapes the labels
    return Markup(text.replace("<svg ", f'<svg role="img" aria-label="{described}" ', 1))


def _font(found: re.Match[str]) -> str:
    """A font of matplotlib without its family."""
    size = re.search(r"[\d.]+px", found[0])
    weight = "font-weight: bold; " if " bold " in found[0] or "700" in found[0] else ""
    return f"{weight}font-size: {size[0]}" if size else "font-family: inherit"


def label_of(text: str, limit: int = LABEL_LIMIT) -> str:
    """A label for a plot: not too long, and without what matplotlib would obey.

    It takes the text between two dollar signs for TeX, and leaves labels that begin with an underscore out of a legend.
    """
    text = shortened(printable(text), limit).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text
