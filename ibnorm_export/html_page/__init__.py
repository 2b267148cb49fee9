"""Self-contained HTML pages: one template, one style, and plots as SVG."""

from ibnorm_export.html_page.inline_svg import demand_plots, new_figure, svg
from ibnorm_export.html_page.page import PAGE, Section, State, Verdict, render
from ibnorm_export.html_page.plots import (
    Curve,
    Distribution,
    Point,
    curves,
    distributions,
    dots,
    histograms,
    images,
    intervals,
    scatter,
    tolerance_dots,
)

__all__ = [
    "PAGE",
    "Curve",
    "Distribution",
    "Point",
    "Section",
    "State",
    "Verdict",
    "curves",
    "demand_plots",
    "distributions",
    "dots",
    "histograms",
    "images",
    "intervals",
    "new_figure",
    "render",
    "scatter",
    "svg",
    "tolerance_dots",
]
