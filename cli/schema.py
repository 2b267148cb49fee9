"""`ibnorm-export schema`."""

from __future__ import annotations

from typing import Annotated

import typer

from ibnorm_export.cli import options
from ibnorm_export.cli.console import out, print_json
from ibnorm_export.json_document import json_schema, schema_names


def schema_command(
    command: Annotated[
        str | None,
        typer.Argument(
            metavar="COMMAND", show_default=False, help="Command whose --json is described; without it, list them."
        ),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Print the JSON Schema of what a command prints with --json.

    Example: ibnorm-export schema verify
    """
    if command is not None:
        print_json(json_schema(command))
    elif as_json:
        print_json({"commands": schema_names()})
    else:
        out.print("\n".join(schema_names()))
