"""What it takes to load a file: time of the session and of its first pass, and memory, in fresh processes."""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Final

import numpy as np

from ibnorm_export.artifacts.tensors import Arrays
from ibnorm_export.benchmark.fresh_process import call_in_fresh_process, resident_mb

__all__ = ["LOADING_COLUMNS", "Loading", "measure_loading", "print_loading"]

#: Heads of the table of loading.
LOADING_COLUMNS: Final = ("loading", "session ms", "first pass ms", "held MB", "peak MB")


@dataclass(frozen=True, slots=True)
class Loading:
    """What one way to load a file takes: medians over fresh processes.

    Args:
        name: the way, e.g. "ort-cpu" or "ort-cpu, not prepacked".
        prepacked: whether the session copies weights into the layout that its kernels prefer.
        session_ms: time to create the session, in ms.
        first_pass_ms: time of its first pass, in ms.
        held_mb: memory that the process holds after the pass, in MB, beyond what it held before the session; None on
            systems other than Linux.
        peak_mb: the largest amount until then, likewise.
    """

    name: str
    prepacked: bool
    _: KW_ONLY
    session_ms: float
    first_pass_ms: float
    held_mb: float | None
    peak_mb: float | None


def measure_loading(
    path: Path, inputs: Arrays, *, name: str, threads: int, library: Path | None, processes: int
) -> tuple[Loading, ...]:
    """Load a file in ONNX Runtime on the CPU in fresh processes, with prepacked weights and without, in turns.

    The file is in the system's cache, because it has been read before.

    Args:
        path: the exported file.
        inputs: arrays by name for the first pass.
        name: what the report calls the candidate.
        threads: number of threads of the session.
        library: fused kernels to register; None runs the norms as functions.
        processes: number of processes for each way.

    Raises:
        IBNormError: a process failed; the message quotes its last line.
    """
    found: dict[bool, list[list[float]]] = {True: [], False: []}
    with tempfile.TemporaryDirectory() as folder:
        arrays = Path(folder) / "inputs.npz"
        np.savez(arrays, **inputs)  # type: ignore[arg-type]  # arrays by name
        for turn in range(processes):
            for prepacked in (True, False) if turn % 2 == 0 else (False, True):
                task = [str(path), str(arrays), threads, None if library is None else str(library), prepacked]
                printed = call_in_fresh_process(f"{__name__}:print_loading", json.dumps(task))
                found[prepacked].append(json.loads(printed))
    names = {True: name, False: f"{name}, not prepacked"}
    loadings = []
    for prepacked, values in found.items():
        session, first, held, peak = (float(value) for value in np.median(np.array(values, dtype=float), axis=0))
        loadings.append(
            Loading(
                names[prepacked],
                prepacked,
                session_ms=session,
                first_pass_ms=first,
                held_mb=None if np.isnan(held) else held,
                peak_mb=None if np.isnan(peak) else peak,
            )
        )
    return tuple(loadings)


def print_loading(task: str) -> None:
    """Load a file in this process for `measure_loading`, and print the times in ms and the memory in MB."""
    from ibnorm_export.runtimes.ort import OrtRunner

    path, arrays, threads, library, prepacked = json.loads(task)
    with np.load(arrays) as file:
        inputs = dict(file)
    before = resident_mb("VmRSS")
    start = time.perf_counter()
    runner = OrtRunner(Path(path), threads, library=None if library is None else Path(library), prepacks=prepacked)
    opened = time.perf_counter()
    runner.run(inputs)
    done = time.perf_counter()
    memory = [None, None] if before is None else [(resident_mb(f) or 0.0) - before for f in ("VmRSS", "VmHWM")]
    print(json.dumps([(opened - start) * 1e3, (done - opened) * 1e3, *memory]))
