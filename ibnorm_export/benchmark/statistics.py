"""Decide whether a time is above its budget (pass, fail or cannot tell), by a confidence interval over rounds.

A ratio is estimated by the Hodges-Lehmann estimator of its logarithm, with the interval of the Wilcoxon test:
signed-rank if rounds are paired, rank-sum if they are not. A spike counts as one round, whatever its height,
and drift of the machine cancels within a round.

Source: Hollander, Wolfe and Chicken, "Nonparametric Statistical Methods", 3rd edition, sections 3.2,
3.3, 4.2 and 4.3; large-sample form.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, asdict, dataclass
from statistics import NormalDist
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ibnorm_export.findings.code import FindingCode
from ibnorm_export.text_report import Report, counted, ratio_text, three_digits

__all__ = ["CONFIDENCE", "RESOLUTION", "Decision", "LatencyVerdict", "Spread", "judge", "paired", "unpaired"]

#: Confidence of the two-sided interval: the probability of a false alarm is at most (1 - CONFIDENCE) / 2.
CONFIDENCE: Final = 0.95

#: Relative excess over a ratio's budget that passes: the placement of code in memory can change times by this much.
RESOLUTION: Final = 0.05


class Decision(enum.StrEnum):
    """The decision that the rounds lead to."""

    PASS = "pass"
    FAIL = "fail"
    CANNOT_TELL = "cannot tell"


@dataclass(frozen=True, slots=True)
class Spread:
    """An estimated ratio of times and its 95% interval.

    Args:
        ratio: the estimate.
        low: lower end of the interval; 0 if the rounds are too few for one.
        high: upper end of the interval; infinity if they are too few.
        rounds: number of rounds.
    """

    ratio: float
    low: float
    high: float
    rounds: int

    def text(self, *, beside: float = 1.0) -> str:
        """The interval in words, in at least three significant digits.

        Args:
            beside: the limit; an end that is not equal to it has as many digits as show on which side it lies.
        """
        if not math.isfinite(self.high):
            return f"{counted(self.rounds, 'round')}, too few for an interval"
        low, high = (_beside(end, beside) for end in (self.low, self.high))
        return f"{CONFIDENCE:.0%} interval {low} to {high}, {counted(self.rounds, 'round')}"


def _beside(value: float, limit: float) -> str:
    shown = three_digits(value)
    return shown if (float(shown) > limit) == (value > limit) else f"{value:.6g}"


@dataclass(frozen=True, slots=True)
class LatencyVerdict(Report):
    """A decision and its evidence; only FAIL is false.

    Args:
        budget: the largest ratio that passes.
        resolution: relative excess over the budget that passes too.
        rounds_needed: number of rounds that would decide at this spread; None if the decision is made.
        unit_ms: what the ratio is a ratio to, in ms, where it is a fixed time; None where it is another measurement.
    """

    decision: Decision
    spread: Spread
    _: KW_ONLY
    budget: float
    resolution: float
    rounds_needed: int | None
    unit_ms: float | None = None

    def __bool__(self) -> bool:
        return self.decision is not Decision.FAIL

    @property
    def code(self) -> FindingCode | None:
        """The code of the finding; None if the time is within its budget."""
        codes = {Decision.FAIL: FindingCode.TOO_SLOW, Decision.CANNOT_TELL: FindingCode.SPEED_UNDECIDED}
        return codes.get(self.decision)

    def __str__(self) -> str:
        return f"{self.text} [{self.code}]" if self.code else self.text

    @property
    def text(self) -> str:
        """The figures and the decision in words, without the code of the finding."""
        s = self.spread
        if self.unit_ms is None:
            text = f"ratio {ratio_text(s.ratio)} ({s.text(beside=self.budget)}); budget {self.budget_text}"
        else:
            scale = self.unit_ms
            times = Spread(s.ratio * scale, s.low * scale, s.high * scale, s.rounds)
            interval = times.text(beside=self.budget * scale)
            text = f"{three_digits(times.ratio)} ms ({interval}); budget {self.budget * scale:g} ms"
        text += f": {self.decision.value}"
        if self.rounds_needed is not None:
            text += f"; {self.rounds_text} would decide"
        return text

    @property
    def rounds_text(self) -> str:
        """How many rounds would decide, in three digits: it is an estimate."""
        return "more rounds" if self.rounds_needed is None else f"about {float(f'{self.rounds_needed:.3g}'):.0f} rounds"

    @property
    def budget_text(self) -> str:
        """The largest ratio that passes, in words."""
        return f"{self.budget:g} plus {self.resolution:.0%}" if self.resolution else f"{self.budget:g}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "decision": self.decision.value,
            "code": self.code,
            **asdict(self.spread),
            "budget": self.budget,
            "resolution": self.resolution,
            "rounds_needed": self.rounds_needed,
        }


def _interval(logs: NDArray[np.float64], deviation: float, *, rounds: int) -> Spread:
    """Median and confidence interval of the averages or differences that a Wilcoxon test counts, as ratios.

    Args:
        logs: logarithms of ratios.
        deviation: standard deviation of the test statistic.
        rounds: number of rounds that the logarithms come from.
    """
    ordered = np.sort(logs)
    z = NormalDist().inv_cdf((1.0 + CONFIDENCE) / 2.0)
    below = math.floor(len(ordered) / 2.0 - z * deviation)
    ratio = float(np.exp(np.median(ordered)))
    if below < 1:
        return Spread(ratio, 0.0, math.inf, rounds)
    return Spread(ratio, float(np.exp(ordered[below - 1])), float(np.exp(ordered[len(ordered) - below])), rounds)


def paired(times_ms: Sequence[float], against_ms: Sequence[float]) -> Spread:
    """Ratio of two series of times from the same rounds."""
    logs = np.log(np.asarray(times_ms, dtype=np.float64) / np.asarray(against_ms, dtype=np.float64))
    n = len(logs)
    first, second = np.triu_indices(n)
    return _interval((logs[first] + logs[second]) / 2.0, math.sqrt(n * (n + 1) * (2 * n + 1) / 24.0), rounds=n)


def unpaired(after: Sequence[float], before: Sequence[float]) -> Spread:
    """Ratio of two series from different rounds, each a time over the reference load of that round."""
    new, old = np.log(np.asarray(after, dtype=np.float64)), np.log(np.asarray(before, dtype=np.float64))
    n, m = len(new), len(old)
    return _interval(np.subtract.outer(new, old).ravel(), math.sqrt(n * m * (n + m + 1) / 12.0), rounds=min(n, m))


def judge(spread: Spread, budget: float, *, resolution: float = RESOLUTION) -> LatencyVerdict:
    """Pass if the interval lies below budget * (1 + resolution), fail if it lies above the budget.

    Args:
        spread: the ratio and its interval.
        budget: the largest ratio that passes.
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
        needed = _rounds_needed(spread, budget=budget, ceiling=ceiling)
    return LatencyVerdict(decision, spread, budget=budget, resolution=resolution, rounds_needed=needed)


def _rounds_needed(spread: Spread, *, budget: float, ceiling: float) -> int:
    """Estimated number of rounds after which the interval is narrow enough; its width falls with their square root."""
    if not math.isfinite(spread.high) or spread.low <= 0.0:
        return 2 * spread.rounds + 8
    half_width = math.log(spread.high / spread.low) / 2.0
    margin = max(math.log(spread.ratio / budget), math.log(ceiling / spread.ratio), 1e-3)
    return max(spread.rounds + 1, math.ceil(spread.rounds * (half_width / margin) ** 2))
