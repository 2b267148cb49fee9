"""The HTML page with the results of the demo."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from markupsafe import Markup

from ibnorm_export.analysis.information import BETA
from ibnorm_export.benchmark.html import latency_plot
from ibnorm_export.cli.demo_app.app import DemoModel, DemoResult
from ibnorm_export.cli.demo_app.text import EXPLANATION, SAMPLING, DemoText, trimmed
from ibnorm_export.evaluation.html import sections as evaluation_sections
from ibnorm_export.evaluation.sweep_html import sweep_section
from ibnorm_export.evaluation.sweep_report import SweepReport
from ibnorm_export.html_page import Curve, Section, State, Verdict, curves, images, render
from ibnorm_export.verifier.html import parity_dots

__all__ = ["write_report"]

_NAMES = {"llama": "Byte-level LLaMA on English text", "vit": "ViT on handwritten digits"}


def _parity_rows(model: DemoModel) -> Iterator[tuple[str, ...]]:
    """One row for each output of each export."""
    for report in model.parity:
        if report.numeric is None:
            continue
        for o in report.numeric.outputs:
            yield (
                f"{o.name} ({report.numeric.dtype}, norms {o.norms})",
                f"{o.error:.2e}",
                f"{o.baseline_error:.2e}",
                f"{o.ratio:.2f}",
                f"{o.max_abs:.2e}",
                f"{o.cosine:.9f}",
                "" if o.top1_agreement is None else f"{o.top1_agreement:.2%}",
                "pass" if report else "fail",
            )


def _training_plots(model: DemoModel) -> tuple[tuple[Markup, str], ...]:
    """Curves over the training steps, each with its caption."""
    seen = model.evaluations
    steps = [e.step for e in seen]
    x = "training steps"
    learning = curves(
        "Learning",
        x,
        y_label="bits per byte" if model.name == "llama" else "bits per image",
        lines=[
            Curve("loss on held-out data", steps, [e.loss for e in seen]),
            Curve("accuracy", steps, [e.accuracy for e in seen], right=True),
        ],
        right_label="accuracy",
    )
    information = curves(
        "Information in the output of the final norm",
        x,
        y_label="bits",
        lines=[
            Curve("I(T; Y), about the target", steps, [e.about_target for e in seen]),
            Curve("I(T; X), about the input", steps, [e.about_input for e in seen]),
            Curve(f"value, I(T; Y) - {BETA:g} I(T; X)", steps, [e.bottleneck for e in seen]),
        ],
    )
    kurtosis = curves(
        "Excess kurtosis before and after the final norm",
        x,
        y_label="excess kurtosis",
        lines=[
            Curve("input", steps, [e.kurtosis_in for e in seen]),
            Curve("output", steps, [e.kurtosis_out for e in seen]),
        ],
    )
    return (
        (learning, "Cross-entropy and share of correct predictions on held-out data."),
        (
            information,
            "Matrix-based Renyi estimate of order 1.01 on 256 held-out samples, Gaussian kernel of median width.",
        ),
        (kurtosis, "A Gaussian has 0. L and T lower the kurtosis of values with Gaussian tails; S does not change it."),
    )


def _digits(model: DemoModel) -> Iterator[tuple[Markup, str]]:
    """Held-out images with the answers of the exported file."""
    if model.digits:
        pictures = [
            (d.pixels, str(d.answer) if d.answer == d.truth else f"{d.answer}, not {d.truth}", d.answer == d.truth)
            for d in model.digits
        ]
        drawn = images("Answers of the exported file to held-out digits", pictures=pictures, columns=4)
        yield drawn, "Images of 8 by 8 pixels. If the file gets some wrong, up to three of them are shown last."


def _section(model: DemoModel) -> Section:
    """The training, verification and latency of one model."""
    compared = " ".join(
        f"{report.numeric.dtype}: {report.static.norms} norm nodes and {report.static.weights} weights compared with "
        f"the checkpoint, {len(report.static.findings)} findings."
        for report in model.parity
        if report.numeric is not None and report.static is not None
    )
    latency = model.latency
    fused = f"{sum(n.implementation == 'fused' for n in latency.norms)} of {len(latency.norms)} norms as fused kernels"
    ratios = "; ".join(
        f"time over {r.against}: {r.median:.2f} (middle half {r.p25:.2f} to {r.p75:.2f})" for r in latency.ratios
    )
    return Section(
        title=_NAMES.get(model.name, model.name),
        text=(
            f"{model.norm}. {model.effort}: a toy that shows the way, trained to {model.goal}.",
            compared,
            f"ONNX Runtime on {latency.threads} threads, {ratios}.",
        ),
        head=("output", "error", "baseline error", "ratio", "max abs", "cosine", "top-1", "verdict"),
        rows=tuple(_parity_rows(model)),
        plots=(
            *_digits(model),
            *_training_plots(model),
            (
                parity_dots("Parity", [r.numeric for r in model.parity if r.numeric is not None]),
                "Green is within the tolerance, which depends on the baseline error; the line is 100%.",
            ),
            (
                latency_plot("Latency", latency.latencies),
                f"Interleaved rounds with the same number of threads; fp32, {fused}.",
            ),
        ),
    )


def _text_section(text: DemoText) -> Section:
    """The text that every form generates."""
    rows = []
    for w in text.writings:
        quality = w.parity.numeric.quality if w.parity is not None and w.parity.numeric is not None else ()
        first = quality[0] if quality else None
        rows.append(
            (
                w.form,
                f"{w.result.first_token_ms:.1f}",
                f"{w.result.tokens_per_s:.0f}",
                "" if first is None else f"{first.agreement:.2%}",
                "" if first is None else f"{first.baseline_perplexity:.3f} to {first.perplexity:.3f}",
                "" if w.parity is None else ("pass" if w.parity else "fail"),
            )
        )
    written = (f"{w.form}: “{text.prompt}{trimmed(w.result.text)}”" for w in text.writings)
    notes = (
        EXPLANATION,
        f"All continue “{text.prompt}” with the same seed, temperature {SAMPLING.temperature:g} and top-p "
        f"{SAMPLING.top_p:g}. The fp32 forms generated "
        f"{'the same text as PyTorch' if text.same else 'A DIFFERENT text from PyTorch'}.",
        "Agreement and perplexity compare predictions on held-out text with those of PyTorch.",
    )
    return Section(
        title="Text that the LLaMA generates",
        text=(*written, *notes, text.missing) if text.missing else (*written, *notes),
        head=("form", "first token, ms", "tokens/s", "agreement", "perplexity", "verdict"),
        rows=tuple(rows),
        plots=(),
    )


def _sweep_sections(report: SweepReport) -> Iterator[Section]:
    """The Pareto plot of a model, and its figures with intervals."""
    yield sweep_section(report, f"Which file to ship: {Path(report.checkpoint).name}")
    figures = evaluation_sections(report.evaluation)[0]
    yield replace(figures, title=f"{report.evaluation.task.capitalize()} of {Path(report.checkpoint).name}")


def write_report(result: DemoResult, path: str | Path) -> Path:
    """Write the page.

    Args:
        result: what the demo did.
        path: the .html file.

    Returns:
        The path.

    Raises:
        IBNormError: the file cannot be written.
    """
    summary = "; ".join(f"{m.name}: {m.goal}, parity {'passed' if all(m.parity) else 'FAILED'}" for m in result.models)
    environment = result.models[0].latency.environment
    sections = [*(_section(model) for model in result.models), _text_section(result.text)]
    for report in result.sweeps:
        sections += _sweep_sections(report)
    return render(
        path,
        "IBNorm: trained, exported, verified, timed",
        verdict=Verdict(State.PASS if result else State.FAIL, f"{summary}."),
        sections=sections,
        environment=environment,
        data=result.to_dict(),
    )
