"""Benchmarks on runners whose times are known: the arithmetic of percentiles, ratios and turns."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from ibnorm_export.artifacts.tensors import Arrays
from ibnorm_export.benchmark import measure as bench_module
from ibnorm_export.benchmark.measure import TRTEXEC, BenchOptions, bench
from ibnorm_export.errors import IBNormError

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
    report = bench([fast, slow], INPUTS, threads=2, options=BenchOptions(rounds=7, repeats=2, warmup_ms=10))
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
    report = bench([a, b], INPUTS, threads=1, options=BenchOptions(rounds=20, repeats=1, warmup_ms=0.0))
    assert report.ratios[0].median == pytest.approx(1.0, abs=0.05)


def test_the_pass_after_a_change_of_turn_is_not_timed(clock: Clock) -> None:
    ran: list[str] = []

    class Cold(Worker):
        """Slow right after another runner has run."""

        def run(self, inputs: Arrays) -> Arrays:
            self._clock.now_ns += int(50e6) if ran[-1:] != [self.name] else int(1e6)
            ran.append(self.name)
            return {}

    report = bench(
        [Cold(clock, "a", []), Cold(clock, "b", [])], INPUTS, threads=1, options=BenchOptions(rounds=5, warmup_ms=0.0)
    )
    assert [latency.p99_ms for latency in report.latencies] == [1.0, 1.0]


def test_nothing_to_measure_is_an_error(clock: Clock) -> None:
    with pytest.raises(IBNormError, match="nothing to measure"):
        bench([], INPUTS, threads=1)
    with pytest.raises(IBNormError, match="0 rounds"):
        bench([Worker(clock, "a", [1.0])], INPUTS, threads=1, options=BenchOptions(rounds=0))


def test_the_environment_is_recorded(clock: Clock) -> None:
    report = bench([Worker(clock, "a", [1.0])], INPUTS, threads=1, options=BenchOptions(rounds=2, warmup_ms=1.0))
    assert report.environment["processor"]
    assert "torch" in report.environment["packages"]
    assert report.to_dict()["latencies"][0]["name"] == "a"
    assert time.gmtime().tm_year <= int(report.environment["date"][:4])


# -- the conventions of trtexec, on streams of known times -----------------------------------------


def test_rounds_go_on_until_enough_is_measured(clock: Clock) -> None:
    fast, slow = Worker(clock, "fast", [2.0]), Worker(clock, "slow", [5.0])
    report = bench(
        [fast, slow], INPUTS, threads=1, options=BenchOptions(rounds=3, repeats=2, warmup_ms=0.0, least_ms=50.0)
    )
    assert report.rounds == 13  # of 4 ms of the fast one, 52 ms
    assert [latency.passes for latency in report.latencies] == [26, 26]
    assert bench([fast], INPUTS, threads=1, options=BenchOptions(rounds=3, warmup_ms=0.0, least_ms=5.0)).rounds == 3


def test_trtexec_warms_up_for_200_ms_and_measures_3_s(clock: Clock) -> None:
    worker = Worker(clock, "w", [2.0])
    report = bench([worker], INPUTS, threads=1, options=TRTEXEC)
    assert report.latencies[0].passes * 2.0 == 3000.0
    untimed = 1 + 100 + report.rounds  # what may compile, the warm-up, one pass in front of each turn
    assert worker.calls == untimed + report.latencies[0].passes


def test_percentiles_of_a_stream(clock: Clock) -> None:
    worker = Worker(clock, "w", [float(i) for i in range(1, 102)])  # 101 times: the percentiles are among them
    report = bench([worker], INPUTS, threads=1, options=BenchOptions(rounds=101, repeats=1, warmup_ms=0.0))
    [latency] = report.latencies
    # Every other pass is timed; 101 is odd, so two walks through the stream meet every time once.
    assert (latency.p50_ms, latency.p90_ms, latency.p99_ms) == (51.0, 91.0, 100.0)


@pytest.mark.parametrize(
    ("times", "variance", "warned"),
    [
        ([4.0], 0.0, False),
        ([0.991, 0.991, 1.009, 1.009], 0.009, False),
        ([0.989, 0.989, 1.011, 1.011], 0.011, True),
        ([1.0, 1.0, 3.0, 3.0], 0.5, True),
    ],
)
def test_unstable_times_are_warned_of(clock: Clock, times: list[float], variance: float, warned: bool) -> None:
    # A turn is an untimed pass and a timed one; streams of four show the timed ones both values.
    worker = Worker(clock, "w", times)
    options = replace(TRTEXEC, rounds=20, repeats=1, warmup_ms=0.0, least_ms=0.0)
    report = bench([worker], INPUTS, threads=1, options=options)
    assert report.latencies[0].variance == pytest.approx(variance, abs=1e-6)
    assert len(report.warnings) == warned
    if warned:
        assert f"coefficient of variance is {variance:.1%}, above 1%: lock the GPU's clocks" in report.warnings[0]
    assert not bench([worker], INPUTS, threads=1, options=BenchOptions(rounds=4, warmup_ms=0.0)).warnings
