"""`ibnorm-export doctor`."""

from __future__ import annotations

import typer

from ibnorm_export.cli import options
from ibnorm_export.cli.console import out, print_json


def doctor_command(as_json: options.AsJson = False) -> None:
    """Report what works on this machine, what does not, and what to install.

    Example: ibnorm-export doctor
    """
    from ibnorm_export.doctor import diagnose

    diagnosis = diagnose()
    if as_json:
        print_json(diagnosis.to_dict())
    else:
        out.print(str(diagnosis), markup=False)
    if not diagnosis:
        raise typer.Exit(3)
