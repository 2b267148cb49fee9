"""Calls in a fresh process, and the memory that a text session takes in one."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ibnorm_export.errors import IBNormError, quoted
from ibnorm_export.generation.sessions import SessionSource

__all__ = ["SessionOpener", "call_in_fresh_process", "peak_memory_mb", "print_peak_memory", "resident_mb"]


@dataclass(frozen=True, slots=True)
class SessionOpener:
    """How a process opens a candidate.

    Args:
        function: "module:name" of a function that returns a `SessionSource`.
        arguments: its arguments by name, as JSON values.
        opened: the sessions of this process, if they are open already.
    """

    function: str
    arguments: Mapping[str, Any]
    opened: SessionSource | None = None

    def open(self) -> SessionSource:
        """The sessions in this process."""
        if self.opened is not None:
            return self.opened
        module, _, name = self.function.partition(":")
        source: SessionSource = getattr(importlib.import_module(module), name)(**self.arguments)
        return source


def peak_memory_mb(opener: SessionOpener, prompt: int, *, batch: int, steps: int) -> float | None:
    """Peak memory of a fresh process that opens the model, runs a prompt and decodes, in MB.

    The memory that the process has before it opens the model is subtracted. None on systems other than Linux.
    """
    if not Path("/proc/self/status").is_file():
        return None
    task = json.dumps([opener.function, opener.arguments, prompt, batch, steps])
    return float(call_in_fresh_process(f"{__name__}:print_peak_memory", task))


def call_in_fresh_process(function: str, task: str) -> str:
    """Call a function in a new process and return the last line that it prints.

    Args:
        function: "module:name" of a function that takes one text.
        task: the text.

    Raises:
        IBNormError: the process failed; the message quotes its last line.
    """
    module, _, name = function.partition(":")
    code = f"import sys; from {module} import {name}; {name}(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, task], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise IBNormError(f"the fresh process that measures memory failed: {quoted(last)}")
    return done.stdout.splitlines()[-1]


def resident_mb(field: str) -> float | None:
    """Memory of this process in MB: "VmRSS" is what it holds, "VmHWM" the most that it held; None without /proc."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    for line in status.read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise IBNormError(f"/proc/self/status has no {field}")


def print_peak_memory(task: str) -> None:
    """Measure the peak memory of this process for `peak_memory_mb`, and print it."""
    function, arguments, prompt, batch, steps = json.loads(task)
    importlib.import_module(function.partition(":")[0])
    before = resident_mb("VmRSS") or 0.0
    session = SessionOpener(function, arguments).open().start(batch, prompt + steps + 1)
    session.feed(np.ones((batch, prompt), dtype=np.int64))
    for _ in range(steps + 1):  # a step chooses a token, which only the next step computes with
        session.step()
    print((resident_mb("VmHWM") or 0.0) - before)
