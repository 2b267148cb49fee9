"""Benchmarks on runners whose times are known: the arithmetic of percentiles, ratios and turns."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import pytest

from ibnorm_export import bench as bench_module
from ibnorm_export.bench import BenchOptions, bench
from ibnorm_export.errors import IBNormError
from ibnorm_export.loaded import Arrays

INPUTS: Arrays = {"x": np.zeros((4, 2), dtype=np.float32)}


class Clock:
    """A clock that only moves when a runner works."""

    def __init__(self) -> None:
        self.now_ns = 0

    def perf_counter_ns(self) -> int:
        return self.now_ns

    def perf_counter(self) -> float:
        return self.now_ns / 1e9


class Worker:
    def __init__(self, clock: Clock, name: str, times_ms: Sequence[float]) -> None:
        self.name = name
        self._clock, self._times, self.calls = clock, times_ms, 0

    def run(self, inputs: Arrays) -> Arrays:
        self._clock.now_ns += int(self._times[self.calls % len(self._times)] * 1e6)
        self.calls += 1
        return {}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(bench_module, "time", made)
    return made


def test_ratio_and_throughput(clock: Clock) -> None:
    fast, slow = Worker(clock, "fast", [2.0]), Worker(clock, "slow", [5.0])
    report = bench([fast, slow], INPUTS, 2, BenchOptions(rounds=7, repeats=2, warmup_ms=10))
    assert report.latencies[0].p50_ms == pytest.approx(2.0)
    assert report.latencies[0].throughput_per_s == pytest.approx(4 / 0.002)
    assert report.latencies[1].p99_ms == pytest.approx(5.0)
    assert report.ratios[0].median == pytest.approx(0.4)
    assert (report.ratios[0].name, report.ratios[0].against) == ("fast", "slow")
    assert report.batch == 4
    assert report.latencies[0].passes == 14


def test_drift_of_the_machine_leaves_the_ratio_alone(clock: Clock) -> None:
    drift = [1.0 + 0.5 * i for i in range(200)]  # every pass is slower than the one before
    shared = iter(drift)

    class Drifting(Worker):
        def run(self, inputs: Arrays) -> Arrays:
            self._clock.now_ns += int(self._times[0] * next(shared) * 1e6)
            return {}

    a, b = Drifting(clock, "a", [1.0]), Drifting(clock, "b", [1.0])
    report = bench([a, b], INPUTS, 1, BenchOptions(rounds=20, repeats=1, warmup_ms=0.0))
    assert report.ratios[0].median == pytest.approx(1.0, abs=0.05)


def test_the_pass_after_a_change_of_turn_is_not_timed(clock: Clock) -> None:
    ran: list[str] = []

    class Cold(Worker):
        """Slow right after another runner has run."""

        def run(self, inputs: Arrays) -> Arrays:
            self._clock.now_ns += int(50e6) if ran[-1:] != [self.name] else int(1e6)
            ran.append(self.name)
            return {}

    report = bench([Cold(clock, "a", []), Cold(clock, "b", [])], INPUTS, 1, BenchOptions(rounds=5, warmup_ms=0.0))
    assert [latency.p99_ms for latency in report.latencies] == [1.0, 1.0]


def test_nothing_to_measure_is_an_error(clock: Clock) -> None:
    with pytest.raises(IBNormError, match="nothing to measure"):
        bench([], INPUTS, 1)
    with pytest.raises(IBNormError, match="0 rounds"):
        bench([Worker(clock, "a", [1.0])], INPUTS, 1, BenchOptions(rounds=0))


def test_the_environment_is_recorded(clock: Clock) -> None:
    report = bench([Worker(clock, "a", [1.0])], INPUTS, 1, BenchOptions(rounds=2, warmup_ms=1.0))
    assert report.environment["processor"]
    assert "torch" in report.environment["packages"]
    assert report.to_dict()["latencies"][0]["name"] == "a"
    assert time.gmtime().tm_year <= int(report.environment["date"][:4])
