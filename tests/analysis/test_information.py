"""The information estimator on cases with known answers, and kurtosis on known distributions."""

from __future__ import annotations

import numpy as np
import pytest

from ibnorm_export.analysis.information import entropy_bits, excess_kurtosis, gram, information_bottleneck
from ibnorm_export.op.reference import ibnorm
from ibnorm_export.op.spec import Compression, IBNormSpec


@pytest.mark.parametrize("classes", [2, 4, 8, 16])
def test_entropy_of_balanced_labels_is_log2_of_their_number(classes: int) -> None:
    labels = np.arange(classes * 6) % classes
    assert entropy_bits(gram(labels)) == pytest.approx(np.log2(classes), abs=1e-9)


def test_equal_samples_have_no_entropy() -> None:
    assert entropy_bits(gram(np.ones((20, 3)), width=1.0)) == pytest.approx(0.0, abs=1e-9)


def test_distant_samples_have_the_entropy_of_labels() -> None:
    samples = np.eye(16) * 1e6
    assert entropy_bits(gram(samples, width=1.0)) == pytest.approx(4.0, abs=1e-6)


def test_a_representation_that_equals_the_label_holds_all_of_its_information() -> None:
    labels = np.arange(64) % 4
    apart = np.eye(4)[labels] * 1e3  # one point per class, far apart for a kernel of unit width
    measured = information_bottleneck(apart, apart, target=labels)
    # the width is the median distance here, so classes overlap; the upper limit is the label's entropy
    assert measured.about_target <= 2.0 + 1e-9
    exact = entropy_bits(gram(apart, width=1.0)) + entropy_bits(gram(labels)) - entropy_bits(gram(labels))
    assert exact == pytest.approx(2.0, abs=1e-6)


def test_independent_labels_share_no_information() -> None:
    a, b = np.arange(64) % 8, np.arange(64) // 8  # every pair occurs once
    joint = gram(a) * gram(b)
    shared = entropy_bits(gram(a)) + entropy_bits(gram(b)) - entropy_bits(joint / np.trace(joint))
    assert shared == pytest.approx(0.0, abs=1e-9)


def test_a_representation_of_the_label_holds_more_information_than_noise() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 128)
    inputs = rng.standard_normal((128, 8))
    informative = np.eye(4)[labels] + 0.05 * rng.standard_normal((128, 4))
    noise = rng.standard_normal((128, 4))
    assert (
        information_bottleneck(inputs, informative, target=labels).about_target
        > information_bottleneck(inputs, noise, target=labels).about_target + 0.2
    )


def test_kurtosis_of_known_distributions() -> None:
    rng = np.random.default_rng(0)
    assert excess_kurtosis(rng.standard_normal((4, 200_000))) == pytest.approx(0.0, abs=0.05)
    assert excess_kurtosis(rng.uniform(size=(4, 200_000))) == pytest.approx(-1.2, abs=0.02)
    assert excess_kurtosis(rng.laplace(size=(4, 200_000))) == pytest.approx(3.0, abs=0.3)


@pytest.mark.parametrize(("compression", "lowers"), [("S", False), ("L", True), ("T", True)])
def test_compression_lowers_the_kurtosis_of_gaussian_values(compression: str, lowers: bool) -> None:
    x = np.random.default_rng(0).standard_normal((8, 20_000))
    y = ibnorm(x, None, bias=None, spec=IBNormSpec(Compression(compression), lambd=1.0))
    assert (excess_kurtosis(y) < excess_kurtosis(x) - 0.5) == lowers
