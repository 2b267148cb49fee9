"""A Python process that stops at a chosen point of its code, so that a test can signal it there on any machine."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator

__all__ = ["held_process"]

_HOLD = """
import sys, time
def hold(*_, **__):
    print("held", file=sys.__stdout__, flush=True)
    while True:  # short sleeps: a signal that arrives before a sleep begins is handled after it
        time.sleep(0.05)
"""


@contextlib.contextmanager
def held_process(code: str) -> Iterator[subprocess.Popen[str]]:
    """Run `code` in another process and wait until it calls `hold`; the process is killed at the end of the block.

    Args:
        code: Python source; `hold` takes any arguments and returns only by an exception.

    Raises:
        RuntimeError: the process ended before it called `hold`.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD + code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        try:
            if process.stdout.readline() != "held\n":
                raise RuntimeError(f"the process ended before it called hold: {process.communicate()[1]}")
            yield process
        finally:
            process.kill()
