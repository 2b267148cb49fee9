"""A parity report as one self-contained HTML page: outputs, error attribution, and the error by depth."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from markupsafe import Markup

from ibnorm_export.environment import environment
from ibnorm_export.html_page import Section, State, Verdict, render, tolerance_dots
from ibnorm_export.runtimes.norm_executions import norms_summary
from ibnorm_export.text_report import counted
from ibnorm_export.verifier.causes import causes, next_steps, reasons
from ibnorm_export.verifier.finding import verdict_word
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

__all__ = ["page_verdict", "parity_dots", "percent", "sections", "write_report"]

#: Stands for a tolerance of zero, by which nothing can be divided.
_TINY: Final = 1e-30

_INF: Final = float("inf")
_NAN: Final = float("nan")

#: Rows of a plot.
_ROWS: Final = 40

#: What a plot of tolerances shows.
_DOTS: Final = "Green is within the tolerance, red beyond it; the line is 100%."


def _multiple(excess: float) -> str:
    """An error over its tolerance, in words."""
    return (
        f"{percent(excess)} of it"
        if not 10.0 <= excess < _INF
        else f"{float(f'{excess:.3g}'):,.0f} times its tolerance"
    )


def percent(share: float) -> str:
    """A share in percent with three significant digits, e.g. "0.123%" or "45.6%"; never in scientific notation."""
    value = 100.0 * share
    if not 0.0 < value < _INF:
        return f"{value:.0f}%"
    value = float(f"{value:.3g}")
    digits = max(0, 2 - math.floor(math.log10(value)))
    return f"{value:.{min(digits, 9)}f}%"


def _outputs(numeric: NumericReport, title: str) -> Section:
    """The outputs, those that fail first, each with its error in percent of its tolerance."""
    outputs = sorted(numeric.outputs, key=lambda o: o.passed)
    rows = tuple(
        (
            o.name,
            o.norms,
            verdict_word(o.passed),
            percent(o.excess),
            f"{o.error:.2e}",
            f"{o.baseline_error:.2e}",
            f"{o.tolerance:.2e}",
            f"{o.max_abs:.2e}",
            f"{o.cosine:.9f}",
        )
        for o in outputs
    )
    text = [f"{numeric.backend}, {numeric.dtype}, {counted(numeric.samples, 'sample')}: ran {numeric.method}."]
    if numeric.norms:
        text.append(f"{norms_summary(numeric.norms)}.")
    return Section(
        title,
        tuple(text),
        head=(
            "output",
            "norms",
            "verdict",
            "of the tolerance",
            "error",
            "baseline error",
            "tolerance",
            "max abs",
            "cosine",
        ),
        rows=rows,
        plots=((parity_dots(title, [numeric]), _DOTS),) if outputs else (),
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
    head = ("state", "inputs", "why")[: 3 if numeric.not_run else 2]
    return Section("Inputs of the comparison", (text,), head=head, rows=tuple(row[: len(head)] for row in rows))


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
    return Section(
        title, (attribution.summary,), head=("step", "error after it", "result", "what ran"), rows=tuple(rows)
    )


def _layers(report: LayersReport, title: str) -> Section:
    text = (report.first_failure or "Every norm and block is within its tolerance.", *report.notes)
    if not report.layers:
        return Section(title, text)
    names = [variant.norms for variant in report.layers[0].variants]
    numbered = sorted(enumerate(report.layers, 1), key=lambda pair: pair[1].passed)
    rows = tuple(
        (
            str(number),
            layer.module,
            layer.kind,
            verdict_word(layer.passed),
            *(percent(variant.excess) for variant in layer.variants),
            *(f"{variant.error:.2e}" for variant in layer.variants),
            f"{layer.baseline_error:.2e}",
            f"{layer.variants[0].tolerance:.2e}",
            layer.node,
        )
        for number, layer in numbered
    )
    excesses = [f"of the tolerance, {name}" if len(names) > 1 else "of the tolerance" for name in names]
    errors = [f"error, {name}" if len(names) > 1 else "error" for name in names]
    return Section(
        title,
        text,
        head=("#", "PyTorch module", "kind", "verdict", *excesses, *errors, "baseline error", "tolerance", "ONNX node"),
        rows=rows,
        plots=((_layer_dots(report.layers, names), f"{_DOTS} Norms and blocks are in the order of the graph."),),
    )


def _layer_dots(layers: Sequence[LayerParity], names: Sequence[str]) -> Markup:
    """The error by layer; of many layers, those nearest to their tolerance, in the order of the graph."""
    excess = [max(variant.excess for variant in layer.variants) for layer in layers]
    kept = [layers[index] for index in _largest(excess)]
    shown = f", the {len(kept)} nearest to their tolerance" if len(kept) < len(layers) else ""
    tolerances = [layer.variants[0].tolerance or _TINY for layer in kept]
    return tolerance_dots(
        f"Error by depth{shown}",
        names=[layer.module for layer in kept],
        series={name: [100.0 * layer.variants[index].excess for layer in kept] for index, name in enumerate(names)},
        baseline=[100.0 * layer.baseline_error / t for layer, t in zip(kept, tolerances, strict=True)],
    )


def _largest(values: Sequence[float]) -> list[int]:
    """Places of the largest values, at most as many as a plot has rows, in their original order."""
    places = sorted(range(len(values)), key=lambda index: -values[index])
    return sorted(places[:_ROWS])


def _mapping(report: MappingReport) -> Section:
    rows = tuple(
        (
            norm.module,
            norm.norm,
            norm.replacement,
            f"{norm.error:.2e}",
            f"{norm.tolerance:.2e}",
            verdict_word(norm.passed),
        )
        for norm in report.norms
    )
    head = ("PyTorch module", "your class", "exported as", "error in float64", "tolerance", "verdict")
    return Section("Your own norms", (str(report),), head=head, rows=rows)


def _expected(report: ExpectedReport) -> Section:
    rows = tuple(
        (row.output, row.what, f"{row.error:.2e}", f"{row.tolerance:.2e}", verdict_word(row.passed))
        for row in report.rows
    )
    text = f"Computed in {report.dtype}; saved in {report.path}."
    return Section(
        "Values of the training code", (text,), head=("output", "what", "error", "tolerance", "verdict"), rows=rows
    )


def _findings(report: ParityReport) -> Section:
    """Every finding, grouped by cause."""
    rows = tuple(
        (str(number), f.code.value, f.where, f.what)
        for number, cause in enumerate(causes(report.findings), 1)
        for f in cause.findings
    )
    return Section("Findings", () if rows else ("None.",), head=("cause", "code", "where", "what"), rows=rows)


def sections(report: ParityReport) -> tuple[Section, ...]:
    """The sections of the page."""
    found = [_findings(report)] if report.findings else []
    found += [] if report.numeric is None else list(_numeric(report.numeric))
    if report.expected is not None:
        found.append(_expected(report.expected))
    return (*found, Section("Notes", report.all_notes)) if report.all_notes else tuple(found)


def page_verdict(report: ParityReport) -> Verdict:
    """The verdict of the page: what was compared, or what failed, why, and what to do."""
    parts = list(_compared(report)) or [counted(len(report.findings), "finding")]
    if report and report.verdict != "pass":
        parts.insert(0, report.verdict)
    summary = "; ".join(parts)
    return Verdict(
        State.PASS if report else State.FAIL,
        f"{summary[0].upper()}{summary[1:]}.",
        reasons=reasons(report),
        next_steps=next_steps(report),
    )


def _compared(report: ParityReport) -> Iterator[str]:
    """What each part of the report found, in words."""
    numeric, static = report.numeric, report.static
    if numeric is not None and numeric.outputs:
        where = f"on {numeric.backend} in {numeric.dtype}"
        nearest = max(numeric.outputs, key=lambda o: o.excess)
        failed = sum(not o.passed for o in numeric.outputs)
        if failed:
            verb = "exceeds its tolerance" if failed == 1 else "exceed their tolerances"
            total = counted(len(numeric.outputs), "output")
            yield f"{failed} of {total} {verb} {where}; the largest error is {_multiple(nearest.excess)}"
        else:
            yield f"every output {where} is within its tolerance; the nearest uses {percent(nearest.excess)} of it"
    if static is not None:
        what = f"{counted(static.norms, 'norm')} and {counted(static.weights, 'weight')}"
        found = counted(len(static.findings), "finding")
        yield f"{found} on {what}" if static.findings else f"{what} agree with the checkpoint"


def write_report(report: ParityReport, path: str | Path, *, about: Mapping[str, Any] | None = None) -> Path:
    """Write the page.

    Args:
        report: a report of `verify`.
        path: the .html file.
        about: the environment in the footer; None describes this machine.

    Raises:
        IBNormError: the file cannot be written.
        BackendUnavailable: matplotlib is not installed.
    """
    return render(
        path,
        f"Parity of {report.model}",
        verdict=page_verdict(report),
        summary=f"Compared with the checkpoint {report.checkpoint}.",
        sections=sections(report),
        environment=environment() if about is None else about,
        data=report.to_dict(),
    )


def parity_dots(title: str, reports: Sequence[NumericReport]) -> Markup:
    """The error of every output in percent of its tolerance, and the baseline error."""
    several = len({numeric.dtype for numeric in reports}) > 1
    found = [
        (f"{output.name} {numeric.dtype}" if several else output.name, output)
        for numeric in reports
        for output in numeric.outputs
    ]
    kept = [found[index] for index in _largest([output.excess for _, output in found])]
    names = list(dict.fromkeys(name for name, _ in kept))
    by_variant: dict[str, dict[str, float]] = {}
    baseline = {}
    for name, output in kept:
        by_variant.setdefault(output.norms, {})[name] = 100.0 * output.excess
        baseline[name] = 100.0 * output.baseline_error / (output.tolerance or _TINY)
    return tolerance_dots(
        title,
        names=names,
        series={norms: [values.get(name, _NAN) for name in names] for norms, values in by_variant.items()},
        baseline=[baseline[name] for name in names],
    )
