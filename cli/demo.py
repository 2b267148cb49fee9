"""`ibnorm-export demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ibnorm_export.cli import options
from ibnorm_export.cli.console import out, print_json, show_progress
from ibnorm_export.cli.verify import print_report as print_parity


def demo_command(
    folder: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where everything goes.")] = Path("demo"),
    minutes: Annotated[float, typer.Option("--minutes", help="Of training for each of the two models.")] = 0.5,
    text: Annotated[
        Path | None,
        typer.Option(
            "--text", metavar="FILE", exists=True, show_default="CPython's docs", help="Your own text to train on."
        ),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Do the main job on real input, with nothing to download: train, export, verify, benchmark, report.

    Example: ibnorm-export demo --out demo
    """
    from ibnorm_export.cli.demo_app.demo import run_demo
    from ibnorm_export.cli.demo_app.report import write_report

    with show_progress() as progress:
        result = run_demo(folder, minutes, text=text, progress=progress)
        report = write_report(result, folder / "report.html")
    if as_json:
        print_json({**result.to_dict(), "report": str(report)})
    else:
        for model in result.models:
            out.print(f"{model.name}: {model.norm}", style="bold", markup=False)
            out.print(f"trained to {model.goal}: {'reached' if model.reached else 'NOT reached'}", markup=False)
            for parity in model.parity:
                print_parity(parity)
            out.print(str(model.latency), markup=False)
        out.print("the LLaMA writes, with one seed", style="bold", markup=False)
        for writing in result.text.writings:
            out.print(f"{writing.form}: {result.text.prompt}{writing.result.text}", markup=False)
        out.print(
            f"the forms in fp32 wrote {'the same text as PyTorch' if result.text.same else 'ANOTHER text'}",
            markup=False,
        )
        if result.text.missing:
            out.print(f"note: {result.text.missing}", style="yellow", markup=False)
        out.print(f"report: {report}", style="bold", markup=False)
        out.print(f"verdict: {'pass' if result else 'fail'}", style="bold", markup=False)
    if not result:
        raise typer.Exit(1)
