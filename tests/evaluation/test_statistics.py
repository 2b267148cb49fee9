"""Intervals and decisions against closed forms, against scipy, and against exact enumeration."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
from scipy import optimize, stats

from ibnorm_export.benchmark.statistics import Decision
from ibnorm_export.evaluation.shares import mean_metric
from ibnorm_export.evaluation.statistics import (
    bootstrap_interval,
    bootstrap_ratio_interval,
    decide,
    mcnemar_p,
    merge_units,
    paired_share_interval,
    pairs_needed,
    units_needed,
    wilson_interval,
)

Z = NormalDist().inv_cdf(0.975)


@pytest.mark.parametrize(("hits", "samples"), [(0, 10), (3, 10), (10, 10), (999, 1000)])
def test_wilson_is_that_of_scipy(hits: int, samples: int) -> None:
    expected = stats.binomtest(hits, samples).proportion_ci(0.95, method="wilson")
    assert wilson_interval(hits, samples) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (5, 0), (3, 9), (40, 40)])
def test_mcnemar_is_a_fair_coin(lost: int, gained: int) -> None:
    n = lost + gained
    tail = sum(math.comb(n, k) for k in range(min(lost, gained) + 1)) / 2**n
    assert mcnemar_p(lost, gained) == pytest.approx(min(1.0, 2.0 * tail), rel=1e-9)


def test_without_a_difference_the_interval_has_a_closed_form() -> None:
    """Tango's statistic is then sqrt(n d / (1 - d)), which equals z at d = z^2 / (n + z^2)."""
    end = Z * Z / (500 + Z * Z)
    assert paired_share_interval(0, 0, samples=500) == pytest.approx((-end, end), abs=1e-9)


@pytest.mark.parametrize(("lost", "gained"), [(30, 10), (26, 10), (20, 12), (10, 30), (9, 0)])
def test_the_interval_excludes_zero_where_mcnemars_statistic_is_significant(lost: int, gained: int) -> None:
    low, high = paired_share_interval(lost, gained, samples=400)
    significant = abs(lost - gained) / math.sqrt(lost + gained) > Z
    assert (low > 0.0 or high < 0.0) is significant


@pytest.mark.parametrize(("lost", "gained", "samples"), [(1, 0, 44), (9, 4, 100), (0, 7, 60), (30, 30, 64)])
def test_the_ends_are_where_the_score_statistic_is_critical(lost: int, gained: int, samples: int) -> None:
    """The statistic with the likelihood maximised by search, not by the formula for its maximum."""

    def statistic(drop: float) -> float:
        def loss(share: float) -> float:
            terms = ((lost, share + drop), (gained, share), (samples - lost - gained, 1.0 - 2.0 * share - drop))
            return -sum(count * math.log(max(p, 1e-300)) for count, p in terms if count)

        bounds = (max(0.0, -drop), (1.0 - drop) / 2.0)
        share = optimize.minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x
        return (lost - gained - samples * drop) / math.sqrt(samples * (2.0 * share + drop * (1.0 - drop)))

    low, high = paired_share_interval(lost, gained, samples=samples)
    # the search finds the flat maximum to about the root of the machine's precision
    assert statistic(low) == pytest.approx(Z, abs=1e-4)
    assert statistic(high) == pytest.approx(-Z, abs=1e-4)


@pytest.mark.parametrize(("lost_share", "gained_share"), [(0.1, 0.1), (0.2, 0.05), (0.05, 0.0)])
def test_the_interval_covers_the_truth(lost_share: float, gained_share: float) -> None:
    """All outcomes of 40 pairs, each with its probability: the interval misses the truth in 7% of them at most."""
    samples, covered = 40, 0.0
    for lost in range(samples + 1):
        p_lost = stats.binom.pmf(lost, samples, lost_share)
        if p_lost < 1e-7:
            continue
        for gained in range(samples - lost + 1):
            p = p_lost * stats.binom.pmf(gained, samples - lost, gained_share / (1.0 - lost_share))
            if p >= 1e-7:
                low, high = paired_share_interval(lost, gained, samples=samples)
                covered += p * (low <= lost_share - gained_share <= high)
    assert covered >= 0.93


@pytest.mark.parametrize(("differing", "drop"), [(0.02, 0.0), (0.03, 0.02)])
def test_the_stated_number_of_pairs_decides_with_the_stated_power(differing: float, drop: float) -> None:
    """600 draws: their share has a standard error of 1.5%, and the number is planned for 85%."""
    limit = 0.01
    samples = pairs_needed(differing, drop=drop, max_drop=limit)
    assert samples is not None
    rng = np.random.default_rng(0)
    lost_share, gained_share = (differing + drop) / 2.0, (differing - drop) / 2.0
    draws = rng.multinomial(samples, [lost_share, gained_share, 1.0 - differing], size=600)
    wanted = Decision.PASS if drop < limit else Decision.FAIL
    found = [
        decide(*paired_share_interval(int(lost), int(gained), samples=samples), max_drop=limit)
        for lost, gained, _ in draws
    ]
    assert 0.8 <= found.count(wanted) / len(found) <= 0.9


def test_no_number_of_pairs_decides_at_the_limit() -> None:
    assert pairs_needed(0.02, drop=0.01, max_drop=0.01) is None


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(-0.01, 0.004, Decision.PASS), (0.006, 0.01, Decision.FAIL), (0.0, 0.01, Decision.CANNOT_TELL)],
)
def test_decisions(low: float, high: float, expected: Decision) -> None:
    assert decide(low, high, max_drop=0.005) is expected


def test_a_limit_of_zero_passes_equal_results() -> None:
    assert decide(0.0, 0.0, max_drop=0.0) is Decision.PASS


def test_the_bootstrap_of_many_units_is_the_normal_interval() -> None:
    values = np.random.default_rng(1).normal(0.3, 1.0, 2000)
    ratio, low, high = bootstrap_ratio_interval(values, np.ones(2000))
    half = Z * values.std(ddof=1) / math.sqrt(2000)
    assert ratio == pytest.approx(values.mean(), rel=1e-12)
    assert (low, high) == pytest.approx((ratio - half, ratio + half), abs=0.1 * half)


def test_the_bootstrap_covers_a_ratio_of_skewed_units() -> None:
    """200 series of 40 units; the share that misses has a standard error of 1.5%."""
    rng = np.random.default_rng(2)
    missed = 0
    for index in range(200):
        weights = rng.integers(1, 20, 40).astype(np.float64)
        sums = weights * rng.exponential(0.5, 40)
        _, low, high = bootstrap_ratio_interval(sums, weights, seed=index)
        missed += not low <= 0.5 <= high
    assert missed / 200 <= 0.1


def test_equal_units_have_an_interval_of_no_width() -> None:
    assert bootstrap_ratio_interval(np.zeros(30), np.ones(30)) == (0.0, 0.0, 0.0)


def test_too_few_units_have_no_interval() -> None:
    _, low, high = bootstrap_ratio_interval(np.arange(5.0), np.ones(5))
    assert (low, high) == (-math.inf, math.inf)
    assert bootstrap_interval(np.ones((5, 2)), lambda sums: sums[:, 0]) == (-math.inf, math.inf)


def test_merging_keeps_the_sums() -> None:
    values = np.random.default_rng(3).normal(size=10_007)
    (merged,) = merge_units(values)
    assert len(merged) == 4096
    assert merged.sum() == pytest.approx(values.sum(), rel=1e-9)


def test_more_units_are_needed_for_a_drop_nearer_to_the_limit() -> None:
    far = units_needed(100, drop=0.0, low=-0.02, high=0.02, max_drop=0.01)
    near = units_needed(100, drop=0.005, low=-0.015, high=0.025, max_drop=0.01)
    assert far is not None
    assert near == pytest.approx(4 * far, rel=0.01)
    assert units_needed(100, drop=0.01, low=-0.01, high=0.03, max_drop=0.01) is None


def test_a_mean_of_scores_beyond_one_is_no_share() -> None:
    """Some of lm-eval's metrics go up to 100, such as bleu_max: their interval contains the mean."""
    metric = mean_metric("bleu_max", np.linspace(0.0, 40.0, 60))
    assert metric.value == pytest.approx(20.0)
    assert metric.low < 20.0 < metric.high
    assert "%" not in str(metric)
    assert str(mean_metric("acc", np.linspace(0.0, 1.0, 60))).startswith("50.00%")
