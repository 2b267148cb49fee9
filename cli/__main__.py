"""The process of `ibnorm-export`: an interrupt ends it in an orderly way at any moment.

SIGTERM raises KeyboardInterrupt, as Ctrl-C does, from the start of the process: a command may take seconds to load.
Python discards exceptions that are raised in its own callbacks (finalizers, weak references, hooks around a fork). An
interrupt that is raised in one of them is raised again a moment later, except on Windows, which has no timer for that.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Final, NoReturn

from ibnorm_export.errors import ExitCode
from ibnorm_export.json_text import SCHEMA_VERSION

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

__all__ = ["run"]

#: Seconds until a discarded interrupt is raised again. If the callback is still running then, this repeats.
_AGAIN_S: Final = 0.01


#: Allocations between two searches for unreachable cycles. Importing torch and transformers creates a million objects
#: that stay, and with Python's default of 700 each of them is searched many times.
_COLLECT_AFTER: Final = 50_000

#: Signals besides Ctrl-C that interrupt the process.
_SIGNALS: Final = (signal.SIGTERM,) if sys.platform == "win32" else (signal.SIGTERM, signal.SIGALRM)


def _interrupt(signum: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _raise_again(unraisable: UnraisableHookArgs) -> None:
    if sys.platform != "win32" and issubclass(unraisable.exc_type, KeyboardInterrupt):
        signal.setitimer(signal.ITIMER_REAL, _AGAIN_S)
    else:
        sys.__unraisablehook__(unraisable)


def _report_interrupt() -> None:
    """Report the interrupt without importing anything: it may have ended an import half-way."""
    line = "interrupted; nothing was left half-written"
    error = {"kind": "interrupted", "message": line}
    document = {"schema_version": SCHEMA_VERSION, "error": error, "exit_code": ExitCode.INTERRUPTED}
    with contextlib.suppress(OSError):  # Ctrl-C also ends the program that reads a pipe
        if "--json" in sys.argv:
            print(json.dumps(document, indent=2), flush=True)
    with contextlib.suppress(OSError):
        print(f"ibnorm-export: {line}", file=sys.stderr)


def _prepare_to_exit(code: int) -> None:
    """Flush the streams, and let a second Ctrl-C end Python's shutdown at once with the same exit code.

    The shutdown does not search the objects that exist now for cycles, which takes a second once torch is imported.
    Exit handlers still run.
    """
    gc.freeze()

    def exit_now(signum: int, frame: FrameType | None) -> NoReturn:
        os._exit(code)

    for signum in (signal.SIGINT, *_SIGNALS):
        signal.signal(signum, exit_now)
    for stream in (sys.__stdout__, sys.__stderr__):
        assert stream is not None  # `run` replaces missing streams
        try:
            stream.flush()
        except OSError:
            # otherwise Python flushes the stream again and exits with 120
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def run() -> NoReturn:
    """Entry point of the console script and of `python -m ibnorm_export.cli`."""
    gc.set_threshold(_COLLECT_AFTER)
    for signum in _SIGNALS:
        signal.signal(signum, _interrupt)
    sys.unraisablehook = _raise_again
    for name in ("stdin", "stdout", "stderr"):  # in the order of their file descriptors
        if getattr(sys, name) is None:  # closed by the shell: `>&-`
            stream = Path(os.devnull).open("r" if name == "stdin" else "w")  # noqa: SIM115  # until the process ends
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
    for printed in (sys.stdout, sys.stderr):
        if isinstance(printed, io.TextIOWrapper):  # a name may have characters that the stream's encoding lacks
            printed.reconfigure(errors="backslashreplace")
    try:
        from ibnorm_export.cli.main import main

        code = main()
    except KeyboardInterrupt:
        code = ExitCode.INTERRUPTED
    if code == ExitCode.INTERRUPTED:
        _report_interrupt()
    _prepare_to_exit(code)
    sys.exit(code)


if __name__ == "__main__":
    run()
