"""`ibnorm-export package`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ibnorm_export.cli import options
from ibnorm_export.cli.console import out, print_json, print_next
from ibnorm_export.serving.triton.config import Limits
from ibnorm_export.serving.triton.repository import Format, PackageOptions, TritonBackend, Variant, package


def package_command(
    model_file: options.ModelFile,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="REPO", help="The folder to write.")],
    kind: Annotated[Format, typer.Option("--format", help="kserve adds an InferenceService.")] = Format.TRITON,
    name: Annotated[str | None, typer.Option("--name", show_default="the file's", help="Of the model.")] = None,
    backend: Annotated[TritonBackend, typer.Option("--backend", help="tensorrt needs --plan.")] = (
        TritonBackend.ONNXRUNTIME
    ),
    variant: Annotated[
        Variant, typer.Option("--variant", help="How the norms run; auto is fused where the library is installed.")
    ] = Variant.AUTO,
    plan: Annotated[
        Path | None, typer.Option("--plan", metavar="MODEL.plan", exists=True, help="From `build-engine`.")
    ] = None,
    mount: Annotated[
        str | None,
        typer.Option("--mount", metavar="PATH", show_default="the format's", help="Where the server sees REPO."),
    ] = None,
    storage_uri: Annotated[str, typer.Option("--storage-uri", help="Where KServe fetches REPO from.")] = "",
    inputs: Annotated[
        Path | None, typer.Option("--inputs", metavar="FILE.npz", exists=True, help="Real inputs to warm up with.")
    ] = None,
    gpu: Annotated[bool, typer.Option("--gpu", help="Run on GPUs.")] = False,
    max_batch: Annotated[int, typer.Option("--max-batch", min=0, help="Rows computed together; 0 for none.")] = 8,
    max_queue: Annotated[int, typer.Option("--max-queue", min=1, help="Requests that may wait.")] = 256,
    queue_timeout: Annotated[
        int, typer.Option("--queue-timeout", min=0, metavar="MS", help="Most wait; 0 for none.")
    ] = 0,
    queue_delay: Annotated[int, typer.Option("--queue-delay", min=0, metavar="US", help="To fill a batch.")] = 0,
    instances: Annotated[int, typer.Option("--instances", min=1, help="Sessions of the model; one alone waits.")] = 2,
    as_json: options.AsJson = False,
) -> None:
    """Write a Triton model repository: config, model, op library, warm-up, manifest, and how to start it.

    Example: ibnorm-export package llama.onnx -o repository --variant both
    """
    from ibnorm_export.artifacts.exported_model import ExportedModel
    from ibnorm_export.artifacts.input_files import read_arrays
    from ibnorm_export.artifacts.kv_cache import input_specs

    model = ExportedModel(model_file)
    given = None if inputs is None else read_arrays(inputs, input_specs(model))
    limits = Limits(
        max_batch, max_queue, queue_timeout_ms=queue_timeout, queue_delay_us=queue_delay, instances=instances
    )
    wanted = PackageOptions(
        kind,
        name,
        backend=backend,
        variant=variant,
        plan=plan,
        mount=mount,
        storage_uri=storage_uri,
        gpu=gpu,
        limits=limits,
        warmup=given,
    )
    made = package(model, output, options=wanted)
    if as_json:
        print_json({"path": str(made.path), "models": made.manifest["models"], "start": made.start})
        return
    for model_name, norms in made.manifest["models"].items():
        out.print(f"{made.path / model_name}: {norms}", markup=False)
    print_next("serve", made.path)
