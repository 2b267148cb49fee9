"""`ibnorm-export export`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ibnorm_export.artifacts.metadata import CacheKind, Target, Task
from ibnorm_export.artifacts.runtime_versions import RuntimeName
from ibnorm_export.artifacts.tensors import WeightType
from ibnorm_export.cli import options
from ibnorm_export.cli.console import out, print_document, print_next, print_notes, show_progress
from ibnorm_export.runtimes.runner import Kernels

if TYPE_CHECKING:
    from ibnorm_export.artifacts.exported_model import ExportedModel
    from ibnorm_export.artifacts.loaded_model import LoadedModel


def export_command(
    checkpoint: options.Checkpoint,
    output: Annotated[
        str,  # a Path would lose the slash that ends the name of a folder
        typer.Option(
            "-o",
            "--output",
            metavar="PATH",
            help="File to write; a folder for text-generation and every target but portable.",
        ),
    ],
    task: Annotated[
        Task, typer.Option("--task", help="One pass without a cache (forward), or text generation with one.")
    ] = Task.FORWARD,
    target: Annotated[
        Target,
        typer.Option(
            "--target",
            help="One file for any ONNX runtime (portable), or a folder for onnxruntime-genai, transformers.js or "
            "the formats of OpenVINO and LiteRT.",
        ),
    ] = Target.PORTABLE,
    kernels: Annotated[
        Kernels,
        typer.Option(
            "--kernels",
            help="Whether the fused kernels are put next to the model, for ort-genai: if installed (auto), always "
            "(fused) or never (function).",
        ),
    ] = Kernels.AUTO,
    dtype: Annotated[
        list[WeightType] | None,
        typer.Option(
            "--dtype",
            show_default="fp32; all types for transformers.js, which takes the option several times",
            help="Type of weights and activations. int8 and int4 are for the weights of language models.",
        ),
    ] = None,
    block_size: Annotated[
        int, typer.Option("--block-size", help="Number of weights that share a scale, for int8 and int4.")
    ] = 32,
    head_dtype: Annotated[
        WeightType | None,
        typer.Option(
            "--head-dtype",
            show_default="int8",
            help="Type of the matrix before the logits, for int8 and int4: int8, int4 or fp32.",
        ),
    ] = None,
    opset: Annotated[
        int | None,
        typer.Option(
            "--opset",
            show_default="23 for models of text, 20 for those of images; bf16 needs 22, --cache static 24",
            help="ONNX opset, 18 to 26.",
        ),
    ] = None,
    cache: Annotated[
        CacheKind,
        typer.Option(
            "--cache",
            help="Key-value cache of a portable language model: it grows (dynamic) or has a fixed size (static).",
        ),
    ] = CacheKind.DYNAMIC,
    runtime: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="RUNTIME",
            help=f"Runtime that must run the file: {', '.join(RuntimeName)}, or ort>=VERSION, as in ort>=1.18. It "
            "chooses opset, inlining and fixed sizes.",
        ),
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            "--shape",
            metavar="AXIS=SIZE,...",
            help="Fixed sizes, as in batch_size=1,sequence_length=128; the other axes stay dynamic.",
        ),
    ] = None,
    inline: Annotated[
        bool | None,
        typer.Option(
            "--inline/--no-inline",
            show_default="as --for needs it, else not",
            help="Expand the norms into standard operators, for runtimes without local functions.",
        ),
    ] = None,
    fuse_skip: Annotated[
        bool,
        typer.Option(
            "--fuse-skip/--no-fuse-skip", help="Fuse a residual addition and the norm after it into one node."
        ),
    ] = True,
    model: options.Factory = None,
    weights: options.Weights = None,
    inputs: options.ExampleInputs = None,
    as_json: options.AsJson = False,
) -> None:
    """Write a trained checkpoint as ONNX: one node for each norm, with its definition in the same file.

    With --task text-generation, write a folder that includes the tokenizer.

    Example: ibnorm-export export checkpoints/llama -o llama.onnx
    """
    from ibnorm_export import models
    from ibnorm_export.artifacts.npz import read_npz
    from ibnorm_export.exporter.export import ExportOptions, export, export_weights, task_of
    from ibnorm_export.exporter.options import parse_shape

    needed = task_of(target, task, checkpoint=checkpoint)
    weights_types = dtype or export_weights(target, needed)
    how = [
        ExportOptions.with_weights(
            chosen,
            block_size=block_size,
            head=head_dtype,
            opset=opset,
            inline=inline,
            fuse_skip=fuse_skip,
            cache=cache,
            shape={} if shape is None else parse_shape(shape),
            runtime=runtime,
        )
        for chosen in weights_types
    ]
    with show_progress() as progress:
        progress("reading the checkpoint", 0, 4)
        example = None if inputs is None else read_npz(inputs, "an .npz file of plain arrays")
        loaded = models.load(checkpoint, model, task=needed, weights=weights, inputs=example)
        exported = export(
            loaded, output, options=how[0] if len(how) == 1 else how, target=target, kernels=kernels, progress=progress
        )
    if as_json:
        files = [checkpoint, *([output] if Path(output).is_dir() else [exported.path, *exported.external_files])]
        print_document("export", _document(exported, loaded), files=files)
        return
    _print_export(exported, loaded)
    print_next(
        "verify",
        str(exported.path) if target is Target.TRANSFORMERS_JS else output,
        checkpoint,
        *(["--model", model] if model else []),
        *(["--weights", weights] if weights else []),
    )


def _document(exported: ExportedModel, loaded: LoadedModel) -> dict[str, Any]:
    return {
        "path": str(exported.path),
        "size_bytes": exported.size_bytes,
        "norms": len(exported.norms),
        "opset": exported.opset,
        "dtype": exported.dtype,
        "inputs": [asdict(t) for t in exported.inputs],
        "outputs": [asdict(t) for t in exported.outputs],
        "notes": list(loaded.notes),
        "warnings": list(loaded.warnings),
        "metadata": exported.metadata.to_dict(),
    }


def _print_export(exported: ExportedModel, loaded: LoadedModel) -> None:
    from ibnorm_export.artifacts.runtime_versions import required_versions

    print_notes(loaded.notes, loaded.warnings)
    out.print(str(exported))
    oldest = " and ".join(f"{name} {version}" for name, version in required_versions(exported).items())
    out.print(f"runs on {oldest} or later")
