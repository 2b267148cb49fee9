"""`ibnorm-export demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ibnorm_export.cli import options
from ibnorm_export.cli.console import print_aside, print_document, print_next, print_report, show_progress
from ibnorm_export.cli.demo_app import MAX_STEPS
from ibnorm_export.errors import ExitCode


def demo_command(
    folder: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for all results.")] = Path("demo"),
    max_steps: Annotated[
        int,
        typer.Option(
            "--max-steps", min=1, help="Maximum number of training steps. Training ends when a model is good enough."
        ),
    ] = MAX_STEPS,
    text: Annotated[
        Path | None,
        typer.Option(
            "--text",
            metavar="FILE",
            exists=True,
            show_default="CPython's documentation",
            help="Text to train the LLaMA on.",
        ),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Train two small models, and export, verify and benchmark them. Nothing is downloaded.

    Example: ibnorm-export demo --out demo
    """
    from ibnorm_export.cli.demo_app.app import run_demo
    from ibnorm_export.cli.demo_app.report import write_report

    with show_progress() as progress:
        result = run_demo(folder, max_steps=max_steps, text=text, progress=progress)
        report = write_report(result, folder / "report.html")
    if as_json:
        print_document("demo", {**result.to_dict(), "report": str(report)}, files=[report])
    else:
        print_report(result)
        print_aside(f"Open the page with the results: {report.resolve().as_uri()}")
        print_next("generate", folder / "llama-portable", "The import statement")
    if not result:
        raise typer.Exit(ExitCode.CHECK_FAILED)
