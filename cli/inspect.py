"""`ibnorm-export inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ibnorm_export.cli import options
from ibnorm_export.cli.console import out, print_json, print_table, table


def inspect_command(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", exists=True, help="An .onnx file, a folder of one, or a checkpoint.")
    ],
    model: options.Factory = None,
    as_json: options.AsJson = False,
) -> None:
    """Say what is in a model or checkpoint: norms, kinds, lambda, types, sizes, operators, metadata.

    Example: ibnorm-export inspect llama.onnx
    """
    from ibnorm_export.artifacts.onnx_file import resolve
    from ibnorm_export.inspection import inspect_checkpoint, inspect_file

    found = inspect_file(path) if resolve(path).suffix == ".onnx" else inspect_checkpoint(path, model)
    if as_json:
        print_json(found)
    else:
        _print(found)


def _print(found: dict[str, Any]) -> None:
    norms = found.pop("norms")
    for key, value in found.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v}" for k, v in value.items()) or "none"
        elif isinstance(value, list):
            value = ", ".join(str(v) for v in value) or "none"
        out.print(f"{key.replace('_', ' ')}: {value}", markup=False)
    rows = table(f"{len(norms)} norms", "module", "op", "lambda", "epsilon")
    for norm in norms:
        rows.add_row(norm["module"], norm["op"], f"{norm['lambda']:g}", f"{norm['epsilon']:.3g}")
    print_table(rows)
