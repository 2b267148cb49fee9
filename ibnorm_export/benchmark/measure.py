"""(Runner, Runner, ..., inputs) -> BenchReport: latency, and ratios that a noisy machine cannot fake.

Contenders take turns, round by round, so that drift of the machine meets all of them alike. Each
turn runs one untimed pass first (the other contender's threads may still be spinning, and caches
hold its data), then a few timed ones. A ratio is taken within each round and its median over rounds
is reported with the middle half of the rounds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass
from typing import Any, Final

import numpy as np

from ibnorm_export.artifacts.tensors import Arrays
from ibnorm_export.environment import environment
from ibnorm_export.errors import IBNormError
from ibnorm_export.progress import Progress, silent
from ibnorm_export.runtimes.norm_executions import NormExecution
from ibnorm_export.runtimes.runner import DeviceRunner, Runner

__all__ = ["TRTEXEC", "BenchOptions", "BenchReport", "Latency", "Ratio", "bench"]


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """How to measure.

    Args:
        rounds: how often each contender has its turn.
        repeats: timed passes in one turn.
        warmup_ms: time given to each contender before the first round.
        least_ms: rounds go on until every contender's timed passes have taken this long together.
        most_variance: of one contender's passes, standard deviation over mean; above it the report warns.
    """

    rounds: int = 30
    repeats: int = 3
    _: KW_ONLY
    warmup_ms: float = 500.0
    least_ms: float = 0.0
    most_variance: float = math.inf


#: What trtexec does by default: 200 ms of warm-up, 3 s of measurement, and a warning above 1 %.
#: Source: `trtexec --help` of TensorRT 10 (--warmUp, --duration) and its "GPU compute time is unstable".
TRTEXEC: Final = BenchOptions(warmup_ms=200.0, least_ms=3000.0, most_variance=0.01)


@dataclass(frozen=True, slots=True)
class Latency:
    """One contender: times of single passes, and the median of each round."""

    name: str
    passes: int
    _: KW_ONLY
    p50_ms: float
    p90_ms: float
    p99_ms: float
    throughput_per_s: float
    round_ms: tuple[float, ...] = ()
    variance: float = 0.0  # coefficient of variance: standard deviation over mean


@dataclass(frozen=True, slots=True)
class Ratio:
    """Time of `name` over time of `against`: below 1 is faster. Median over rounds, and the middle half."""

    name: str
    against: str
    _: KW_ONLY
    median: float
    p25: float
    p75: float


@dataclass(frozen=True, slots=True)
class BenchReport:
    """Latencies of all contenders on the same inputs, first one first, and its ratio to each other."""

    inputs: Mapping[str, tuple[int, ...]]
    batch: int
    _: KW_ONLY
    threads: int
    rounds: int
    latencies: tuple[Latency, ...]
    ratios: tuple[Ratio, ...]
    environment: Mapping[str, Any]
    norms: tuple[NormExecution, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def all_fused(self) -> bool:
        """Whether every norm of the first contender is known to have run fused, on its device, no copy beside it."""
        return bool(self.norms) and all(not norm.problem for norm in self.norms)

    def __bool__(self) -> bool:
        return bool(self.latencies)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def _timed(runner: Runner, inputs: Arrays) -> Callable[[], float]:
    """A pass that gives its time in ms; a runner on a device keeps that itself, without the copies of `run`."""
    if isinstance(runner, DeviceRunner):
        return runner.timed(inputs)

    def once() -> float:
        start = time.perf_counter_ns()
        runner.run(inputs)
        return (time.perf_counter_ns() - start) / 1e6

    return once


def bench(
    contenders: Sequence[Runner],
    inputs: Arrays,
    *,
    threads: int,
    options: BenchOptions | None = None,
    progress: Progress = silent,
) -> BenchReport:
    """Measure runners against each other in interleaved rounds.

    Args:
        contenders: the first is what is judged; the others it is compared with.
        inputs: given to each of them; the first axis of each is the batch.
        threads: that every contender was set up with (recorded, not set here).
        options: see `BenchOptions`.
        progress: called as the work goes on.

    Raises:
        IBNormError: there is nothing to measure, or fewer than one round.
    """
    options = BenchOptions() if options is None else options
    if not contenders or options.rounds < 1 or options.repeats < 1:
        raise IBNormError(
            f"nothing to measure: {len(contenders)} models, {options.rounds} rounds of {options.repeats} passes"
        )
    passes = []
    for runner in contenders:
        progress(f"warming up {runner.name}", 0, options.rounds)
        once = _timed(runner, inputs)
        once()  # may compile
        start = time.perf_counter()
        while (time.perf_counter() - start) * 1e3 < options.warmup_ms:
            once()
        passes.append(once)
    times: list[list[list[float]]] = [[] for _ in contenders]
    index = 0
    while index < options.rounds or min(sum(map(sum, turns)) for turns in times) < options.least_ms:
        progress("measuring", min(index, options.rounds), options.rounds)
        order = range(len(contenders)) if index % 2 == 0 else reversed(range(len(contenders)))
        for which in order:
            once = passes[which]
            once()
            times[which].append([once() for _ in range(options.repeats)])
        index += 1
    progress("measuring", options.rounds, options.rounds)

    batch = next((int(a.shape[0]) for a in inputs.values() if a.ndim), 1)
    latencies = []
    for runner, turns in zip(contenders, times, strict=True):
        singles = np.array(turns).ravel()
        p50, p90, p99 = (float(p) for p in np.percentile(singles, (50, 90, 99)))
        rounds = tuple(float(m) for m in np.median(np.array(turns), axis=1))
        variance = float(singles.std() / singles.mean()) if singles.any() else 0.0
        latencies.append(
            Latency(
                runner.name,
                singles.size,
                p50_ms=p50,
                p90_ms=p90,
                p99_ms=p99,
                throughput_per_s=batch * 1e3 / p50,
                round_ms=rounds,
                variance=variance,
            )
        )
    per_round = [np.median(np.array(turns), axis=1) for turns in times]
    ratios = []
    for runner, medians in zip(contenders[1:], per_round[1:], strict=True):
        p25, median, p75 = (float(p) for p in np.percentile(per_round[0] / medians, (25, 50, 75)))
        ratios.append(Ratio(contenders[0].name, runner.name, median=median, p25=p25, p75=p75))
    return BenchReport(
        inputs={name: tuple(array.shape) for name, array in inputs.items()},
        batch=batch,
        threads=threads,
        rounds=index,
        latencies=tuple(latencies),
        ratios=tuple(ratios),
        environment=environment(),
        warnings=tuple(
            unstable(latency, options.most_variance)
            for latency in latencies
            if latency.variance > options.most_variance
        ),
    )


def unstable(latency: Latency, most: float) -> str:
    """What is said of times that vary too much."""
    return (
        f"{latency.name}: times are unstable, their coefficient of variance is {latency.variance:.1%}, above "
        f"{most:.0%}: lock the GPU's clocks (nvidia-smi --lock-gpu-clocks), and let nothing else run on it"
    )
