"""`ibnorm-export compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ibnorm_export.benchmark.options import Difference
from ibnorm_export.cli import options
from ibnorm_export.cli.console import finish


def compare_command(
    before: Annotated[Path, typer.Argument(metavar="A.json", help="A file that `bench --save-baseline` wrote.")],
    after: Annotated[Path, typer.Argument(metavar="B.json", help="A later file, which is compared with A.")],
    max_ratio: Annotated[
        float, typer.Option("--max-ratio", min=0.0, help="The largest ratio of B to A that passes.")
    ] = 1.0,
    allow: Annotated[
        str,
        typer.Option(
            "--allow",
            metavar="LIST",
            help=f"Compare although these differ: {', '.join(Difference)}.",
        ),
    ] = "",
    html: Annotated[
        Path | None,
        typer.Option("--report", metavar="FILE.html", callback=options.page, help="Write a page that plots both."),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Decide whether B is slower than A, from a confidence interval of its times; exit 1 if it is.

    Times are relative to a reference load. If inputs, threads, types, kernels, processors or runtimes differ, the
    times are not comparable, and the exit code is 2.

    Example: ibnorm-export compare monday.json friday.json
    """
    from ibnorm_export.benchmark.baseline import compare_baselines

    allowed = [name.strip() for name in allow.split(",") if name.strip()]
    comparison = compare_baselines(before, after, max_ratio=max_ratio, allow=allowed)
    if html is not None:
        from ibnorm_export.benchmark.html import write_comparison

        write_comparison(comparison, html)
    finish(comparison, "compare", as_json=as_json, files=[before, after, html], then=["check"])
