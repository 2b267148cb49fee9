"""Shares of samples, such as accuracy, and their differences between two candidates on the same samples."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ibnorm_export.benchmark.statistics import Decision
from ibnorm_export.evaluation.report import Comparison, Metric
from ibnorm_export.evaluation.statistics import (
    bootstrap_ratio_interval,
    decide,
    mcnemar_p,
    paired_share_interval,
    pairs_needed,
    units_needed,
    wilson_interval,
)

__all__ = ["compare_means", "compare_shares", "mean_metric", "share_metric"]


def share_metric(name: str, hits: NDArray[np.float64]) -> Metric:
    """The share of samples that count, with Wilson's interval.

    Args:
        name: name of the metric.
        hits: (samples,), 1 where a sample counts and 0 elsewhere.
    """
    number, samples = float(hits.sum()), len(hits)
    low, high = wilson_interval(number, samples)
    return Metric(name, number / samples if samples else 0.0, low=low, high=high, share=True)


def compare_shares(
    metric: str, hits: NDArray[np.float64], *, reference: NDArray[np.float64], max_drop: float | None
) -> Comparison:
    """Compare how many samples two candidates get right, by McNemar's test and Tango's interval.

    Args:
        metric: name of the comparison.
        hits: (samples,), 1 where the candidate is right and 0 elsewhere.
        reference: (samples,), the same for the reference.
        max_drop: the largest drop that passes; None decides nothing.
    """
    samples = len(hits)
    lost, gained = int(((hits == 0) & (reference != 0)).sum()), int(((hits != 0) & (reference == 0)).sum())
    drop = (lost - gained) / samples if samples else 0.0
    low, high = paired_share_interval(lost, gained, samples=samples)
    decision = None if max_drop is None else decide(low, high, max_drop=max_drop)
    needed = None
    if decision is Decision.CANNOT_TELL and max_drop is not None and samples:
        needed = pairs_needed((lost + gained) / samples, drop=drop, max_drop=max_drop)
        needed = None if needed is None else max(samples + 1, needed)
    return Comparison(
        metric,
        drop,
        low=low,
        high=high,
        max_drop=max_drop,
        decision=decision,
        samples=samples,
        samples_needed=needed,
        method="Tango's score interval for pairs; McNemar's exact test",
        details={"lost": lost, "gained": gained, "McNemar p": mcnemar_p(lost, gained)},
    )


def _are_hits(*series: NDArray[np.float64]) -> bool:
    return all(bool(np.isin(values, (0.0, 1.0)).all()) for values in series)


def mean_metric(name: str, scores: NDArray[np.float64], *, seed: int = 0) -> Metric:
    """The mean of scores: a share where each is 0 or 1, else with the interval of a bootstrap.

    Args:
        name: name of the metric.
        scores: (samples,). Where each is from 0 to 1, the mean is shown in percent.
        seed: seed of the bootstrap.
    """
    if _are_hits(scores):
        return share_metric(name, scores)
    mean, low, high = bootstrap_ratio_interval(scores, np.ones_like(scores), seed=seed)
    if ((scores < 0.0) | (scores > 1.0)).any():
        return Metric(name, mean, low=low, high=high)
    return Metric(name, mean, low=max(0.0, low), high=min(1.0, high), share=True)


def compare_means(
    metric: str,
    scores: NDArray[np.float64],
    *,
    reference: NDArray[np.float64],
    max_drop: float | None,
    seed: int = 0,
) -> Comparison:
    """Compare the mean scores of two candidates: as `compare_shares` where each score is 0 or 1, else by a bootstrap.

    Args:
        metric: name of the comparison.
        scores: (samples,), from 0 to 1, of the candidate.
        reference: (samples,), those of the reference.
        max_drop: the largest drop that passes; None decides nothing.
        seed: seed of the bootstrap.
    """
    if _are_hits(scores, reference):
        return compare_shares(metric, scores, reference=reference, max_drop=max_drop)
    samples = len(scores)
    drop, low, high = bootstrap_ratio_interval(reference - scores, np.ones_like(scores), seed=seed)
    decision = None if max_drop is None else decide(low, high, max_drop=max_drop)
    needed = None
    if decision is Decision.CANNOT_TELL and max_drop is not None:
        needed = units_needed(samples, drop=drop, low=low, high=high, max_drop=max_drop)
    return Comparison(
        metric,
        drop,
        low=low,
        high=high,
        max_drop=max_drop,
        decision=decision,
        samples=samples,
        samples_needed=needed,
        method=f"paired bootstrap over {samples} samples",
    )
