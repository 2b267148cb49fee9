"""The latency verdict on streams whose truth is known (drift, noise, spikes), and the baseline file."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from ibnorm_export.benchmark.baseline import Baseline, compare, read_baseline, write_baseline
from ibnorm_export.benchmark.statistics import Decision, judge, paired, unpaired
from ibnorm_export.errors import ModelFileError

TRIALS = 200


def stream(rng: np.random.Generator, rounds: int, drift: np.ndarray, factor: float, noise: float = 0.04) -> np.ndarray:  # type: ignore[type-arg]
    """Times in ms: a common drift, noise of its own, and one round in twelve up to four times too long."""
    spikes = np.where(rng.random(rounds) < 1 / 12, 1 + 3 * rng.random(rounds), 1.0)
    return np.asarray(10.0 * factor * drift * np.exp(noise * rng.standard_normal(rounds)) * spikes)


def drifting(rng: np.random.Generator, rounds: int) -> np.ndarray:  # type: ignore[type-arg]
    """A machine that throttles by a third and wanders."""
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
    """Another machine speed, another drift: each stream only has its own yardstick."""
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


def test_it_says_cannot_tell_rather_than_guess() -> None:
    rng = np.random.default_rng(0)
    few = judge(paired([10.0, 10.5, 9.9], [10.0, 10.0, 10.0]), 1.0)
    assert few.decision is Decision.CANNOT_TELL
    noisy = judge(paired(*(stream(rng, 12, np.ones(12), 1.0, noise=0.5) for _ in range(2))), 1.0)
    assert noisy.decision is Decision.CANNOT_TELL
    assert noisy.rounds_needed is not None
    assert noisy.rounds_needed > 12
    assert "rounds would decide" in str(noisy)


def test_the_rounds_it_asks_for_decide() -> None:
    rng = np.random.default_rng(5)
    first = judge(paired(*(stream(rng, 10, np.ones(10), f, noise=0.15) for f in (1.02, 1.0))), 1.0)
    assert first.decision is Decision.CANNOT_TELL
    assert first.rounds_needed is not None
    rounds = 4 * first.rounds_needed  # the estimate is of the middle; the spread of ten rounds is a guess itself
    again = judge(paired(*(stream(rng, rounds, np.ones(rounds), f, noise=0.15) for f in (1.02, 1.0))), 1.0)
    assert again.decision is not Decision.CANNOT_TELL


def kept(factor: float, seed: int = 0, threads: int = 2) -> Baseline:
    rng = np.random.default_rng(seed)
    drift = drifting(rng, 80)
    times, beside = stream(rng, 80, drift, factor), stream(rng, 80, drift, 1.0)
    return Baseline(
        "m.onnx",
        "ort-cpu",
        inputs={"x": [1, 2]},
        threads=threads,
        times_ms=tuple(times),
        yardstick_ms=tuple(beside),
        environment={"processor": "p"},
    )


def test_a_baseline_is_written_read_and_compared(tmp_path: Path) -> None:
    before = read_baseline(write_baseline(kept(1.0), tmp_path / "a.json"))
    assert before == kept(1.0)
    verdict, notes = compare(kept(1.2, seed=1), before)
    assert verdict.decision is Decision.FAIL
    assert notes == ()
    assert compare(kept(1.2, seed=1), before, budget=1.3)[0].decision is Decision.PASS
    assert any("threads differ" in note for note in compare(kept(1.0, threads=1), before)[1])


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.pop("format"),
        lambda d: d.pop("times_ms"),
        lambda d: d["times_ms"].pop(),
        lambda d: d.update(times_ms=[0.0] * 80),
        lambda d: d.update(threads_="x"),
        lambda d: d.update(times_ms=[float("inf")] * 80),
        lambda d: d.update(times_ms=[10**400] * 80),
        lambda d: d.update(inputs=[]),
        lambda d: d.update(inputs={"x": 5}),
        lambda d: d.update(inputs={"x": ["y"]}),
        lambda d: d.update(environment=None),
        lambda d: d.update(model=None),
        lambda d: d.update(threads=None),
    ],
)
def test_a_damaged_baseline_is_one_line(tmp_path: Path, change: object) -> None:
    file = write_baseline(kept(1.0), tmp_path / "a.json")
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)  # type: ignore[operator]
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ModelFileError, match=r"a\.json is not a baseline"):
        read_baseline(file)
    with pytest.raises(ModelFileError, match="does not exist"):
        read_baseline(tmp_path / "none.json")


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a": ' * 100_000, "[1]", "null", "{}", ""])
def test_json_that_is_no_baseline_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content, encoding="utf-8")
    with pytest.raises(ModelFileError, match=r"a\.json is not a baseline"):
        read_baseline(tmp_path / "a.json")
