"""`ibnorm-export verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ibnorm_export.artifacts.tensors import DType
from ibnorm_export.cli import options
from ibnorm_export.cli.console import finish, show_progress
from ibnorm_export.cli.hints import check_order
from ibnorm_export.runtimes.runner import Backend, Endpoint, Kernels
from ibnorm_export.verifier.options import InputCoverage


def verify_command(
    model_file: options.ModelFile,
    checkpoint: options.Checkpoint,
    backend: options.Backend = Backend.ORT_CPU,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Number of random inputs.")] = 4,
    inputs: Annotated[
        Path | None,
        typer.Option(
            "--inputs", metavar="FILE.npz", exists=True, help="Your own inputs, by name, instead of random ones."
        ),
    ] = None,
    expected: Annotated[
        Path | None,
        typer.Option(
            "--expected",
            metavar="FILE.npz",
            exists=True,
            help="Inputs and outputs that the training code saved; checkpoint and file are held to these outputs.",
        ),
    ] = None,
    expected_dtype: Annotated[
        DType | None,
        typer.Option(
            "--expected-dtype", help="Type that the training code computed in. The default is that of its outputs."
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            "--text",
            metavar="FILE",
            exists=True,
            help="Text on which the file must predict tokens as well as the checkpoint.",
        ),
    ] = None,
    seed: options.Seed = 0,
    numeric_only: Annotated[
        bool, typer.Option("--numeric-only", help="Skip the static verdict (nodes, attributes, weights).")
    ] = False,
    kernels: options.KernelChoice = Kernels.AUTO,
    require_fused: options.RequireFused = False,
    layers: Annotated[
        bool,
        typer.Option("--layers", help="Measure every norm and block; name the first that exceeds its tolerance."),
    ] = False,
    coverage: Annotated[
        InputCoverage,
        typer.Option(
            "--coverage",
            help="Which random inputs to run: fast leaves out the longest sequence, a large batch and large values.",
        ),
    ] = InputCoverage.FULL,
    stress: Annotated[
        bool, typer.Option("--stress", help="Add stress inputs: heavy tails, large means, constant rows, ...")
    ] = False,
    html: Annotated[
        Path | None,
        typer.Option(
            "--report", metavar="FILE.html", callback=options.page, help="Also write a self-contained HTML page."
        ),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option("--url", metavar="HOST:PORT", help="Address of a Triton server; grpc://HOST:PORT for gRPC."),
    ] = None,
    name: Annotated[
        str, typer.Option("--name", help="Name of the model on that server.", rich_help_panel="Runtime")
    ] = "",
    engine: options.EngineFile = None,
    provider: options.Provider = None,
    npm: options.Npm = None,
    model: options.Factory = None,
    weights: options.Weights = None,
    as_json: options.AsJson = False,
) -> None:
    """Compare an exported file with its checkpoint; exit 1 if its content or its results differ.

    Example: ibnorm-export verify llama.onnx checkpoints/llama
    """
    check_order(model_file, checkpoint)
    from ibnorm_export import models
    from ibnorm_export.artifacts.exported_model import ExportedModel
    from ibnorm_export.artifacts.input_files import read_inputs, read_text
    from ibnorm_export.runtimes.registry import check_backend
    from ibnorm_export.verifier.verify import VerifyOptions, verify

    check_backend(backend, engine=engine, provider=provider, npm=npm)  # before the checkpoint is read
    wanted = VerifyOptions(
        backend,
        samples,
        seed=seed,
        static=not numeric_only,
        kernels=kernels,
        require_fused=require_fused,
        layers=layers,
        endpoint=None if url is None else Endpoint(url, name),
        coverage=coverage,
        stress=stress,
        engine=engine,
        provider=provider,
        npm=npm,
        expected=expected,
        expected_dtype=expected_dtype,
    )
    with show_progress() as progress:
        progress("reading the checkpoint", 0, 0)
        words = None if text is None else read_text(text)
        exported = ExportedModel(model_file)
        loaded = models.load(checkpoint, model, task=exported.metadata.task, weights=weights, inputs=exported)
        given = None if inputs is None else [read_inputs(inputs, loaded)]
        report = verify(exported, loaded, options=wanted, inputs=given, text=words, progress=progress)
        if html is not None:
            from ibnorm_export.verifier.html import write_report

            progress("writing the report", 0, 0)
            write_report(report, html)
    files = [exported.path, *exported.external_files, checkpoint, inputs, expected, text, html]
    finish(report, "verify", as_json=as_json, files=files, then=["bench", model_file])
