"""How commands talk: people read stderr and tables, programs read one JSON object on stdout."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from ibnorm_export import progress as progress_module
from ibnorm_export.runtimes.norm_executions import NormExecution

__all__ = ["err", "out", "print_json", "print_next", "print_norms", "print_table", "show_progress", "table"]


class _Console(Console):
    """One that leaves the other stream alone where nobody reads its own any more."""

    def on_broken_pipe(self) -> None:
        raise  # what rich handles at this moment


# piped output is not folded at the 80 columns that a missing terminal is taken to have
out = _Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)
err = _Console(stderr=True, highlight=False, soft_wrap=True)

#: Characters of a word that a table keeps whole: a module's name, not a path.
_LONGEST_WORD: Final = 48


def print_json(value: Any) -> None:
    """One JSON object on stdout; NaN and infinity, which JSON lacks, as strings."""

    def clean(v: Any) -> Any:
        if isinstance(v, dict):
            return {str(k): clean(x) for k, x in v.items()}
        if isinstance(v, (list, tuple)):
            return [clean(x) for x in v]
        if isinstance(v, float) and (v != v or v in (float("inf"), float("-inf"))):
            return str(v)
        return v

    sys.stdout.write(json.dumps(clean(value), indent=2) + "\n")


def print_next(*words: object) -> None:
    """The command that a person would run next, as a shell takes it."""
    out.print(f"next: {shlex.join(['ibnorm-export', *map(str, words)])}", style="dim", markup=False)


def table(title: str, *columns: str) -> Table:
    """A table whose first column is text and whose others are numbers."""
    made = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    return made


def print_table(rows: Table) -> None:
    """As wide as the terminal; wider where a number or a name would be broken: the terminal then folds whole lines."""
    for column in rows.columns:
        words = " ".join(map(str, (column.header, *column.cells))).split()
        column.min_width = min(max(map(len, words), default=0), _LONGEST_WORD)
    out.print(rows)


def print_norms(norms: Sequence[NormExecution]) -> None:
    """How the norms ran, in one line."""
    if not norms:
        return
    fused = [norm for norm in norms if norm.implementation == "fused"]
    copies = sum(norm.copies for norm in norms)
    beside = f", {copies} memory copies beside them" if copies else ""
    out.print(f"norms: {len(fused)} of {len(norms)} ran as fused kernels{beside}", style="dim", markup=False)


@contextlib.contextmanager
def show_progress() -> Iterator[progress_module.Progress]:
    """A bar on stderr while the block runs; nothing where stderr is not a terminal."""
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    ) as bar:
        task = bar.add_task("", total=None)

        def report(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total or None)

        yield report
