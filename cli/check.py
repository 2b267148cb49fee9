"""`ibnorm-export check`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ibnorm_export.cli import options
from ibnorm_export.cli.console import Verbosity, err, finish, out, print_document, print_next, show_progress
from ibnorm_export.verifier.options import InputCoverage

if TYPE_CHECKING:
    from ibnorm_export.gate.case import Case
    from ibnorm_export.gate.report import CheckReport


def check_command(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG.toml", help="The file that names what to export, compare and time.")
    ] = Path("check.toml"),
    init: Annotated[
        Path | None,
        typer.Option(
            "--init", metavar="CHECKPOINT", exists=True, help="Write a commented CONFIG.toml for this checkpoint."
        ),
    ] = None,
    coverage: Annotated[
        InputCoverage | None,
        typer.Option(
            "--coverage",
            show_default="the file's",
            help="Which random inputs to run: fast leaves out the longest sequence, a large batch and large values.",
        ),
    ] = None,
    weights: options.Weights = None,
    as_json: options.AsJson = False,
) -> None:
    """Run every export, comparison and latency budget of one file; exit 1 if any of them fails.

    Writes junit.xml, report.json, report.md (GitHub's Markdown) and report.html into the results folder of the file.

    Example: ibnorm-export check --init checkpoints/vit && ibnorm-export check
    """
    if init is not None:
        from ibnorm_export.gate.template import write_template

        write_template(init, config, weights=weights)
        if as_json:
            print_document("check", {"path": str(config)}, files=[config])
            return
        out.print(f"{config}: written")
        print_next("check", config)
        return
    if config.is_dir():
        file = config / "check.toml"
        found = (
            f"it has one: ibnorm-export check {file}"
            if file.is_file()
            else f"write one: ibnorm-export check --init {config}"
        )
        raise typer.BadParameter(f"{config} is a folder, and check takes a configuration file; {found}")
    from ibnorm_export.gate.run import check

    with show_progress() as progress:
        report = check(config, coverage=coverage, progress=progress, on_case=_print_case)
    finish(report, "check", as_json=as_json, files=[config], then=_following(report))


def _following(report: CheckReport) -> Sequence[str]:
    """What to type after a check that passes: serve the first export."""
    first = next(iter(report.exported.values()), None)
    if first is None:
        return ()
    return ("serve", first) if Path(first).is_dir() else ("package", first, "-o", "repository")


def _print_case(case: Case) -> None:
    """Print a line about a case that is decided, where there is no terminal and so no bar; layers have none."""
    if not err.is_terminal and err.verbosity > Verbosity.QUIET and not case.suite.endswith(".layers"):
        err.print(f"{case.seconds:6.1f} s  {case.suite}  {case.name}: {case.outcome.value}", style="dim")
