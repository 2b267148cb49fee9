"""Is one time above its budget? Pass, fail or cannot tell, by a confidence interval over rounds.

A ratio is estimated by the Hodges-Lehmann estimator of its logarithm, with the interval of the
Wilcoxon test (signed-rank where rounds are paired, rank-sum where they are not): spikes count as one
round each, whatever their height, and drift of the machine cancels within a round.

Source: Hollander, Wolfe and Chicken, "Nonparametric Statistical Methods", 3rd edition, sections 3.2,
3.3, 4.2 and 4.3; large-sample form.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from statistics import NormalDist
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["CONFIDENCE", "RESOLUTION", "Decision", "LatencyVerdict", "Spread", "judge", "paired", "to_dict", "unpaired"]

#: Of the interval, two-sided: a false alarm is at most half of the rest.
CONFIDENCE: Final = 0.95

#: Excess over a ratio's budget that need not be told from none: below it a machine's placement of code decides.
RESOLUTION: Final = 0.05


class Decision(enum.StrEnum):
    """What the rounds say."""

    PASS = "pass"
    FAIL = "fail"
    CANNOT_TELL = "cannot tell"


@dataclass(frozen=True, slots=True)
class Spread:
    """An estimated ratio of times with its interval; the ends are 0 and infinity where the rounds are too few."""

    ratio: float
    low: float
    high: float
    rounds: int


@dataclass(frozen=True, slots=True)
class LatencyVerdict:
    """A decision and what it rests on.

    Args:
        budget: the ratio that is allowed.
        resolution: excess over it that passes.
        rounds_needed: that would decide at this spread, None where the decision is made.
    """

    decision: Decision
    spread: Spread
    _: KW_ONLY
    budget: float
    resolution: float
    rounds_needed: int | None

    def __str__(self) -> str:
        s = self.spread
        told = (
            f"ratio {s.ratio:.3f} ({CONFIDENCE:.0%} interval {s.low:.3f} to {s.high:.3f}, {s.rounds} rounds), budget "
            f"{self.budget:g}, resolution {self.resolution:.0%}: {self.decision.value}"
        )
        return told if self.rounds_needed is None else f"{told}; about {self.rounds_needed} rounds would decide"


def _interval(values: NDArray[np.float64], deviation: float, *, rounds: int) -> Spread:
    """Median and order statistics of what a Wilcoxon test counts, as ratios."""
    ordered = np.sort(values)
    z = NormalDist().inv_cdf((1.0 + CONFIDENCE) / 2.0)
    below = math.floor(len(ordered) / 2.0 - z * deviation)
    ratio = float(np.exp(np.median(ordered)))
    if below < 1:
        return Spread(ratio, 0.0, math.inf, rounds)
    return Spread(ratio, float(np.exp(ordered[below - 1])), float(np.exp(ordered[len(ordered) - below])), rounds)


def paired(times_ms: Sequence[float], against_ms: Sequence[float]) -> Spread:
    """Ratio of times of the same rounds."""
    logs = np.log(np.asarray(times_ms, dtype=np.float64) / np.asarray(against_ms, dtype=np.float64))
    n = len(logs)
    first, second = np.triu_indices(n)
    return _interval((logs[first] + logs[second]) / 2.0, math.sqrt(n * (n + 1) * (2 * n + 1) / 24.0), rounds=n)


def unpaired(ratios: Sequence[float], before: Sequence[float]) -> Spread:
    """Ratio of two sets of ratios, each over the yardstick of its own round."""
    new, old = np.log(np.asarray(ratios, dtype=np.float64)), np.log(np.asarray(before, dtype=np.float64))
    n, m = len(new), len(old)
    return _interval(np.subtract.outer(new, old).ravel(), math.sqrt(n * m * (n + m + 1) / 12.0), rounds=min(n, m))


def judge(spread: Spread, budget: float, *, resolution: float = RESOLUTION) -> LatencyVerdict:
    """Pass when the ratio is surely below budget * (1 + resolution), fail when it is surely above the budget.

    Args:
        spread: of the ratio.
        budget: the largest ratio that is allowed.
        resolution: see `RESOLUTION`; 0 for an absolute limit.
    """
    ceiling = budget * (1.0 + resolution)
    needed = None
    if spread.high <= ceiling:
        decision = Decision.PASS
    elif spread.low > budget:
        decision = Decision.FAIL
    else:
        decision = Decision.CANNOT_TELL
        if math.isfinite(spread.high) and spread.low > 0.0:
            half = math.log(spread.high / spread.low) / 2.0
            way = max(math.log(spread.ratio / budget), math.log(ceiling / spread.ratio), 1e-3)
            needed = max(spread.rounds + 1, math.ceil(spread.rounds * (half / way) ** 2))
        else:
            needed = 2 * spread.rounds + 8
    return LatencyVerdict(decision, spread, budget=budget, resolution=resolution, rounds_needed=needed)


def to_dict(verdict: LatencyVerdict) -> dict[str, Any]:
    """For JSON."""
    s = verdict.spread
    return {
        "decision": verdict.decision.value,
        "ratio": s.ratio,
        "low": s.low,
        "high": s.high,
        "rounds": s.rounds,
        "budget": verdict.budget,
        "resolution": verdict.resolution,
        "rounds_needed": verdict.rounds_needed,
    }
