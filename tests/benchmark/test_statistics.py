"""The latency verdict on simulated times whose true ratio is known, with drift, noise and spikes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ibnorm_export.benchmark.statistics import Decision, judge, paired, unpaired

Times = NDArray[np.float64]

TRIALS = 200


def stream(rng: np.random.Generator, rounds: int, drift: Times, factor: float, noise: float = 0.04) -> Times:
    """Times in ms: a given drift, independent noise, and one round in twelve that takes up to four times as long."""
    spikes = np.where(rng.random(rounds) < 1 / 12, 1 + 3 * rng.random(rounds), 1.0)
    return np.asarray(10.0 * factor * drift * np.exp(noise * rng.standard_normal(rounds)) * spikes)


def drifting(rng: np.random.Generator, rounds: int) -> Times:
    """Drift of a machine that slows down by a third, on a random walk."""
    walk = np.exp(np.cumsum(0.03 * rng.standard_normal(rounds)))
    return np.asarray(np.linspace(1.0, 1.3, rounds) * walk)


def decisions(factor: float, rounds: int = 40) -> Counter[Decision]:
    found: Counter[Decision] = Counter()
    for trial in range(TRIALS):
        rng = np.random.default_rng(trial)
        drift = drifting(rng, rounds)
        a, b = stream(rng, rounds, drift, factor), stream(rng, rounds, drift, 1.0)
        found[judge(paired(a, b), 1.0).decision] += 1
    return found


def test_power_and_false_alarms_on_paired_streams() -> None:
    slower, equal, faster = decisions(1.05), decisions(1.0), decisions(0.9)
    assert slower[Decision.FAIL] >= 0.8 * TRIALS, slower
    assert slower[Decision.PASS] <= 0.05 * TRIALS, slower
    assert equal[Decision.FAIL] <= 0.05 * TRIALS, equal
    assert equal[Decision.PASS] >= 0.8 * TRIALS, equal
    assert faster[Decision.PASS] == TRIALS


def test_power_and_false_alarms_against_a_baseline_of_another_day() -> None:
    """The two days differ in speed and drift, and share only the reference load."""
    found = {1.0: Counter[Decision](), 1.05: Counter[Decision]()}
    for factor, counts in found.items():
        for trial in range(TRIALS):
            rng = np.random.default_rng(trial)
            ratios = []
            for speed, slow in ((1.0, factor), (1.7, 1.0)):
                drift = speed * drifting(rng, 80)
                ratios.append(stream(rng, 80, drift, slow) / stream(rng, 80, drift, 1.0))
            counts[judge(unpaired(*ratios), 1.0).decision] += 1
    assert found[1.05][Decision.FAIL] >= 0.8 * TRIALS, found
    assert found[1.0][Decision.FAIL] <= 0.05 * TRIALS, found


def test_too_few_or_too_noisy_rounds_give_cannot_tell() -> None:
    rng = np.random.default_rng(0)
    few = judge(paired([10.0, 10.5, 9.9], [10.0, 10.0, 10.0]), 1.0)
    assert few.decision is Decision.CANNOT_TELL
    noisy = judge(paired(*(stream(rng, 12, np.ones(12), 1.0, noise=0.5) for _ in range(2))), 1.0)
    assert noisy.decision is Decision.CANNOT_TELL
    assert noisy.rounds_needed is not None
    assert noisy.rounds_needed > 12
    assert "rounds would decide" in str(noisy)


def test_a_few_times_the_rounds_needed_decide() -> None:
    rng = np.random.default_rng(5)
    first = judge(paired(*(stream(rng, 10, np.ones(10), f, noise=0.15) for f in (1.02, 1.0))), 1.0)
    assert first.decision is Decision.CANNOT_TELL
    assert first.rounds_needed is not None
    rounds = 4 * first.rounds_needed  # the estimate rests on the spread of ten rounds, which is uncertain itself
    again = judge(paired(*(stream(rng, rounds, np.ones(rounds), f, noise=0.15) for f in (1.02, 1.0))), 1.0)
    assert again.decision is not Decision.CANNOT_TELL


def test_a_verdict_prints_three_digits_and_an_absolute_limit_in_ms() -> None:
    slow = judge(paired([1.2] * 12, [1.0] * 12), 1.0)
    text = "ratio 1.20 (95% interval 1.20 to 1.20, 12 rounds); budget 1 plus 5%: fail [IBN311]"
    assert str(slow) == text
    far = paired([11.59887] * 3, [0.01] * 3)
    many = str(judge(far, 1.0))
    assert many.startswith(
        "ratio 1160, 1160 times slower (3 rounds, too few for an interval); budget 1 plus 5%: cannot"
    )
    fixed = replace(judge(far, 1.0, resolution=0.0), unit_ms=0.01)
    told = "11.6 ms (3 rounds, too few for an interval); budget 0.01 ms: cannot tell; "
    assert str(fixed) == f"{told}about 14 rounds would decide [IBN312]"


def test_the_end_of_an_interval_is_on_the_side_of_the_limit_where_it_is_printed() -> None:
    verdict = judge(paired([1.0004] * 12, [1.0] * 12), 1.0, resolution=0.0)
    assert "95% interval 1.0004 to 1.0004" in str(verdict)
