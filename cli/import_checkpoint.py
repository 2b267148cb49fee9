"""`ibnorm-export import`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ibnorm_export.cli import options
from ibnorm_export.cli.console import print_document, print_next, print_report, show_progress
from ibnorm_export.errors import quoted
from ibnorm_export.parsing import parse_json


def _json_object(text: str | None, option: str) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        value = parse_json(text)
    except ValueError as error:
        raise typer.BadParameter(f"{option} is not valid JSON: {error}; quote it for the shell") from error
    if not isinstance(value, dict):
        raise typer.BadParameter(f"{option} is {quoted(text)}; it must be a JSON object")
    return value


def import_checkpoint_command(
    source: Annotated[
        Path,
        typer.Argument(metavar="SOURCE", exists=True, help="Checkpoint file or folder that your training code wrote."),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help="Folder to write.")],
    kind: Annotated[
        str,
        typer.Option(
            "--from",
            metavar="KIND",
            help="Training code: nanogpt, galore, timm, torchvision, lightning, dcp, litgpt, or auto, which looks at "
            "the names of the tensors.",
        ),
    ] = "auto",
    norm_class: Annotated[
        str | None,
        typer.Option(
            "--norm-class",
            metavar="MODULE:CLASS",
            help="Your norm class. Each norm is built, given its weights, and measured.",
        ),
    ] = None,
    norm_args: Annotated[
        str | None,
        typer.Option("--norm-args", metavar="JSON", help="Arguments of the class that the checkpoint does not state."),
    ] = None,
    norm: Annotated[
        str | None,
        typer.Option(
            "--norm",
            metavar="JSON",
            help="What the norms compute, as in the ibnorm section of config.json; in place of --norm-class.",
        ),
    ] = None,
    weights: options.Weights = None,
    settings: Annotated[
        str | None,
        typer.Option("--settings", metavar="JSON", help="Settings of the model that the checkpoint does not state."),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            "--tokenizer", metavar="PATH", help="A tokenizer.json, its folder, or the meta.pkl of nanoGPT's characters."
        ),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Turn the checkpoint of your training code into a folder that every other command takes.

    Example: ibnorm-export import out/ckpt.pt -o gpt --norm-class model:IBNorm
    """
    stated = _json_object(norm, "--norm")
    arguments, given = _json_object(norm_args, "--norm-args"), _json_object(settings, "--settings")
    from ibnorm_export.models.checkpoint_import import import_checkpoint

    with show_progress() as progress:
        report = import_checkpoint(
            source,
            output,
            kind=kind,
            norm=stated,
            norm_class=norm_class,
            norm_args=arguments,
            weights=weights,
            settings=given,
            tokenizer=tokenizer,
            progress=progress,
        )
    if as_json:
        print_document("import", report.to_dict(), files=[source, output])
        return
    print_report(report)
    exported = f"{output.name}-exported"
    if report.causal and report.tokenizer:
        print_next("export", output, "-o", exported, "--task", "text-generation")
    else:
        print_next("export", output, "-o", f"{output.name}.onnx")
