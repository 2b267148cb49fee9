"""What commands print: text and tables for people, progress on stderr, one JSON object for programs."""

from __future__ import annotations

import contextlib
import enum
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import typer
from rich.console import Console

from ibnorm_export.errors import ExitCode, printable
from ibnorm_export.json_text import json_text

if TYPE_CHECKING:
    from ibnorm_export.progress import Progress

__all__ = [
    "Verbosity",
    "err",
    "finish",
    "out",
    "print_document",
    "print_json",
    "print_next",
    "print_report",
    "show_progress",
]

#: Clears the line of a terminal that the cursor is in.
_CLEAR_LINE: Final = "\r\x1b[2K"


class Verbosity(enum.IntEnum):
    """How much a command prints besides its result."""

    QUIET = 0
    NORMAL = 1
    VERBOSE = 2


class _Console(Console):
    """A console that raises when its stream breaks, and does not touch the other stream.

    Texts are printed as they are: "[gpu]" in a command to type is not a style.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, soft_wrap=True, **settings)

    def on_broken_pipe(self) -> None:
        raise  # the BrokenPipeError that rich is handling

    def print(self, *values: Any, **settings: Any) -> None:
        """Print values; control characters in a text, which may be a name from a file, are escaped."""
        super().print(*(printable(value) if isinstance(value, str) else value for value in values), **settings)


class _ErrorConsole(_Console):
    """The console of stderr. On a terminal it shows at once that a command is loading."""

    verbosity = Verbosity.NORMAL
    _loading = False

    def show_loading(self, what: str) -> None:
        """Show `what` until something else is printed; show nothing if stderr is not a terminal."""
        if self.is_terminal and not self.is_dumb_terminal:
            self._loading = True
            self._write(f"{what} ...")

    def clear_loading(self) -> None:
        """Clear what `show_loading` shows."""
        if self._loading:
            self._loading = False
            self._write(_CLEAR_LINE)

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):  # a terminal that has been closed
            self.file.write(text)
            self.file.flush()

    def print(self, *values: Any, **settings: Any) -> None:
        self.clear_loading()
        super().print(*values, **settings)


err = _ErrorConsole(stderr=True)


class _OutputConsole(_Console):
    """The console of stdout, which may be the same terminal as that of stderr."""

    def print(self, *values: Any, **settings: Any) -> None:
        err.clear_loading()
        super().print(*values, **settings)


# without a terminal, lines are not folded at the 80 columns that rich assumes
out = _OutputConsole(width=None if sys.stdout.isatty() else 160)


def print_document(command: str, content: Mapping[str, Any], *, files: Iterable[str | Path | None] = ()) -> None:
    """Print the result of a command as the JSON that its schema describes; see `json_document`."""
    from ibnorm_export.json_document import json_document

    print_json(json_document(command, content, files=files))


def print_json(value: Any) -> None:
    """Print one JSON object on stdout; NaN and infinity, which JSON lacks, become strings."""
    err.clear_loading()
    sys.stdout.write(json_text(value) + "\n")


def print_next(*words: object) -> None:
    """Print the command that a person would run next, quoted for a shell."""
    out.print(f"next: {shlex.join(['ibnorm-export', *map(str, words)])}", style="dim")


def print_report(report: object) -> None:
    """Print the text of a report, with its verdict, failures, notes and warnings in colour."""
    for line in str(report).split("\n"):
        out.print(line, style=_style(line))


class _Verdict(Protocol):
    """A report that is true when it passes."""

    def __bool__(self) -> bool: ...

    def to_dict(self) -> dict[str, Any]: ...


def finish(
    report: _Verdict,
    command: str,
    *,
    as_json: bool,
    files: Iterable[str | Path | None] = (),
    failure: ExitCode = ExitCode.CHECK_FAILED,
) -> None:
    """Print a report as text or JSON, and end the command with `failure` when the report is false.

    Args:
        report: the result.
        command: name of the command.
        as_json: whether it is printed as JSON.
        files: the files that the command read and wrote, for the JSON.
        failure: the exit code for a report that is false.

    Raises:
        typer.Exit: the report is false.
    """
    if as_json:
        print_document(command, report.to_dict(), files=files)
    else:
        print_report(report)
    if not report:
        raise typer.Exit(failure)


def _style(line: str) -> str:
    if line.startswith("verdict:"):
        return "bold green" if line.startswith("verdict: pass") else "bold red"
    if line.startswith("FAIL"):
        return "red"
    return "yellow" if line.startswith(("note:", "warning:", "missing ")) else ""


@contextlib.contextmanager
def show_progress() -> Iterator[Progress]:
    """Show a progress bar on stderr while the block runs; show nothing if stderr is not a terminal."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
    )

    err.clear_loading()
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
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
