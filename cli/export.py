"""`ibnorm-export export`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ibnorm_export.artifacts.metadata import CacheKind, Target, Task
from ibnorm_export.artifacts.tensors import WeightType
from ibnorm_export.cli import options
from ibnorm_export.cli.console import out, print_json, print_next, show_progress
from ibnorm_export.runtimes.runner import Kernels


def export_command(
    checkpoint: options.Checkpoint,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="PATH", help="The file to write; for text-generation, the folder.")
    ],
    task: Annotated[
        Task, typer.Option("--task", help="What to export: forward (no cache) or text-generation.")
    ] = Task.FORWARD,
    target: Annotated[
        Target,
        typer.Option("--target", help="portable (any ONNX runtime), or ort-genai: a folder for onnxruntime-genai."),
    ] = Target.PORTABLE,
    kernels: Annotated[
        Kernels,
        typer.Option(
            "--kernels",
            help="For ort-genai: the op library beside the model where installed (auto), "
            "always (fused), or not (function).",
        ),
    ] = Kernels.AUTO,
    dtype: Annotated[
        WeightType,
        typer.Option("--dtype", help="Of weights and activations; int8 and int4 are of a language model's weights."),
    ] = WeightType.FP32,
    block_size: Annotated[
        int, typer.Option("--block-size", help="Weights that share a scale, for int8 and int4.")
    ] = 32,
    head_dtype: Annotated[
        WeightType,
        typer.Option("--head-dtype", help="Of the matrix before the logits, for int8 and int4: int8, int4, fp32."),
    ] = WeightType.INT8,
    opset: Annotated[
        int | None,
        typer.Option(
            "--opset",
            show_default="LLaMA, GPT-2 23, others 20; bf16 at least 22, --cache static 24",
            help="18 to 26.",
        ),
    ] = None,
    cache: Annotated[
        CacheKind,
        typer.Option("--cache", help="Of a portable language model: dynamic, or static (kept in place, opset 24)."),
    ] = CacheKind.DYNAMIC,
    inline: Annotated[
        bool, typer.Option("--inline", help="Expand the norms, for runtimes without local functions (OpenVINO).")
    ] = False,
    fuse_skip: Annotated[
        bool, typer.Option("--fuse-skip/--no-fuse-skip", help="One SkipIBNorm for a residual Add and its norm.")
    ] = True,
    model: options.Factory = None,
    as_json: options.AsJson = False,
) -> None:
    """Write a trained checkpoint as ONNX, one node per norm and its meaning beside it: one file, or for text
    generation a folder with the tokenizer.

    Example: ibnorm-export export checkpoints/llama -o llama.onnx
    """
    from ibnorm_export import models
    from ibnorm_export.exporter.export import ExportOptions, export, task_of

    how = ExportOptions.with_weights(
        dtype,
        block_size=block_size,
        head=head_dtype,
        opset=opset,
        inline=inline,
        fuse_skip=fuse_skip,
        cache=cache,
    )
    with show_progress() as progress:
        progress("reading the checkpoint", 0, 4)
        loaded = models.load(checkpoint, model, task=task_of(target, task))
        exported = export(loaded, output, options=how, target=target, kernels=kernels, progress=progress)
    if as_json:
        print_json(
            {
                "path": str(exported.path),
                "size_bytes": exported.size_bytes,
                "norms": len(exported.norms),
                "opset": exported.opset,
                "dtype": exported.dtype,
                "inputs": [asdict(t) for t in exported.inputs],
                "outputs": [asdict(t) for t in exported.outputs],
                "warnings": list(loaded.warnings),
                "metadata": exported.metadata.to_dict(),
            }
        )
        return
    for warning in loaded.warnings:
        out.print(f"warning: {warning}", style="yellow", markup=False)
    norms = "norms expanded" if inline else f"{len(exported.norms)} IBNorm nodes"
    quantization = exported.metadata.quantization
    stored = exported.dtype if quantization is None else f"int{quantization.bits} weights"
    out.print(
        f"{exported.path}: {exported.size_bytes / 1e6:.1f} MB, {stored}, opset {exported.opset}, {norms}",
        markup=False,
    )
    print_next("verify", output, checkpoint, *(["--model", model] if model else []))
