"""`ibnorm-export analyze`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ibnorm_export.analysis.options import ALPHA, SAMPLES, AnalysisOptions
from ibnorm_export.artifacts.tensors import DType
from ibnorm_export.cli import options
from ibnorm_export.cli.console import print_document, print_next, print_report, show_progress


def _lambdas(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not a list of numbers such as 0.5,8", param_hint="--lambdas") from error


def _dtypes(text: str) -> tuple[DType, ...]:
    try:
        return tuple(DType(part.strip()) for part in text.split(","))
    except ValueError as error:
        legal = ", ".join(dtype.value for dtype in DType)
        raise typer.BadParameter(f"{text!r} is not a list of these types: {legal}", param_hint="--dtypes") from error


def analyze_command(
    checkpoint: options.Checkpoint,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file", metavar="MODEL.onnx", exists=True, help="Analyse this export of the checkpoint in ONNX Runtime."
        ),
    ] = None,
    inputs: Annotated[
        Path | None,
        typer.Option(
            "--inputs", metavar="FILE.npz", exists=True, show_default="random", help="One batch, arrays by input name."
        ),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option("--labels", metavar="FILE.npy", exists=True, help="Classes of the samples, or of every token."),
    ] = None,
    text: Annotated[
        Path | None, typer.Option("--text", metavar="FILE", exists=True, help="A text file for a language model.")
    ] = None,
    lambdas: Annotated[
        str, typer.Option("--lambdas", metavar="LIST", help="Lambdas to apply in addition to each norm's own.")
    ] = "",
    dtypes: Annotated[
        str, typer.Option("--dtypes", metavar="LIST", help="Types to run the checkpoint in: fp32, fp16, bf16.")
    ] = "fp32",
    alpha: Annotated[float, typer.Option("--alpha", help="Order of the Renyi entropies: above 0, and not 1.")] = ALPHA,
    width: Annotated[
        float | None,
        typer.Option("--kernel-width", show_default="median distance", help="Width of the Gaussian kernels."),
    ] = None,
    samples: Annotated[
        int, typer.Option("--samples", min=2, max=4096, help="Number of tokens or images in a Gram matrix.")
    ] = SAMPLES,
    seed: options.Seed = 0,
    html: Annotated[
        Path | None,
        typer.Option("--report", metavar="FILE.html", callback=options.page, help="Write a page with plots."),
    ] = None,
    model: options.Factory = None,
    weights: options.Weights = None,
    as_json: options.AsJson = False,
) -> None:
    """Describe what each norm does: kurtosis and variance before and after compression, and information in bits.

    Example: ibnorm-export analyze checkpoints/llama --text held-out.txt --lambdas 0.5,8 --report analysis.html
    """
    if checkpoint.suffix == ".onnx":
        raise typer.BadParameter(
            f"{checkpoint} is an exported file; type: ibnorm-export analyze CHECKPOINT --file {checkpoint}"
        )
    from ibnorm_export.analysis.batches import read_batch, read_labels
    from ibnorm_export.analysis.html import write_analysis
    from ibnorm_export.analysis.norms import analyze
    from ibnorm_export.models.loading import load

    wanted = AnalysisOptions(_lambdas(lambdas), _dtypes(dtypes), alpha=alpha, width=width, samples=samples, seed=seed)
    with show_progress() as progress:
        loaded = load(checkpoint, model, weights=weights)
        batch = read_batch(loaded, inputs=inputs, text=text, tokens=samples, seed=seed)
        classes = None if labels is None else read_labels(labels)
        report = analyze(
            loaded if file is None else file,
            batch,
            checkpoint=loaded,
            labels=classes,
            options=wanted,
            progress=progress,
        )
    if html is not None:
        write_analysis(report, html)
    if as_json:
        print_document("analyze", report.to_dict(), files=[checkpoint, file, inputs, labels, text, html])
    else:
        print_report(report)
        print_next("export", checkpoint, "-o", f"{checkpoint.name}.onnx")
