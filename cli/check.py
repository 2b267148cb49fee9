"""`ibnorm-export check`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ibnorm_export.cli import options
from ibnorm_export.cli.console import out, print_json, print_next, print_table, show_progress, table


def check_command(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="What to export, compare and time.")] = Path(
        "check.toml"
    ),
    init: Annotated[
        Path | None,
        typer.Option(
            "--init", metavar="CHECKPOINT", exists=True, help="Write a commented CONFIG.toml for this checkpoint."
        ),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Run every export, comparison and latency budget of one file; exit 1 when any fails.

    Leaves junit.xml, report.json, report.md (GitHub's Markdown) and report.html in the file's results folder.

    Example: ibnorm-export check --init checkpoints/vit && ibnorm-export check
    """
    from ibnorm_export.gate.config import read_check_config
    from ibnorm_export.gate.report import Outcome, write_all
    from ibnorm_export.gate.run import run_check
    from ibnorm_export.gate.template import write_start

    if init is not None:
        write_start(init, config)
        if as_json:
            print_json({"path": str(config)})
            return
        out.print(f"{config}: written", markup=False)
        print_next("check", config)
        return
    asked = read_check_config(config)
    with show_progress() as progress:
        report = run_check(asked, str(config), progress=progress)
    files = write_all(report, asked.results)
    if as_json:
        print_json({**report.to_dict(), "files": [str(file) for file in files]})
    else:
        shown = [case for case in report.cases if case.outcome is not Outcome.PASS or ".layers" not in case.suite]
        rows = table(f"{config}: {report.counts}, {report.seconds:.0f} s", "where", "what", "outcome", "says")
        for case in shown:
            rows.add_row(case.suite, case.name, case.outcome.value, case.says)
        print_table(rows)
        out.print("written: " + ", ".join(str(file) for file in files), style="dim", markup=False)
        style = "bold green" if report else "bold red"
        out.print(f"verdict: {'pass' if report else 'fail'}", style=style, markup=False)
    if not report:
        raise typer.Exit(1)
