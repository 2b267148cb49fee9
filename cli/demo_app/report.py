"""The page that shows a person what the demo did."""

from __future__ import annotations

from pathlib import Path

from ibnorm_export.analysis.information import BETA
from ibnorm_export.benchmark.html import latency_bars
from ibnorm_export.cli.demo_app.app import DemoModel, DemoResult
from ibnorm_export.cli.demo_app.text import DemoText
from ibnorm_export.html_page import Curve, Section, curves, render
from ibnorm_export.verifier.html import parity_bars

__all__ = ["write_report"]

_NAMES = {"llama": "Byte-level LLaMA on English text", "vit": "ViT on handwritten digits"}


def _section(model: DemoModel) -> Section:
    steps = [e.step for e in model.evaluations]
    unit = "bits per byte" if model.name == "llama" else "bits per image"
    rows = []
    for report in model.parity:
        if report.numeric is None or report.static is None:
            continue
        for o in report.numeric.outputs:
            rows.append(
                (
                    f"{o.name} ({report.numeric.dtype}, norms {o.norms})",
                    f"{o.error:.2e}",
                    f"{o.baseline_error:.2e}",
                    f"{o.ratio:.2f}",
                    f"{o.max_abs:.2e}",
                    f"{o.cosine:.9f}",
                    "" if o.top1_agreement is None else f"{o.top1_agreement:.2%}",
                    "pass" if report else "fail",
                )
            )
    compared = " ".join(
        f"{report.numeric.dtype}: {report.static.norms} norm nodes and {report.static.weights} weights compared with "
        f"the checkpoint, {len(report.static.findings)} findings."
        for report in model.parity
        if report.numeric is not None and report.static is not None
    )
    norms = model.latency.norms
    fused = f"{sum(n.implementation == 'fused' for n in norms)} of {len(norms)} norms as fused kernels"
    plots = (
        (
            curves(
                "Learning",
                "training steps",
                y_label=unit,
                lines=[
                    Curve("loss on held-out data", steps, [e.loss for e in model.evaluations]),
                    Curve("accuracy", steps, [e.accuracy for e in model.evaluations], right=True),
                ],
                right_label="accuracy",
            ),
            "Cross-entropy and share of right predictions on data that was not trained on.",
        ),
        (
            curves(
                "Information in the final norm's output",
                "training steps",
                y_label="bits",
                lines=[
                    Curve("I(T; Y), about the target", steps, [e.about_target for e in model.evaluations]),
                    Curve("I(T; X), about the input", steps, [e.about_input for e in model.evaluations]),
                    Curve(f"value, I(T; Y) - {BETA:g} I(T; X)", steps, [e.bottleneck for e in model.evaluations]),
                ],
            ),
            "Matrix-based Renyi estimate of order 1.01 on 256 held-out samples, Gaussian kernel of median width.",
        ),
        (
            curves(
                "Excess kurtosis around the final norm",
                "training steps",
                y_label="excess kurtosis",
                lines=[
                    Curve("input", steps, [e.kurtosis_in for e in model.evaluations]),
                    Curve("output", steps, [e.kurtosis_out for e in model.evaluations]),
                ],
            ),
            "0 is Gaussian. L and T lower the kurtosis of values with Gaussian tails; S leaves it.",
        ),
        (
            parity_bars("Parity", model.parity),
            "Passes where the error of the file is below the tolerance; the baseline is PyTorch in the same dtype.",
        ),
        (latency_bars("Latency", model.latency), f"Interleaved rounds with equal threads; fp32, {fused}."),
    )
    ratios = "; ".join(
        f"time over {r.against}: {r.median:.2f} (middle half {r.p25:.2f} to {r.p75:.2f})" for r in model.latency.ratios
    )
    return Section(
        title=_NAMES.get(model.name, model.name),
        text=(
            f"{model.norm}. Reached {model.goal}.",
            compared,
            f"ONNX Runtime on {model.latency.threads} threads, {ratios}.",
        ),
        head=("output", "error", "baseline error", "ratio", "max abs", "cosine", "top-1", "verdict"),
        rows=tuple(rows),
        plots=plots,
    )


def _text_section(text: DemoText) -> Section:
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
    written = (f"{w.form}: “{text.prompt}{w.result.text.rstrip()}”" for w in text.writings)
    notes = (
        f"All go on from “{text.prompt}” with the same seed, temperature 0.7, top-p 0.9. The forms in fp32 wrote "
        f"{'the same text as PyTorch' if text.same else 'ANOTHER text than PyTorch'}.",
        "Agreement and perplexity are of predictions on held-out text, beside PyTorch's.",
    )
    return Section(
        title="The LLaMA writes",
        text=(*written, *notes, text.missing) if text.missing else (*written, *notes),
        head=("form", "first token, ms", "tokens/s", "agreement", "perplexity", "verdict"),
        rows=tuple(rows),
        plots=(),
    )


def write_report(result: DemoResult, path: str | Path) -> Path:
    """Write the page.

    Raises:
        IBNormError: the file cannot be written.
    """
    summary = "; ".join(f"{m.name}: {m.goal}, parity {'passed' if all(m.parity) else 'FAILED'}" for m in result.models)
    environment = result.models[0].latency.environment
    sections = [*(_section(model) for model in result.models), _text_section(result.text)]
    return render(
        path,
        "IBNorm: trained, exported, verified, timed",
        passed=bool(result),
        summary=summary,
        sections=sections,
        environment=environment,
    )
