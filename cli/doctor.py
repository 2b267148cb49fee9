"""`ibnorm-export doctor`."""

from __future__ import annotations

import typer

from ibnorm_export.cli import options
from ibnorm_export.cli.console import out, print_json


def doctor_command(as_json: options.AsJson = False) -> None:
    """Say what works on this machine, what does not, and what to install.

    Example: ibnorm-export doctor
    """
    from ibnorm_export.doctor import diagnose

    diagnosis = diagnose()
    if as_json:
        print_json(diagnosis.to_dict())
    else:
        for check in diagnosis.checks:
            mark = "ok     " if check.works else "missing"
            out.print(f"{mark} {check.name}: {check.found}", style=None if check.works else "yellow", markup=False)
            if check.remedy:
                out.print(f"        {check.remedy}", style="dim", markup=False)
        env = diagnosis.environment
        out.print(
            f"{env['processor']}, {env['cores']} cores, {env['memory_gib']} GiB, Python {env['python']}", style="dim"
        )
    if not diagnosis:
        raise typer.Exit(3)
