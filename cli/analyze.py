"""`ibnorm-export analyze`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ibnorm_export.analysis.options import ALPHA, SAMPLES, AnalysisOptions
from ibnorm_export.artifacts.tensors import DType
from ibnorm_export.cli import options
from ibnorm_export.cli.console import out, print_json, print_table, show_progress, table

if TYPE_CHECKING:
    from ibnorm_export.analysis.norms import AnalysisReport


def _numbers(text: str) -> tuple[float, ...]:
    try:
        found = tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not a list of numbers", param_hint="--lambdas") from error
    if not all(0.0 < value < float("inf") for value in found):
        raise typer.BadParameter(f"{text!r}: a lambda is finite and above 0", param_hint="--lambdas")
    return found


def _types(text: str) -> tuple[DType, ...]:
    try:
        return tuple(DType(part.strip()) for part in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(f"{text!r}: types are fp32, fp16, bf16", param_hint="--dtypes") from error


def analyze_command(
    checkpoint: options.Checkpoint,
    file: Annotated[
        Path | None,
        typer.Option("--file", metavar="MODEL.onnx", exists=True, help="Analyse this export of it, in ONNX Runtime."),
    ] = None,
    inputs: Annotated[
        Path | None,
        typer.Option("--inputs", metavar="FILE.npz", exists=True, show_default="drawn", help="One batch, by name."),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option("--labels", metavar="FILE.npy", exists=True, help="Classes of the batch, or of every token."),
    ] = None,
    text: Annotated[
        Path | None, typer.Option("--text", metavar="FILE", exists=True, help="Text that a language model reads.")
    ] = None,
    lambdas: Annotated[str, typer.Option("--lambdas", metavar="LIST", help="To apply beside each norm's own.")] = "",
    dtypes: Annotated[str, typer.Option("--dtypes", metavar="LIST", help="To run the checkpoint in.")] = "fp32",
    alpha: Annotated[float, typer.Option("--alpha", help="Order of the Renyi entropies; not 1.")] = ALPHA,
    width: Annotated[
        float | None, typer.Option("--kernel-width", show_default="median distance", help="Of the Gaussian kernels.")
    ] = None,
    samples: Annotated[
        int, typer.Option("--samples", min=2, max=4096, help="Tokens or images in a Gram matrix.")
    ] = SAMPLES,
    seed: options.Seed = 0,
    html: Annotated[
        Path | None, typer.Option("--report", metavar="FILE.html", callback=options.page, help="Write the plots.")
    ] = None,
    model: options.Factory = None,
    as_json: options.AsJson = False,
) -> None:
    """Say what each norm does: kurtosis and variance before and after compression, and information in bits.

    Example: ibnorm-export analyze checkpoints/llama --text held-out.txt --lambdas 0.5,8 --report analysis.html
    """
    import numpy as np

    from ibnorm_export import models
    from ibnorm_export.analysis.batches import read_labels, text_batch
    from ibnorm_export.analysis.html import write_analysis
    from ibnorm_export.analysis.norms import analyze_checkpoint, analyze_file
    from ibnorm_export.artifacts.exported_model import ExportedModel
    from ibnorm_export.artifacts.input_files import read_inputs, read_text

    if alpha <= 0.0 or alpha == 1.0:
        raise typer.BadParameter(f"{alpha} is not above 0 and other than 1", param_hint="--alpha")
    if width is not None and not width > 0.0:
        raise typer.BadParameter(f"{width} is not above 0", param_hint="--kernel-width")
    wanted = AnalysisOptions(_numbers(lambdas), _types(dtypes), alpha=alpha, width=width, samples=samples, seed=seed)
    with show_progress() as progress:
        written = None if text is None else read_text(text)
        loaded = models.load(checkpoint, model)
        if written is not None:
            batch = text_batch(loaded, written, tokens=samples)
        elif inputs is not None:
            batch = read_inputs(inputs, loaded)
        else:
            batch = loaded.sample(np.random.default_rng(seed), 0)
        given = None if labels is None else read_labels(labels)
        if file is None:
            report = analyze_checkpoint(loaded, batch, labels=given, options=wanted, progress=progress)
        else:
            report = analyze_file(ExportedModel(file), batch, labels=given, options=wanted, progress=progress)
    if html is not None:
        write_analysis(report, html)
    if as_json:
        print_json(report.to_dict())
    else:
        print_analysis(report)


def print_analysis(report: AnalysisReport) -> None:
    """The report for a person."""
    rows = table(
        f"{report.source}: {report.samples} samples, Y is {report.target}",
        "norm",
        "type",
        "kind",
        "lambda",
        "kurtosis before",
        "after",
        "variance",
        "I(T; Y)",
        "I(T; X)",
        "value",
    )
    for r in report.rows:
        rows.add_row(
            r.module,
            r.dtype,
            r.compression,
            f"{r.lambd:g}",
            f"{r.kurtosis_before:.3f}",
            f"{r.kurtosis_after:.3f}",
            f"{r.contraction:.3f}",
            f"{r.about_target:.3f}",
            f"{r.about_input:.3f}",
            f"{r.bottleneck:.3f}",
        )
    print_table(rows)
    out.print(
        f"bits by Renyi entropies of order {report.alpha:g}, Gaussian kernel of width {report.width}", style="dim"
    )
    for note in report.notes:
        out.print(f"note: {note}", style="yellow", markup=False)
