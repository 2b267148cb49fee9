"""The timing loop on runners whose times are known: percentiles, ratios, turns and rests."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from ibnorm_export.artifacts.tensors import Arrays
from ibnorm_export.benchmark import measure as measure_module
from ibnorm_export.benchmark.measure import measure
from ibnorm_export.benchmark.options import TRTEXEC, Timing
from ibnorm_export.errors import IBNormError

INPUTS: Arrays = {"x": np.zeros((4, 2), dtype=np.float32)}


class Clock:
    """A clock that only moves when a runner works or the loop rests."""

    def __init__(self) -> None:
        self.now_ns = 0

    def perf_counter_ns(self) -> int:
        return self.now_ns

    def perf_counter(self) -> float:
        return self.now_ns / 1e9

    def sleep(self, seconds: float) -> None:
        self.now_ns += int(seconds * 1e9)


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
    monkeypatch.setattr(measure_module, "time", made)
    monkeypatch.setattr("ibnorm_export.benchmark.measure.psutil.getloadavg", lambda: (0.0, 0.0, 0.0))
    return made


def test_ratio_and_throughput(clock: Clock) -> None:
    fast, slow = Worker(clock, "fast", [2.0]), Worker(clock, "slow", [5.0])
    candidates = {"fast": fast, "slow": slow}
    report = measure(candidates, INPUTS, threads=2, rounds=7, timing=Timing(repeats=2, warmup_ms=10))
    assert report.latencies[0].p50_ms == pytest.approx(2.0)
    assert report.latencies[0].throughput_per_s == pytest.approx(4 / 0.002)
    assert report.latencies[1].p99_ms == pytest.approx(5.0)
    assert report.ratios[0].median == pytest.approx(0.4)
    assert (report.ratios[0].name, report.ratios[0].against) == ("fast", "slow")
    assert report.batch == 4
    assert report.latencies[0].passes == 14


def test_drift_of_the_machine_does_not_change_the_ratio(clock: Clock) -> None:
    drift = [1.0 + 0.5 * i for i in range(200)]  # every pass is slower than the one before
    shared = iter(drift)

    class Drifting(Worker):
        def run(self, inputs: Arrays) -> Arrays:
            self._clock.now_ns += int(self._times[0] * next(shared) * 1e6)
            return {}

    a, b = Drifting(clock, "a", [1.0]), Drifting(clock, "b", [1.0])
    report = measure({"a": a, "b": b}, INPUTS, threads=1, rounds=20, timing=Timing(repeats=1, warmup_ms=0.0))
    assert report.ratios[0].median == pytest.approx(1.0, abs=0.05)


def test_the_first_pass_of_a_turn_is_not_timed(clock: Clock) -> None:
    ran: list[str] = []

    class Cold(Worker):
        """Slow right after another runner has run."""

        def run(self, inputs: Arrays) -> Arrays:
            self._clock.now_ns += int(50e6) if ran[-1:] != [self.name] else int(1e6)
            ran.append(self.name)
            return {}

    candidates = {name: Cold(clock, name, []) for name in "ab"}
    report = measure(candidates, INPUTS, threads=1, rounds=5, timing=Timing(warmup_ms=0.0))
    assert [latency.p99_ms for latency in report.latencies] == [1.0, 1.0]


def test_nothing_to_measure_is_an_error(clock: Clock) -> None:
    with pytest.raises(IBNormError, match="nothing to measure"):
        measure({}, INPUTS, threads=1)
    with pytest.raises(IBNormError, match="0 rounds"):
        measure({"a": Worker(clock, "a", [1.0])}, INPUTS, threads=1, rounds=0)


def test_the_environment_is_recorded(clock: Clock) -> None:
    report = measure({"a": Worker(clock, "a", [1.0])}, INPUTS, threads=1, rounds=2, timing=Timing(warmup_ms=1.0))
    assert report.environment["processor"]
    assert "torch" in report.environment["packages"]
    assert report.to_dict()["latencies"][0]["name"] == "a"
    assert time.gmtime().tm_year <= int(report.environment["date"][:4])


# -- the conventions of trtexec, on known times ----------------------------------------------------


def test_rounds_go_on_until_enough_is_measured(clock: Clock) -> None:
    fast, slow = Worker(clock, "fast", [2.0]), Worker(clock, "slow", [5.0])
    candidates = {"fast": fast, "slow": slow}
    timing = Timing(repeats=2, warmup_ms=0.0, min_ms=50.0)
    report = measure(candidates, INPUTS, threads=1, rounds=3, timing=timing)
    assert report.rounds == 13  # 13 turns of 4 ms of the fast candidate: 52 ms
    assert [latency.passes for latency in report.latencies] == [26, 26]
    timing = Timing(warmup_ms=0.0, min_ms=5.0)
    assert measure({"fast": fast}, INPUTS, threads=1, rounds=3, timing=timing).rounds == 3


def test_trtexec_warms_up_for_200_ms_and_measures_3_s(clock: Clock) -> None:
    worker = Worker(clock, "w", [2.0])
    report = measure({"w": worker}, INPUTS, threads=1, timing=TRTEXEC)
    assert report.latencies[0].passes * 2.0 == 3000.0
    untimed = 1 + 100 + report.rounds  # the pass that may compile, the warm-up, the first pass of each turn
    assert worker.calls == untimed + report.latencies[0].passes


def test_percentiles_of_a_stream(clock: Clock) -> None:
    worker = Worker(clock, "w", [float(i) for i in range(1, 102)])  # 101 times: the percentiles are among them
    report = measure({"w": worker}, INPUTS, threads=1, rounds=101, timing=Timing(repeats=1, warmup_ms=0.0))
    [latency] = report.latencies
    # Every other pass is timed; 101 is odd, so two walks through the stream meet every time once.
    assert (latency.p50_ms, latency.p90_ms, latency.p99_ms) == (51.0, 91.0, 100.0)


@pytest.mark.parametrize(
    ("times", "variation", "warned"),
    [
        ([4.0], 0.0, False),
        ([0.991, 0.991, 1.009, 1.009], 0.009, False),
        ([0.989, 0.989, 1.011, 1.011], 0.011, True),
        ([1.0, 1.0, 3.0, 3.0], 0.5, True),
    ],
)
def test_the_report_warns_of_unstable_times(clock: Clock, times: list[float], variation: float, warned: bool) -> None:
    # A turn is an untimed pass and a timed one; streams of four show the timed ones both values.
    worker = Worker(clock, "w", times)
    timing = replace(TRTEXEC, repeats=1, warmup_ms=0.0, min_ms=0.0)
    report = measure({"w": worker}, INPUTS, threads=1, rounds=100, timing=timing)
    assert report.latencies[0].variation == pytest.approx(variation, abs=1e-6)
    assert len(report.warnings) == warned
    if warned:
        assert f"coefficient of variation is {variation:.1%}, above 1%: lock the GPU's clocks" in report.warnings[0]
    on_cpu = measure({"w": worker}, INPUTS, threads=1, rounds=34, timing=Timing(warmup_ms=0.0)).warnings
    assert ["vary by" in warning for warning in on_cpu] == [True] * (variation >= 0.5)


# -- rests -----------------------------------------------------------------------------------------


class Spinner(Worker):
    """Its threads spin for 100 ms after a pass, and any candidate of another pool takes ten times as long meanwhile."""

    busy_until_ns = 0
    busy_pool: str | None = None

    def __init__(self, clock: Clock, name: str, pool: str | None = None) -> None:
        super().__init__(clock, name, [1.0])
        if pool is not None:
            self.thread_pool = pool
        self.pool = pool or name

    def run(self, inputs: Arrays) -> Arrays:
        disturbed = Spinner.busy_pool != self.pool and self._clock.now_ns < Spinner.busy_until_ns
        self._clock.now_ns += int(10e6 if disturbed else 1e6)
        if not disturbed:
            Spinner.busy_pool, Spinner.busy_until_ns = self.pool, self._clock.now_ns + int(100e6)
        return {}


def timed_on_spinners(clock: Clock, rest_ms: float, pool: str | None = None) -> tuple[list[float], float]:
    """Median latency of two candidates, and the time that the whole measurement takes, in ms."""
    Spinner.busy_until_ns, Spinner.busy_pool = 0, None
    candidates = {name: Spinner(clock, name, pool) for name in "ab"}
    start = clock.now_ns
    timing = Timing(warmup_ms=0.0, rest_ms=rest_ms)
    report = measure(candidates, INPUTS, threads=1, rounds=4, timing=timing)
    return [latency.p50_ms for latency in report.latencies], (clock.now_ns - start) / 1e6


def test_a_candidate_rests_until_the_threads_of_the_other_are_idle(clock: Clock) -> None:
    assert Timing().rest_ms == 150.0
    assert timed_on_spinners(clock, Timing().rest_ms)[0] == [1.0, 1.0]
    assert timed_on_spinners(clock, 0.0)[0] != [1.0, 1.0], (
        "the spinners do not disturb other candidates, so the test proves nothing"
    )


def test_candidates_that_share_a_pool_do_not_rest(clock: Clock) -> None:
    """Two passes to warm up, then 4 rounds of 2 turns of 4 passes, 1 ms each."""
    assert timed_on_spinners(clock, 150.0, pool="torch") == ([1.0, 1.0], 34.0)


def test_a_candidate_on_a_device_does_not_rest(clock: Clock) -> None:
    class Device(Worker):
        def timed(self, inputs: Arrays) -> Callable[[], float]:
            return lambda: 4.0

    candidates = {name: Device(clock, name, [1.0]) for name in "ab"}
    report = measure(candidates, INPUTS, threads=1, rounds=2, timing=Timing(warmup_ms=0.0))
    assert [latency.p50_ms for latency in report.latencies] == [4.0, 4.0]
    assert clock.now_ns == 0


# -- the text --------------------------------------------------------------------------------------


def test_the_report_prints_as_text(clock: Clock) -> None:
    fast, slow = Worker(clock, "fast", [2.0]), Worker(clock, "slow", [5.0])
    report = measure({"fast": fast, "slow": slow}, INPUTS, threads=2, rounds=7, timing=Timing(warmup_ms=0.0))
    report = replace(report, environment={"processor": "p", "usable_cores": 4})
    assert str(replace(report, model="m.onnx")).splitlines() == [
        "m.onnx: x [4, 2], 2 threads",
        "candidate  p50 ms  p90 ms  p99 ms  samples/s  passes",
        "fast         2.00    2.00    2.00       2000      21",
        "slow         5.00    5.00    5.00        800      21",
        "machine: p, 4 usable cores",
        "warning: p99 of 21 passes is about the slowest of them; with 100 passes it is a percentile",
        "fast is 2.50 times faster (2.50 to 2.50) than slow; the range is the middle half of 7 rounds",
    ]
    assert report.passed
    strict = replace(report, require_fused=True)
    assert not strict.passed
    assert strict.to_dict()["verdict"] == "fail"
    assert str(strict).endswith("verdict: fail")
