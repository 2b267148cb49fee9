"""The process of `ibnorm-export`: an interrupt ends it in order, wherever it falls.

SIGTERM is a KeyboardInterrupt, as Ctrl-C is; from the first moment, for the commands take a second to load. Python
drops what is raised in a callback of its own (a finaliser, a weak reference's, a hook around a fork): an interrupt that
falls into one is raised again, a moment later.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Final, NoReturn

from ibnorm_export.errors import ExitCode

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

__all__ = ["run"]

#: Seconds until a dropped interrupt is raised again; the callback that it fell into has ended by then, or it is again.
_AGAIN_S: Final = 0.01


def _interrupt(signum: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _not_dropped(unraisable: UnraisableHookArgs) -> None:
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        signal.setitimer(signal.ITIMER_REAL, _AGAIN_S)
    else:
        sys.__unraisablehook__(unraisable)


def _interrupted() -> None:
    """Say so with nothing that is still to be imported: the interrupt may have cut an import short."""
    line = "interrupted; nothing was left half-written"
    error = {"error": {"kind": "interrupted", "message": line}, "exit_code": ExitCode.INTERRUPTED}
    with contextlib.suppress(OSError):  # Ctrl-C ends the reader of a pipe too
        if "--json" in sys.argv:
            print(json.dumps(error, indent=2), flush=True)
    with contextlib.suppress(OSError):
        print(f"ibnorm-export: {line}", file=sys.stderr)


def _ending(code: int) -> None:
    """What is left is Python's own end: a second Ctrl-C cuts it short and changes no exit code."""

    def cut_short(signum: int, frame: FrameType | None) -> NoReturn:
        os._exit(code)

    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
        signal.signal(signum, cut_short)
    for stream in (sys.__stdout__, sys.__stderr__):
        assert stream is not None  # `run` has seen to it
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # or Python tries again, and exits with 120


def run() -> NoReturn:
    """Entry point of the console script and of `python -m ibnorm_export.cli`."""
    for signum in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(signum, _interrupt)
    sys.unraisablehook = _not_dropped
    for name in ("stdin", "stdout", "stderr"):  # in the order of their numbers, none of which a file may get
        if getattr(sys, name) is None:  # `>&-`
            stream = Path(os.devnull).open("r" if name == "stdin" else "w")  # noqa: SIM115  # until the process ends
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
    try:
        from ibnorm_export.cli.main import main

        code = main()
    except KeyboardInterrupt:
        code = ExitCode.INTERRUPTED
    if code == ExitCode.INTERRUPTED:
        _interrupted()
    _ending(code)
    sys.exit(code)


if __name__ == "__main__":
    run()
