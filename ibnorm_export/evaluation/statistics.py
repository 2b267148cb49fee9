"""Is the candidate worse than the reference? Intervals of paired differences, and the decision against a margin.

Both answer the same samples, so results come in pairs, and what both get right or wrong cancels. An interval has 95%
confidence; a decision for "pass" against a margin is therefore wrong in at most 2.5% of cases.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from statistics import NormalDist
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import bisect
from scipy.stats import binomtest

from ibnorm_export.benchmark.statistics import CONFIDENCE, Decision

__all__ = [
    "FEWEST_UNITS",
    "POWER",
    "bootstrap_interval",
    "bootstrap_ratio_interval",
    "decide",
    "mcnemar_p",
    "merge_units",
    "paired_share_interval",
    "pairs_needed",
    "units_needed",
    "wilson_interval",
]

#: Probability with which the stated number of samples decides, and the one that the number is planned for: formulas for
#: large numbers of samples promise a little too much.
POWER: Final = 0.8
_PLANNED: Final = 0.85

#: A bootstrap of fewer units gives no interval: its resamples are too few and too alike.
FEWEST_UNITS: Final = 20

#: Resamples of a bootstrap, and units into which longer series are merged, so that memory is bounded.
_RESAMPLES: Final = 2000
_MOST_UNITS: Final = 4096
_CHUNK: Final = 100

_Z: Final = NormalDist().inv_cdf((1.0 + CONFIDENCE) / 2.0)
_Z_POWER: Final = NormalDist().inv_cdf(_PLANNED)


def wilson_interval(hits: float, samples: int) -> tuple[float, float]:
    """95% interval of a share.

    Args:
        hits: number of samples that count.
        samples: number of samples.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", JASA 1927.
    """
    if samples == 0:
        return 0.0, 1.0
    share, z2 = hits / samples, _Z * _Z / samples
    centre = (share + z2 / 2.0) / (1.0 + z2)
    half = _Z / (1.0 + z2) * math.sqrt(share * (1.0 - share) / samples + z2 / (4.0 * samples))
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def mcnemar_p(lost: int, gained: int) -> float:
    """Two-sided p-value of McNemar's exact test: are `lost` and `gained` equally likely?

    Args:
        lost: samples that only the reference gets right.
        gained: samples that only the candidate gets right.
    """
    return 1.0 if lost + gained == 0 else float(binomtest(lost, lost + gained, 0.5).pvalue)


def _score(drop: float, *, lost: int, gained: int, samples: int) -> float:
    """Tango's score statistic of the hypothesis that the drop has this value."""
    a = 2.0 * samples
    b = -lost - gained + (2.0 * samples - lost + gained) * drop
    c = -gained * drop * (1.0 - drop)
    share = max(0.0, (math.sqrt(max(0.0, b * b - 4.0 * a * c)) - b) / (2.0 * a))
    variance = samples * (2.0 * share + drop * (1.0 - drop))
    return (lost - gained - samples * drop) / math.sqrt(variance) if variance > 0.0 else math.copysign(math.inf, -drop)


def paired_share_interval(lost: int, gained: int, *, samples: int) -> tuple[float, float]:
    """95% interval of the drop of a share, (lost - gained) / samples.

    Args:
        lost: samples that only the reference gets right.
        gained: samples that only the candidate gets right.
        samples: number of pairs.

    Source: Tango, "Equivalence test and confidence interval for the difference in proportions for the paired-sample
    design", Statistics in Medicine 1998. It holds its confidence also when few pairs differ, or none.
    """
    if samples == 0:
        return -1.0, 1.0
    estimate = (lost - gained) / samples

    def crosses(level: float) -> Callable[[float], float]:
        return lambda drop: _score(drop, lost=lost, gained=gained, samples=samples) - level

    edge, near = 1.0 - 1e-12, 1e-15  # at the estimate itself, and at the ends, the statistic may be 0 / 0
    low = -1.0 if lost - gained == -samples else float(bisect(crosses(_Z), -edge, estimate - near, xtol=1e-12))
    high = 1.0 if lost - gained == samples else float(bisect(crosses(-_Z), estimate + near, edge, xtol=1e-12))
    return low, high


def decide(low: float, high: float, *, max_drop: float) -> Decision:
    """Pass if the interval of the drop lies below the limit, fail if it lies above, otherwise cannot tell."""
    if high < max_drop or high <= max_drop == 0.0:
        return Decision.PASS
    return Decision.FAIL if low > max_drop else Decision.CANNOT_TELL


def pairs_needed(differing: float, *, drop: float, max_drop: float) -> int | None:
    """Number of pairs with which Tango's test decides with a probability of `POWER`.

    Args:
        differing: share of pairs of which exactly one is right.
        drop: the true drop of the share; below `max_drop` the test is to pass, above it to fail.
        max_drop: the largest drop that passes.

    Returns:
        The number; None if the drop is at the limit, where no number decides.

    Source: Lachenbruch and Lynch, "Assessing screening tests: extensions of McNemar's test", Statistics in Medicine
    1998: the variance under the hypothesis and the one at the true drop both count.
    """
    distance = abs(max_drop - drop)
    if distance < 1e-9:
        return None
    differing = max(differing, abs(drop))
    lost, gained = (differing + drop) / 2.0, (differing - drop) / 2.0
    b = -lost - gained + (2.0 - lost + gained) * max_drop
    c = -gained * max_drop * (1.0 - max_drop)
    share = max(0.0, (math.sqrt(max(0.0, b * b - 8.0 * c)) - b) / 4.0)
    at_limit = math.sqrt(max(0.0, 2.0 * share + max_drop * (1.0 - max_drop)))
    at_drop = math.sqrt(max(0.0, differing - drop * drop))
    return max(1, math.ceil(((_Z * at_limit + _Z_POWER * at_drop) / distance) ** 2))


def merge_units(*series: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
    """Add up neighbours, so that at most 4096 units remain; shorter series are returned as they are.

    Args:
        series: (units,) each, of equal length.
    """
    length = len(series[0])
    if length <= _MOST_UNITS:
        return series
    starts = np.linspace(0, length, _MOST_UNITS, endpoint=False).astype(np.int64)
    return tuple(np.add.reduceat(values, starts) for values in series)


def _resamples(units: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """How often each unit is drawn, (100, units) at a time, for `_RESAMPLES` rows."""
    rng = np.random.default_rng(seed)
    for _ in range(0, _RESAMPLES, _CHUNK):
        drawn = rng.integers(0, units, (_CHUNK, units))
        drawn += np.arange(_CHUNK)[:, None] * units
        counts = np.bincount(drawn.ravel(), minlength=_CHUNK * units)
        yield counts.reshape(_CHUNK, units).astype(np.float64)


def bootstrap_ratio_interval(
    sums: NDArray[np.float64], weights: NDArray[np.float64], *, seed: int = 0
) -> tuple[float, float, float]:
    """Ratio of two sums over units, and its 95% interval by the studentised bootstrap.

    Args:
        sums: (units,), e.g. the difference of the losses of all tokens of a text.
        weights: (units,), at least 0, e.g. the number of these tokens.
        seed: seed of the resamples.

    Returns:
        The ratio and the ends of the interval, which are infinite for fewer than `FEWEST_UNITS` units, or if so few
        have a weight that a resample may have none. Without any weight the ratio is not a number.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", section 12.5 (bootstrap-t); Cochran, "Sampling
    Techniques", section 6.4, for the standard error of a ratio.
    """
    total = float(weights.sum())
    ratio = float(sums.sum()) / total if total > 0.0 else math.nan
    if len(sums) < FEWEST_UNITS or not total > 0.0:
        return ratio, -math.inf, math.inf
    sums, weights = merge_units(sums, weights)
    units = len(sums)
    error = _ratio_error(ratio, (sums @ sums, sums @ weights, weights @ weights), total=total, units=units)
    if not error > 0.0:
        return ratio, ratio, ratio  # all units agree
    columns = np.stack([sums, weights, sums * sums, sums * weights, weights * weights], axis=1)
    statistics = []
    for counts in _resamples(units, seed):
        s, w, ss, sw, ww = (counts @ columns).T
        if not w.min() > 0.0:
            return ratio, -math.inf, math.inf
        ratios = s / w
        errors = _ratio_error(ratios, (ss, sw, ww), total=w, units=units)
        statistics.append((ratios - ratio) / np.maximum(errors, 1e-9 * error))
    low, high = np.quantile(np.concatenate(statistics), [(1.0 - CONFIDENCE) / 2.0, (1.0 + CONFIDENCE) / 2.0])
    return ratio, ratio - float(high) * error, ratio - float(low) * error


def _ratio_error(ratio: Any, squares: tuple[Any, Any, Any], *, total: Any, units: int) -> Any:
    """Standard error of a ratio of sums, from the sums of squares and products of numerator and denominator."""
    ss, sw, ww = squares
    residual = np.maximum(ss - 2.0 * ratio * sw + ratio * ratio * ww, 0.0)
    return np.sqrt(residual * (units / (units - 1.0))) / total


def bootstrap_interval(
    columns: NDArray[np.float64],
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    *,
    seed: int = 0,
) -> tuple[float, float]:
    """95% interval of any function of column sums, by the percentiles of the bootstrap.

    Args:
        columns: (units, n) numbers of each unit.
        statistic: (resamples, n) sums over the units of each resample -> (resamples,).
        seed: seed of the resamples.

    Returns:
        The ends, which are infinite for fewer than `FEWEST_UNITS` units.
    """
    if len(columns) < FEWEST_UNITS:
        return -math.inf, math.inf
    columns = np.stack(merge_units(*columns.T), axis=1)
    found = [statistic(counts @ columns) for counts in _resamples(len(columns), seed)]
    low, high = np.quantile(np.concatenate(found), [(1.0 - CONFIDENCE) / 2.0, (1.0 + CONFIDENCE) / 2.0])
    return float(low), float(high)


def units_needed(units: int, *, drop: float, low: float, high: float, max_drop: float) -> int | None:
    """Number of units with which a bootstrap decides with a probability of `POWER`; see `pairs_needed`.

    Args:
        units: number of units so far.
        drop, low, high: the estimate and its interval, whose width falls with the square root of the number.
        max_drop: the largest drop that passes.
    """
    if not math.isfinite(high - low):
        return 2 * max(units, FEWEST_UNITS)
    distance, error = abs(max_drop - drop), (high - low) / (2.0 * _Z)
    if distance < 1e-9:
        return None
    return max(units + 1, math.ceil(units * ((_Z + _Z_POWER) * error / distance) ** 2))
