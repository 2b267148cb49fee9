"""`ibnorm-export build-engine`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ibnorm_export.cli import options
from ibnorm_export.cli.console import print_document, print_next, print_report, show_progress
from ibnorm_export.runtimes.tensorrt.options import EngineOptions, NormRoute, Runtime


def build_engine_command(
    model_file: options.ModelFile,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="MODEL.plan", help="The file to write.")],
    runtime: Annotated[Runtime, typer.Option("--runtime", help="Runtime to build for.")] = Runtime.TENSORRT,
    norm: Annotated[
        NormRoute, typer.Option("--norm", help="How the norms run; auto is the function.")
    ] = NormRoute.AUTO,
    profile: Annotated[
        list[str] | None,
        typer.Option(
            "--profile",
            metavar="[PROFILE:]AXIS=MINxOPTxMAX",
            help="Sizes of a dynamic axis; may be repeated. A model with a cache has the profiles prefill and decode.",
        ),
    ] = None,
    workspace: Annotated[
        int | None, typer.Option("--workspace", metavar="BYTES", help="Maximum scratch memory of a layer.")
    ] = None,
    timing_cache: Annotated[
        Path | None,
        typer.Option("--timing-cache", metavar="FILE", help="File to read and write measured times; tensorrt only."),
    ] = None,
    embed_plugin: Annotated[
        bool, typer.Option("--embed-plugin", help="Put the plugin library into the plan; tensorrt only.")
    ] = False,
    compute_capability: Annotated[
        str,
        typer.Option(
            "--compute-capability", metavar="LIST", help="GPUs to build for, e.g. sm_89,sm_120; tensorrt-rtx only."
        ),
    ] = "",
    as_json: options.AsJson = False,
) -> None:
    """Build a TensorRT engine, and report what each norm became. TensorRT-RTX needs no GPU to build.

    Example: ibnorm-export build-engine llama.onnx -o llama.plan --runtime tensorrt-rtx
    """
    from ibnorm_export.runtimes.tensorrt.build import build_engine

    wanted = EngineOptions(
        runtime,
        norm,
        ranges=profile or (),
        workspace_bytes=workspace,
        timing_cache=timing_cache,
        embed_plugin=embed_plugin,
        compute_capabilities=compute_capability,
    )
    with show_progress() as progress:
        progress("building the engine", 0, 0)
        engine = build_engine(model_file, output, options=wanted)
    if as_json:
        print_document("build-engine", engine.to_dict(), files=[model_file, engine.path])
    else:
        print_report(engine)
        print_next("bench", model_file, "--backend", runtime.value, "--engine", output)
