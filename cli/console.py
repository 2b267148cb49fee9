"""What commands print: text and tables for people, progress on stderr, one JSON object for programs."""

from __future__ import annotations

import contextlib
import enum
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import typer
from rich.console import Console

from ibnorm_export.errors import ExitCode, printable
from ibnorm_export.json_text import json_text
from ibnorm_export.progress import silent
from ibnorm_export.text_report import text_width

if TYPE_CHECKING:
    from ibnorm_export.progress import Progress

__all__ = [
    "Verbosity",
    "err",
    "finish",
    "first_code",
    "out",
    "print_aside",
    "print_document",
    "print_json",
    "print_next",
    "print_notes",
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


def print_aside(text: str) -> None:
    """Print on stderr what is not the result, such as the next step; nothing with --quiet."""
    if err.verbosity > Verbosity.QUIET:
        out.file.flush()  # the two may be one file or terminal
        err.print(text, style="dim")


def print_next(*words: object) -> None:
    """Print on stderr the command that a person would run next, quoted for a shell; nothing with --quiet."""
    if words:
        print_aside(f"next: {shlex.join(['ibnorm-export', *map(str, words)])}")


def print_report(report: object) -> None:
    """Print the text of a report, with its verdict, failures, notes and warnings in colour.

    On a terminal, tables that do not fit are stacked. With --quiet, notes are left out.
    """
    with text_width(out.width if out.is_terminal else None):
        text = str(report)
    for line in text.split("\n"):
        if err.verbosity == Verbosity.QUIET and line.startswith("note: "):
            continue
        out.print(line, style=_style(line))


def print_notes(notes: Iterable[str], warnings: Iterable[str] = ()) -> None:
    """Print notes and warnings; with --quiet, notes are left out."""
    if err.verbosity > Verbosity.QUIET:
        for note in notes:
            out.print(f"note: {note}")
    for warning in warnings:
        out.print(f"warning: {warning}", style="yellow")


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
    then: Sequence[object] = (),
    failure: ExitCode = ExitCode.CHECK_FAILED,
) -> None:
    """Print a report as text or JSON, and end the command with `failure` when the report is false.

    Args:
        report: the result.
        command: name of the command.
        as_json: whether it is printed as JSON.
        files: the files that the command read and wrote, for the JSON.
        then: words of the command that a person would run next; a report that is false names the one that explains it.
        failure: the exit code for a report that is false.

    Raises:
        typer.Exit: the report is false.
    """
    if as_json:
        print_document(command, report.to_dict(), files=files)
    else:
        print_report(report)
        code = first_code(report)
        print_next(*(then if report else () if code is None else ("explain", code)))
    if not report:
        raise typer.Exit(failure)


def first_code(report: object) -> str | None:
    """The code of the first finding of a report; None if it has none."""
    for name in ("findings", "red"):
        for finding in getattr(report, name, ()):
            if finding.code is not None:
                return str(finding.code)
    code = getattr(report, "code", None) or getattr(getattr(report, "verdict", None), "code", None)
    return None if code is None else str(code)


def _style(line: str) -> str:
    if line.startswith("verdict:"):
        return "bold green" if line.startswith("verdict: pass") else "bold red"
    if line.startswith("FAIL"):
        return "red"
    return "yellow" if line.startswith(("note:", "warning:", "missing ")) else ""


#: Seconds after which a step that has ended is worth a line where there is no terminal.
_LONG_S: Final = 2.0


class _Steps:
    """Prints a line for each step that has ended: for long ones, or for all with --verbose.

    Args:
        every: whether short steps have a line too.
    """

    def __init__(self, *, every: bool) -> None:
        self._every = every
        self._what = ""
        self._start = time.perf_counter()

    def __call__(self, what: str, done: int = 0, total: int = 0) -> None:
        if what == self._what:
            return
        seconds = time.perf_counter() - self._start
        if self._what and (self._every or seconds >= _LONG_S):
            err.print(f"{seconds:6.1f} s  {self._what}", style="dim")
        self._what, self._start = what, time.perf_counter()


@contextlib.contextmanager
def show_progress() -> Iterator[Progress]:
    """Show on stderr how far the block is, and the time left; where there is no terminal, a line for each long step."""
    err.clear_loading()
    steps = _Steps(every=err.verbosity is Verbosity.VERBOSE)
    if err.verbosity is Verbosity.QUIET:
        yield silent
    elif err.is_terminal and not err.is_dumb_terminal:
        with _bar() as show:

            def report(what: str, done: int, total: int) -> None:
                if err.verbosity is Verbosity.VERBOSE:
                    steps(what)
                show(what, done, total)

            yield report
    else:
        yield steps
    steps("")


@contextlib.contextmanager
def _bar() -> Iterator[Progress]:
    """A bar with the time left, which starts again with every step."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=err,
        transient=True,
    ) as bar:
        task = bar.add_task("", total=None)
        shown = ""

        def report(what: str, done: int, total: int) -> None:
            nonlocal shown
            if what != shown:
                shown = what
                bar.reset(task, total=total or None, description=what, completed=done)
            else:
                bar.update(task, completed=done, total=total or None)

        yield report
