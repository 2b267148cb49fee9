"""The one timing loop: candidates take turns, so that a slow moment of the machine affects all of them alike."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.rows import Figure
from ibnorm_export.benchmark.statistics import Spread, paired

__all__ = ["REST_S", "Times", "compare", "ms", "pin_threads", "share_threads", "take_turns", "timed"]

#: Rest of a candidate before its turn, in seconds. ONNX Runtime's threads keep spinning after a run; on two cores they
#: slow the next candidate by up to 30%.
REST_S: Final = 0.15

#: Seconds of each round, one array for each candidate.
Times = Mapping[str, NDArray[np.float64]]


def pin_threads(count: int) -> None:
    """Keep this process and its threads on `count` cores; call it before any session is opened."""
    import torch

    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])
    torch.set_num_threads(count)


def share_threads(count: int) -> None:
    """Like `pin_threads`, with one pool of `count` threads for all sessions, which must not ask for their own."""
    import onnxruntime

    pin_threads(count)
    onnxruntime.set_global_thread_pool_sizes(count, 1)


def timed(run: Callable[[], object]) -> Callable[[], float]:
    """A function that runs `run` once and returns its seconds."""

    def once() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return once


def take_turns(
    candidates: Mapping[str, Callable[[], float]],
    *,
    rounds: int,
    repeats: int = 1,
    warmup: int = 3,
    rest_s: float = REST_S,
) -> Times:
    """Time candidates in turns, forwards in one round and backwards in the next.

    A turn consists of a rest, one untimed pass, and `repeats` timed passes.

    Args:
        candidates: each runs one pass and returns its seconds; `timed` makes one of any function.
        rounds: turns of each candidate.
        repeats: timed passes in one turn.
        warmup: passes of each candidate before the first round; one compiles, and clocks settle.
        rest_s: seconds before each turn; 0 if no candidate leaves a spinning thread.

    Returns:
        The median seconds of each turn.
    """
    for once in candidates.values():
        for _ in range(warmup):
            once()
    medians: dict[str, list[float]] = {name: [] for name in candidates}
    for index in range(rounds):
        for name in list(candidates) if index % 2 == 0 else list(candidates)[::-1]:
            time.sleep(rest_s)
            candidates[name]()
            medians[name].append(float(np.median([candidates[name]() for _ in range(repeats)])))
    return {name: np.array(values) for name, values in medians.items()}


def ms(times: Times, name: str) -> Figure:
    """Median time of a candidate in milliseconds."""
    return Figure(round(float(np.median(times[name])) * 1e3, 4), "ms")


def compare(times: Times, name: str, *, over: str) -> dict[str, Figure]:
    """Time of one candidate over another: the estimate, and the ends of its 95% interval."""
    spread: Spread = paired(times[name].tolist(), times[over].tolist())
    return {
        "time over baseline": Figure(round(spread.ratio, 4)),
        "low": Figure(round(spread.low, 4)),
        "high": Figure(round(spread.high, 4)),
    }
