"""`ibnorm-export verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ibnorm_export.cli import options
from ibnorm_export.cli.console import out, print_json, print_norms, print_table, show_progress, table
from ibnorm_export.runtimes.runner import Backend, Endpoint, Kernels
from ibnorm_export.verifier.report import LayersReport, ParityReport


def verify_command(
    model_file: options.ModelFile,
    checkpoint: options.Checkpoint,
    backend: options.Backend = Backend.ORT_CPU,
    samples: Annotated[int, typer.Option("--samples", min=1, help="How many inputs to draw.")] = 4,
    inputs: Annotated[
        Path | None,
        typer.Option("--inputs", metavar="FILE.npz", exists=True, help="Your own inputs, by name, instead."),
    ] = None,
    text: Annotated[
        Path | None, typer.Option("--text", metavar="FILE", exists=True, help="Text that a language model predicts.")
    ] = None,
    seed: options.Seed = 0,
    numeric_only: Annotated[
        bool, typer.Option("--numeric-only", help="Leave out the static verdict (nodes, attributes, weights).")
    ] = False,
    kernels: options.KernelChoice = Kernels.AUTO,
    require_fused: options.RequireFused = False,
    layers: Annotated[
        bool, typer.Option("--layers", help="Measure every norm and block; name the first that leaves its bound.")
    ] = False,
    exposing: Annotated[
        bool, typer.Option("--exposing", help="Beside drawn inputs: heavy tails, large means, constant rows, ...")
    ] = False,
    html: Annotated[
        Path | None,
        typer.Option("--report", metavar="FILE.html", callback=options.page, help="Write one self-contained page too."),
    ] = None,
    url: Annotated[
        str | None, typer.Option("--url", metavar="HOST:PORT", help="Of a Triton server; grpc://HOST:PORT for gRPC.")
    ] = None,
    name: Annotated[str, typer.Option("--name", help="Of the model on that server.")] = "",
    engine: options.EngineFile = None,
    model: options.Factory = None,
    as_json: options.AsJson = False,
) -> None:
    """Compare an exported file with its checkpoint; exit 1 when it says or computes something else.

    Example: ibnorm-export verify llama.onnx checkpoints/llama
    """
    from ibnorm_export import models
    from ibnorm_export.artifacts.exported_model import ExportedModel
    from ibnorm_export.artifacts.input_files import read_inputs, read_text
    from ibnorm_export.verifier.html import write_report
    from ibnorm_export.verifier.verify import VerifyOptions, verify

    endpoint = None if url is None else Endpoint(url, name)
    wanted = VerifyOptions(
        backend,
        samples,
        seed=seed,
        static=not numeric_only,
        kernels=kernels,
        require_fused=require_fused,
        layers=layers,
        endpoint=endpoint,
        exposing=exposing,
        engine=engine,
    )
    with show_progress() as progress:
        progress("reading the checkpoint", 0, 0)
        written = None if text is None else read_text(text)
        exported = ExportedModel(model_file)
        loaded = models.load(checkpoint, model, task=exported.metadata.task)
        given = None if inputs is None else [read_inputs(inputs, loaded)]
        report = verify(exported, loaded, options=wanted, inputs=given, progress=progress, text=written)
        if html is not None:
            progress("writing the report", 0, 0)
            write_report(report, html)
    if as_json:
        print_json(report.to_dict())
    else:
        print_report(report)
    if not report:
        raise typer.Exit(1)


def print_report(report: ParityReport) -> None:
    """The report for a person."""
    if report.numeric is not None and report.numeric.outputs:
        rows = table(
            f"{report.model}: {report.numeric.backend}, {report.numeric.dtype}, {report.numeric.samples} samples",
            "output",
            "norms",
            "max abs",
            "rel. error",
            "PyTorch's own",
            "ratio",
            "allowed",
            "cosine",
            "top-1",
            "",
        )
        outputs = report.numeric.outputs
        sound = [o for o in outputs if o.name.startswith("present.") and o.passed]
        for o in outputs:
            if o in sound:  # two a layer: told in one line below
                continue
            top1 = "" if o.top1_agreement is None else f"{o.top1_agreement:.2%}"
            rows.add_row(
                o.name,
                o.norms,
                f"{o.max_abs:.2e}",
                f"{o.error:.2e}",
                f"{o.torch_error:.2e}",
                f"{o.ratio:.2f}",
                f"{o.allowed:.2e}",
                f"{o.cosine:.9f}",
                top1,
                "pass" if o.passed else "FAIL",
            )
        print_table(rows)
        if sound:
            worst = max(sound, key=lambda o: o.error / o.allowed)
            out.print(
                f"cache: {len(sound)} outputs pass, the nearest to its bound at {worst.error / worst.allowed:.2f}"
            )
        out.print(f"numeric: ran {report.numeric.method}", style="dim", markup=False)
        print_norms(report.numeric.norms)
    if report.numeric is not None:
        for quality in report.numeric.quality:
            out.print(f"{quality.kind}: {quality}: {'pass' if quality.passed else 'FAIL'}", markup=False)
        if report.numeric.blame is not None:
            out.print(f"blame: {report.numeric.blame.words}", markup=False)
        if report.numeric.layers is not None:
            _print_layers(report.numeric.layers)
    if report.static is not None:
        out.print(
            f"static: {report.static.norms} norms and {report.static.weights} weights compared, "
            f"{len(report.static.findings)} findings",
            markup=False,
        )
    parts = [part for part in (report.static, report.numeric) if part is not None]
    for note in (*report.notes, *(n for part in parts for n in part.notes)):
        out.print(f"note: {note}", style="yellow", markup=False)
    for finding in report.findings:
        out.print(f"FAIL {finding}", style="red", markup=False)
    out.print(f"verdict: {'pass' if report else 'fail'}", style="bold green" if report else "bold red", markup=False)


def _print_layers(report: LayersReport) -> None:
    corners = [corner.norms for corner in report.layers[0].corners] if report.layers else []
    rows = table("layers: relative error against float64", "module", "", "PyTorch's own", *corners, "allowed", "")
    for layer in report.layers:
        rows.add_row(
            layer.module,
            layer.kind,
            f"{layer.torch_error:.2e}",
            *(f"{c.error:.2e}" for c in layer.corners),
            f"{layer.corners[0].allowed:.2e}",
            "pass" if layer.passed else "FAIL",
        )
    if report.layers:
        print_table(rows)
    out.print(
        f"layers: {report.first or 'every one keeps its bound' if report.layers else 'none compared'}", markup=False
    )
    for note in report.notes:
        out.print(f"note: {note}", style="yellow", markup=False)
