"""A parity report as one self-contained HTML page: outputs, error attribution, and the error by depth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from markupsafe import Markup

from ibnorm_export.environment import environment
from ibnorm_export.html_page import Curve, Section, bars, curves, heat_map, render
from ibnorm_export.runtimes.norm_executions import norms_summary
from ibnorm_export.text_report import counted
from ibnorm_export.verifier.options import InputCoverage
from ibnorm_export.verifier.report import (
    ErrorAttribution,
    ExpectedReport,
    LayerParity,
    LayersReport,
    MappingReport,
    NumericReport,
    ParityReport,
)

__all__ = ["parity_bars", "sections", "write_report"]

#: Drawn instead of zero, which a logarithmic axis cannot show.
_TINY: Final = 1e-12


def _outputs(numeric: NumericReport, title: str) -> Section:
    rows = tuple(
        (
            o.name,
            o.norms,
            f"{o.error:.2e}",
            f"{o.baseline_error:.2e}",
            f"{o.tolerance:.2e}",
            f"{o.max_abs:.2e}",
            f"{o.cosine:.9f}",
            "pass" if o.passed else "FAIL",
        )
        for o in numeric.outputs
    )
    plots: tuple[tuple[Markup, str], ...] = ()
    if 0 < len(numeric.outputs) <= 8:
        plots = ((_output_bars(title, [numeric]), "Relative error against float64, and the tolerance."),)
    text = [f"{numeric.backend}, {numeric.dtype}, {counted(numeric.samples, 'sample')}: ran {numeric.method}."]
    if numeric.norms:
        text.append(f"{norms_summary(numeric.norms)}.")
    return Section(
        title,
        tuple(text),
        head=("output", "norms", "error", "baseline error", "tolerance", "max abs", "cosine", "verdict"),
        rows=rows,
        plots=plots,
    )


def _inputs(numeric: NumericReport) -> Section:
    """What the inputs cover, and what they leave out and why: the verdict covers only what ran."""
    rows = [("ran", what, "") for what in numeric.ran]
    for left_out in numeric.not_run:
        what, _, why = left_out.partition(": ")
        rows.append(("not run", what, why))
    text = "The verdict covers only what ran."
    if numeric.coverage is InputCoverage.FAST:
        text += " Coverage was fast: verify again with full coverage before you rely on it."
    return Section("Inputs of the comparison", (text,), head=("", "inputs", "why"), rows=tuple(rows))


def _numeric(numeric: NumericReport) -> Iterator[Section]:
    """The sections of a numeric verdict, then those of the verdict without rounding."""
    if numeric.outputs:
        yield _outputs(numeric, "Outputs")
    if numeric.ran or numeric.not_run:
        yield _inputs(numeric)
    if numeric.mapping is not None:
        yield _mapping(numeric.mapping)
    if numeric.attribution is not None:
        yield _attribution(numeric.attribution, "Error attribution")
    if numeric.layers is not None:
        yield _layers(numeric.layers, "Layer by layer")
    if numeric.exact is not None:
        exact = numeric.exact
        yield _outputs(exact, "Without rounding")
        if exact.attribution is not None:
            yield _attribution(exact.attribution, "Error attribution without rounding")
        if exact.layers is not None:
            yield _layers(exact.layers, "Layer by layer without rounding")


def _attribution(attribution: ErrorAttribution, title: str) -> Section:
    rows = [
        (
            source.name,
            "" if source.error is None else f"{source.error:.2e}",
            "responsible" if source.responsible else "",
            source.explanation,
        )
        for source in attribution.sources
    ]
    rows += [
        (
            f"optimiser level {level.name}",
            f"{level.error:.2e}",
            "" if level.passed else "exceeds the tolerance",
            f"tolerance {level.tolerance:.2e}",
        )
        for level in attribution.levels
    ]
    return Section(title, (attribution.summary,), head=("step", "error after it", "", "what ran"), rows=tuple(rows))


def _layers(report: LayersReport, title: str) -> Section:
    text = (report.first_failure or "Every norm and block is within its tolerance.", *report.notes)
    if not report.layers:
        return Section(title, text)
    names = [variant.norms for variant in report.layers[0].variants]
    rows = tuple(
        (
            layer.module,
            layer.kind,
            layer.node,
            f"{layer.baseline_error:.2e}",
            *(f"{variant.error:.2e}" for variant in layer.variants),
            f"{layer.variants[0].tolerance:.2e}",
            "pass" if layer.passed else "FAIL",
        )
        for layer in report.layers
    )
    return Section(
        title,
        text,
        head=("PyTorch module", "kind", "ONNX node", "baseline error", *names, "tolerance", "verdict"),
        rows=rows,
        plots=_layer_plots(report.layers, names),
    )


def _layer_plots(layers: Sequence[LayerParity], names: Sequence[str]) -> tuple[tuple[Markup, str], ...]:
    """The error by depth as a curve for each variant, and by name as a heat map."""
    depth = list(range(len(layers)))
    errors = [[layer.baseline_error, *(variant.error for variant in layer.variants)] for layer in layers]
    values = [[max(error, _TINY) for error in row] for row in errors]
    columns = ["baseline error", *names]
    lines = [Curve(name, depth, [row[index] for row in values]) for index, name in enumerate(columns)]
    lines.append(Curve("tolerance", depth, [max(layer.variants[0].tolerance, _TINY) for layer in layers]))
    plot = curves(
        "Error by depth",
        "norms and blocks, in the order of the graph",
        y_label="relative error against float64",
        lines=lines,
        log=True,
    )
    grid = heat_map("Error by layer and variant", [layer.module for layer in layers], columns=columns, values=values)
    return ((plot, "After every norm and block."), (grid, "The same, by name."))


def _mapping(report: MappingReport) -> Section:
    rows = tuple(
        (
            norm.module,
            norm.norm,
            norm.replacement,
            f"{norm.error:.2e}",
            f"{norm.tolerance:.2e}",
            "pass" if norm.passed else "FAIL",
        )
        for norm in report.norms
    )
    head = ("PyTorch module", "your class", "exported as", "error in float64", "tolerance", "verdict")
    return Section("Your own norms", (str(report),), head=head, rows=rows)


def _expected(report: ExpectedReport) -> Section:
    rows = tuple(
        (row.output, row.what, f"{row.error:.2e}", f"{row.tolerance:.2e}", "pass" if row.passed else "FAIL")
        for row in report.rows
    )
    text = f"Computed in {report.dtype}; saved in {report.path}."
    return Section(
        "Values of the training code", (text,), head=("output", "", "error", "tolerance", "verdict"), rows=rows
    )


def sections(report: ParityReport) -> tuple[Section, ...]:
    """The sections of the page."""
    found = [] if report.numeric is None else list(_numeric(report.numeric))
    if report.expected is not None:
        found.append(_expected(report.expected))
    listed = tuple((f.where, f.what) for f in report.findings)
    found.append(Section("Findings", () if listed else ("None.",), head=("where", "what"), rows=listed))
    return (*found, Section("Notes", report.all_notes)) if report.all_notes else tuple(found)


def write_report(report: ParityReport, path: str | Path, *, about: Mapping[str, Any] | None = None) -> Path:
    """Write the page.

    Args:
        report: a report of `verify`.
        path: the .html file.
        about: the environment in the footer; None describes this machine.

    Raises:
        IBNormError: the file cannot be written.
    """
    verdict = f"{report.verdict}; " if report else ""
    summary = f"{verdict}{counted(len(report.findings), 'finding')}; checkpoint {report.checkpoint}"
    footer = environment() if about is None else about
    return render(
        path,
        f"Parity of {report.model}",
        passed=bool(report),
        summary=summary,
        sections=sections(report),
        environment=footer,
    )


def parity_bars(title: str, reports: Sequence[ParityReport]) -> Markup:
    """Bars of the file's error, the baseline error and the tolerance, by output and dtype."""
    return _output_bars(title, [report.numeric for report in reports if report.numeric is not None])


def _output_bars(title: str, verdicts: Sequence[NumericReport]) -> Markup:
    found = [(numeric.dtype, output) for numeric in verdicts for output in numeric.outputs]
    return bars(
        title,
        "relative error against float64",
        groups=[f"{output.name} {dtype}\n{output.norms}" for dtype, output in found],
        series={
            "exported file": [max(o.error, _TINY) for _, o in found],
            "baseline error": [max(o.baseline_error, _TINY) for _, o in found],
            "tolerance": [max(o.tolerance, _TINY) for _, o in found],
        },
        log=True,
    )
