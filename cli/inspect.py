"""`ibnorm-export inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ibnorm_export.cli import options
from ibnorm_export.cli.console import print_document, print_next, print_report, show_progress


def inspect_command(
    path: Annotated[
        Path,
        typer.Argument(metavar="PATH", exists=True, help="An .onnx file, a folder with a model.onnx, or a checkpoint."),
    ],
    model: options.Factory = None,
    weights: options.Weights = None,
    as_json: options.AsJson = False,
) -> None:
    """Report what is in a model or checkpoint: norms, types, sizes, operators, metadata.

    Example: ibnorm-export inspect llama.onnx
    """
    from ibnorm_export.inspection import CheckpointInspection, inspect

    with show_progress() as progress:
        progress("reading the model", 0, 0)
        found = inspect(path, model, weights=weights)
    if as_json:
        print_document("inspect", found.to_dict(), files=[path])
    else:
        print_report(found)
        is_checkpoint = isinstance(found, CheckpointInspection)
        print_next(*(("export", path, "-o", f"{path.name}.onnx") if is_checkpoint else ("verify", path, "CHECKPOINT")))
