"""`ibnorm-export explain`."""

from __future__ import annotations

from typing import Annotated

import typer

from ibnorm_export.cli import options
from ibnorm_export.cli.console import out, print_document
from ibnorm_export.findings.explanation import EXPLANATIONS, explain


def explain_command(
    code: Annotated[
        str | None, typer.Argument(metavar="CODE", show_default=False, help="Code of a finding; without it, list all.")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Explain a finding: what it means, why it matters, what to do, and an example.

    Example: ibnorm-export explain IBN103
    """
    if code is not None:
        found = explain(code)
        if as_json:
            print_document("explain", found.to_dict())
        else:
            out.print(str(found))
    elif as_json:
        print_document("explain", {"findings": [explanation.to_dict() for explanation in EXPLANATIONS.values()]})
    else:
        out.print("\n".join(f"{name}  {explanation.title}" for name, explanation in EXPLANATIONS.items()))
