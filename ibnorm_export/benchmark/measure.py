"""The timing loop: latency of several runners, and ratios that are not distorted by drift of the machine.

Candidates take turns, round by round, so that a change of the machine's speed affects all of them alike. Before
its turn a candidate rests until the threads of the previous one have stopped spinning, and runs one untimed pass
to fill the caches. Ratios are taken within each round; the report has their median over rounds and their middle half.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Final

import numpy as np
import psutil

from ibnorm_export.artifacts.tensors import Arrays
from ibnorm_export.benchmark.options import Timing
from ibnorm_export.benchmark.report import BenchReport, Latency, Ratio
from ibnorm_export.environment import environment
from ibnorm_export.errors import IBNormError
from ibnorm_export.progress import Progress, silent
from ibnorm_export.runtimes.runner import DeviceRunner, Runner
from ibnorm_export.usable_cores import usable_cores

__all__ = ["measure"]

#: Times of one candidate in ms: turns, and the passes of a turn.
_Times = list[list[float]]


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A runner in the loop.

    Args:
        name: what the report calls it.
        run_timed: runs one pass and returns its time in ms.
        pool: the thread pool that it shares with other candidates; None if it has its own.
        spins: whether its threads keep a core busy for a while after a pass.
    """

    name: str
    run_timed: Callable[[], float]
    _: KW_ONLY
    pool: str | None
    spins: bool

    def disturbs(self, other: _Candidate) -> bool:
        """Whether a pass of `other` is slower right after a pass of this candidate."""
        return self is not other and self.spins and (self.pool is None or self.pool != other.pool)


def _timed_pass(runner: Runner, inputs: Arrays) -> Callable[[], float]:
    """A pass that returns its time in ms. A runner on a device measures it itself, without the copies of `run`."""
    if isinstance(runner, DeviceRunner):
        return runner.timed(inputs)

    def run_timed() -> float:
        start = time.perf_counter_ns()
        runner.run(inputs)
        return (time.perf_counter_ns() - start) / 1e6

    return run_timed


def _warm_up(name: str, runner: Runner, *, inputs: Arrays, timing: Timing) -> _Candidate:
    candidate = _Candidate(
        name,
        _timed_pass(runner, inputs),
        pool=getattr(runner, "thread_pool", None),
        spins=getattr(runner, "spins", not isinstance(runner, DeviceRunner)),
    )
    candidate.run_timed()  # may compile
    start = time.perf_counter()
    while (time.perf_counter() - start) * 1e3 < timing.warmup_ms:
        candidate.run_timed()
    return candidate


def _take_turns(candidates: list[_Candidate], *, rounds: int, timing: Timing, progress: Progress) -> list[_Times]:
    """Times of each candidate; the order of the turns alternates from round to round."""
    times: list[_Times] = [[] for _ in candidates]
    previous = candidates[-1]
    index = 0
    while index < rounds or min(sum(map(sum, turns)) for turns in times) < timing.min_ms:
        progress("measuring", min(index, rounds), rounds)
        order = range(len(candidates)) if index % 2 == 0 else reversed(range(len(candidates)))
        for which in order:
            candidate = candidates[which]
            if previous.disturbs(candidate):
                time.sleep(timing.rest_ms / 1e3)
            candidate.run_timed()
            times[which].append([candidate.run_timed() for _ in range(timing.repeats)])
            previous = candidate
        index += 1
    progress("measuring", rounds, rounds)
    return times


def _latency(name: str, times: _Times, *, batch: int) -> Latency:
    passes = np.array(times).ravel()
    p50, p90, p99 = (float(p) for p in np.percentile(passes, (50, 90, 99)))
    return Latency(
        name,
        passes.size,
        p50_ms=p50,
        p90_ms=p90,
        p99_ms=p99,
        throughput_per_s=batch * 1e3 / p50,
        round_ms=tuple(float(m) for m in np.median(np.array(times), axis=1)),
        variation=float(passes.std() / passes.mean()) if passes.any() else 0.0,
    )


def _ratio(first: Latency, other: Latency) -> Ratio:
    ratios = np.array(first.round_ms) / np.array(other.round_ms)
    p25, median, p75 = (float(p) for p in np.percentile(ratios, (25, 50, 75)))
    return Ratio(first.name, other.name, median=median, p25=p25, p75=p75)


def _unstable(latency: Latency, limit: float) -> str:
    return (
        f"{latency.name}: times are unstable, their coefficient of variation is {latency.variation:.1%}, above "
        f"{limit:.0%}: lock the GPU's clocks (nvidia-smi --lock-gpu-clocks) and stop other programs that use it"
    )


#: Passes that a 99th percentile needs: with fewer it is the slowest pass.
_PASSES_OF_P99: Final = 100

#: Share of the cores that other programs may keep busy before a measurement is disturbed.
_BUSY: Final = 0.5

#: Coefficient of variation above which the times of a CPU say more about other programs than about the candidate.
_JITTER: Final = 0.5


def _busy_warning(load: float, cores: int) -> str:
    """Why times may be too long: other programs use the cores; empty if they do not."""
    if load <= _BUSY * cores:
        return ""
    return (
        f"the machine was busy before the measurement: load {load:.3g} on {cores} cores; stop other programs and "
        "measure again"
    )


def _reliability(latencies: Sequence[Latency], limit: float) -> Iterator[str]:
    """Why the times of a candidate may not be reliable."""
    for latency in latencies:
        if latency.variation > limit:
            yield _unstable(latency, limit)
        elif latency.variation > _JITTER:
            yield (
                f"{latency.name}: single passes vary by {latency.variation:.0%} of their mean, as on a machine with "
                "other work; trust the median and the ratios, not p90 and p99"
            )
    fewest = min((latency.passes for latency in latencies), default=_PASSES_OF_P99)
    if fewest < _PASSES_OF_P99:
        yield f"p99 of {fewest} passes is about the slowest of them; with {_PASSES_OF_P99} passes it is a percentile"


def measure(
    candidates: Mapping[str, Runner],
    inputs: Arrays,
    *,
    threads: int,
    rounds: int = 34,
    timing: Timing | None = None,
    progress: Progress = silent,
) -> BenchReport:
    """Measure runners against each other in interleaved rounds.

    Args:
        candidates: runners by the name that is reported; the first is compared with each other one. A runner may
            name the thread pool that it shares with others in an attribute `thread_pool`, and state in `spins` whether
            its threads keep a core busy after a pass.
        inputs: arrays by name for all candidates; the first axis of each is the batch.
        threads: number of threads of each candidate (recorded, not set here).
        rounds: number of turns of each candidate.
        timing: see `Timing`.
        progress: receives the progress of the work.

    Raises:
        IBNormError: there is no candidate, or fewer than one round.
    """
    timing = Timing() if timing is None else timing
    if not candidates or rounds < 1:
        raise IBNormError(
            f"nothing to measure: {len(candidates)} candidates and {rounds} rounds; both must be at least 1"
        )
    busy = _busy_warning(psutil.getloadavg()[0], usable_cores())
    warm = []
    for name, runner in candidates.items():
        progress(f"warming up {name}", 0, rounds)
        warm.append(_warm_up(name, runner, inputs=inputs, timing=timing))
    times = _take_turns(warm, rounds=rounds, timing=timing, progress=progress)
    batch = next((int(array.shape[0]) for array in inputs.values() if array.ndim), 1)
    latencies = tuple(_latency(c.name, turns, batch=batch) for c, turns in zip(warm, times, strict=True))
    limit = timing.max_variation
    return BenchReport(
        {name: tuple(array.shape) for name, array in inputs.items()},
        batch,
        threads=threads,
        rounds=len(times[0]),
        latencies=latencies,
        ratios=tuple(_ratio(latencies[0], other) for other in latencies[1:]),
        environment=environment(),
        input_types={name: str(array.dtype) for name, array in inputs.items()},
        warnings=(*([busy] if busy else []), *_reliability(latencies, limit)),
    )
