"""`ibnorm-export compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ibnorm_export.cli import options
from ibnorm_export.cli.console import out, print_json, print_table, table


def compare_command(
    before: Annotated[Path, typer.Argument(metavar="A.json", help="Baseline of `bench --save-baseline`.")],
    after: Annotated[Path, typer.Argument(metavar="B.json", help="A later one.")],
    budget: Annotated[float, typer.Option("--max-ratio", min=0.0, help="The largest B / A that is allowed.")] = 1.0,
    html: Annotated[
        Path | None, typer.Option("--report", metavar="FILE.html", callback=options.page, help="Plot both.")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Say whether B is slower than A, by times over a yardstick and a confidence interval; exit 1 when it is.

    Example: ibnorm-export compare monday.json friday.json
    """
    from ibnorm_export.benchmark.baseline import compare, read_baseline
    from ibnorm_export.benchmark.statistics import Decision, to_dict

    a, b = read_baseline(before), read_baseline(after)
    verdict, notes = compare(b, a, budget=budget)
    if html is not None:
        from ibnorm_export.benchmark.html import write_comparison  # with matplotlib

        write_comparison(a, b, verdict=verdict, notes=notes, path=html)
    if as_json:
        print_json({"verdict": verdict.decision.value, **to_dict(verdict), "notes": notes})
    else:
        rows = table(f"{a.model} and {b.model}", "", "median ms", "median over yardstick", "rounds")
        for name, kept in ((str(before), a), (str(after), b)):
            middle = sorted(kept.times_ms)[len(kept.times_ms) // 2]
            over = sorted(kept.ratios)[len(kept.ratios) // 2]
            rows.add_row(name, f"{middle:.3f}", f"{over:.3f}", str(len(kept.times_ms)))
        print_table(rows)
        for note in notes:
            out.print(f"note: {note}", style="yellow", markup=False)
        out.print(f"B over A: {verdict}", markup=False)
    if verdict.decision is Decision.FAIL:
        raise typer.Exit(1)
