"""ParityReport -> one self-contained HTML page: outputs, blame, and the error by depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ibnorm_export.environment import environment
from ibnorm_export.html_page import Curve, Section, bars, curves, heat_map, render
from ibnorm_export.verifier.report import Blame, LayersReport, NumericReport, ParityReport

__all__ = ["parity_bars", "sections", "write_report"]

_TINY = 1e-12  # a zero has no place on a logarithmic axis


def _outputs(report: ParityReport, numeric: NumericReport) -> Section:
    rows = tuple(
        (
            o.name,
            o.norms,
            f"{o.error:.2e}",
            f"{o.torch_error:.2e}",
            f"{o.allowed:.2e}",
            f"{o.max_abs:.2e}",
            f"{o.cosine:.9f}",
            "pass" if o.passed else "FAIL",
        )
        for o in numeric.outputs
    )
    plots: tuple[tuple[Markup, str], ...] = ()
    if 0 < len(numeric.outputs) <= 8:
        plots = ((parity_bars("Parity", [report]), "Relative error against float64, and what is allowed."),)
    return Section(
        "Outputs",
        (f"{numeric.backend}, {numeric.dtype}, {numeric.samples} samples: {numeric.method}.",),
        head=("output", "norms", "error", "PyTorch's own", "allowed", "max abs", "cosine", "verdict"),
        rows=rows,
        plots=plots,
    )


def _blame(blame: Blame) -> Section:
    rows = [
        (link.name, "" if link.error is None else f"{link.error:.2e}", "to blame" if link.guilty else "", link.says)
        for link in blame.links
    ]
    rows += [
        (
            f"optimiser level {v.name}",
            f"{v.error:.2e}",
            "" if v.passed else "leaves the bound",
            f"allowed {v.allowed:.2e}",
        )
        for v in blame.levels
    ]
    return Section(
        "Which link adds error", (blame.words,), head=("link", "error behind it", "", "what ran"), rows=tuple(rows)
    )


def _layers(report: LayersReport) -> Section:
    text = (report.first or "Every norm and block keeps its bound.", *report.notes)
    if not report.layers:
        return Section("Layer by layer", text)
    names = [corner.norms for corner in report.layers[0].corners]
    depth = list(range(len(report.layers)))
    lines = [Curve("PyTorch's own", depth, [max(x.torch_error, _TINY) for x in report.layers])]
    for index, name in enumerate(names):
        lines.append(Curve(name, depth, [max(x.corners[index].error, _TINY) for x in report.layers]))
    lines.append(Curve("allowed", depth, [max(x.corners[0].allowed, _TINY) for x in report.layers]))
    cells = [[max(v, _TINY) for v in (x.torch_error, *(c.error for c in x.corners))] for x in report.layers]
    rows = tuple(
        (
            x.module,
            x.kind,
            x.node,
            f"{x.torch_error:.2e}",
            *(f"{c.error:.2e}" for c in x.corners),
            f"{x.corners[0].allowed:.2e}",
            "pass" if x.passed else "FAIL",
        )
        for x in report.layers
    )
    return Section(
        "Layer by layer",
        text,
        head=("PyTorch module", "kind", "ONNX node", "PyTorch's own", *names, "allowed", "verdict"),
        rows=rows,
        plots=(
            (
                curves(
                    "Error by depth",
                    "norms and blocks, in the order of the graph",
                    y_label="relative error against float64",
                    lines=lines,
                    log=True,
                ),
                "Behind every norm and block.",
            ),
            (
                heat_map(
                    "Error by layer and corner",
                    [x.module for x in report.layers],
                    columns=["PyTorch", *names],
                    values=cells,
                ),
                "The same, by name.",
            ),
        ),
    )


def sections(report: ParityReport) -> tuple[Section, ...]:
    """The parts of the page."""
    found = []
    if report.numeric is not None:
        if report.numeric.outputs:
            found.append(_outputs(report, report.numeric))
        if report.numeric.blame is not None:
            found.append(_blame(report.numeric.blame))
        if report.numeric.layers is not None:
            found.append(_layers(report.numeric.layers))
    listed = tuple((f.where, f.what) for f in report.findings)
    notes = (*report.notes, *(n for p in (report.static, report.numeric) if p is not None for n in p.notes))
    found.append(Section("Findings", () if listed else ("None.",), head=("where", "what"), rows=listed))
    return (*found, Section("Notes", notes)) if notes else tuple(found)


def write_report(report: ParityReport, path: str | Path, *, about: Mapping[str, Any] | None = None) -> Path:
    """Write the page.

    Args:
        report: of `ibnorm_export.verifier.verify.verify`.
        path: the .html file.
        about: the environment in the footer; None is this machine's.

    Raises:
        IBNormError: the file cannot be written.
    """
    summary = f"{len(report.findings)} findings; checkpoint {report.checkpoint}"
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
    """Error of the exported file beside PyTorch's own and what is allowed, by output and type."""
    found = [(r.numeric.dtype, o) for r in reports if r.numeric is not None for o in r.numeric.outputs]
    tiny = 1e-12  # a zero has no place on a logarithmic axis
    return bars(
        title,
        "relative error against float64",
        groups=[f"{output.name} {dtype}\n{output.norms}" for dtype, output in found],
        series={
            "exported file": [max(o.error, tiny) for _, o in found],
            "PyTorch's own": [max(o.torch_error, tiny) for _, o in found],
            "allowed": [max(o.allowed, tiny) for _, o in found],
        },
        log=True,
    )
