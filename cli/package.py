"""`ibnorm-export package`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from ibnorm_export.cli import options
from ibnorm_export.cli.console import print_aside, print_document, print_next, print_report, show_progress
from ibnorm_export.serving.triton.config import TritonLimits
from ibnorm_export.serving.triton.options import PackagedNorms, PackageOptions, RepositoryFormat, TritonBackend


def package_command(
    model_file: options.ModelFile,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="REPO", help="The folder to write.")],
    kind: Annotated[
        RepositoryFormat, typer.Option("--format", help="Software that reads REPO; kserve adds an InferenceService.")
    ] = RepositoryFormat.TRITON,
    name: Annotated[
        str | None, typer.Option("--name", show_default="the file's name", help="Name of the model.")
    ] = None,
    backend: Annotated[
        TritonBackend, typer.Option("--backend", help="What runs the model inside Triton; tensorrt needs --plan.")
    ] = TritonBackend.ONNXRUNTIME,
    variant: Annotated[
        PackagedNorms, typer.Option("--variant", help="How the norms run; auto is fused if the library is installed.")
    ] = PackagedNorms.AUTO,
    plan: Annotated[
        Path | None,
        typer.Option("--plan", metavar="MODEL.plan", exists=True, help="A plan that `build-engine` wrote."),
    ] = None,
    mount: Annotated[
        str | None,
        typer.Option("--mount", metavar="PATH", show_default="the format's", help="Path of REPO on the server."),
    ] = None,
    storage_uri: Annotated[str, typer.Option("--storage-uri", help="Address from which KServe fetches REPO.")] = "",
    inputs: Annotated[
        Path | None,
        typer.Option(
            "--inputs", metavar="FILE.npz", exists=True, help="Inputs for the warm-up instead of random ones."
        ),
    ] = None,
    gpu: Annotated[bool, typer.Option("--gpu", help="Run on GPUs.")] = False,
    max_batch: Annotated[
        int, typer.Option("--max-batch", min=0, help="Maximum number of rows in a batch; 0 disables batching.")
    ] = 8,
    max_queue: Annotated[int, typer.Option("--max-queue", min=1, help="Maximum number of waiting requests.")] = 256,
    queue_timeout: Annotated[
        int,
        typer.Option(
            "--queue-timeout", min=0, metavar="MS", help="Maximum time that a request waits; 0 means no limit."
        ),
    ] = 0,
    queue_delay: Annotated[
        int, typer.Option("--queue-delay", min=0, metavar="US", help="Maximum time to wait for a fuller batch.")
    ] = 0,
    instances: Annotated[int, typer.Option("--instances", min=1, help="Number of sessions of the model.")] = 2,
    as_json: options.AsJson = False,
) -> None:
    """Write a Triton model repository: config, model, op library, warm-up inputs, manifest, and how to start it.

    Example: ibnorm-export package llama.onnx -o repository --variant both
    """
    from ibnorm_export.serving.triton.repository import package

    wanted = PackageOptions(
        kind,
        name,
        backend=backend,
        variant=variant,
        plan=plan,
        mount=mount,
        storage_uri=storage_uri,
        gpu=gpu,
        limits=TritonLimits(
            max_batch, max_queue, queue_timeout_ms=queue_timeout, queue_delay_us=queue_delay, instances=instances
        ),
        warmup=inputs,
    )
    with show_progress() as progress:
        progress("writing the repository", 0, 0)
        packaged = package(model_file, output, options=wanted)
    if as_json:
        print_document("package", packaged.to_dict(), files=[model_file, packaged.path])
    else:
        print_report(packaged)
        if kind is RepositoryFormat.KSERVE:
            service = shlex.quote(str(packaged.path / "inferenceservice.yaml"))
            where = storage_uri or "the storageUri in it"
            print_aside(f"next: upload {packaged.path} to {where}, then: kubectl apply -f {service}")
        else:
            print_next("serve", packaged.path)
