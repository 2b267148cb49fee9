"""The verdict on one output: over all samples, and on the worst of them."""

from __future__ import annotations

import numpy as np

from ibnorm_export.artifacts.tensors import DType
from ibnorm_export.verifier.outputs.error_accumulator import ErrorSums
from ibnorm_export.verifier.report import OutputParity
from ibnorm_export.verifier.tolerances import BOUNDS

RNG = np.random.default_rng(7)


def judged(*samples: tuple[int, float, float]) -> OutputParity:
    """Each sample: number of values, and the relative errors of the file and of PyTorch."""
    sums = ErrorSums()
    for size, error, baseline in samples:
        truth = RNG.standard_normal((1, size))
        noise = RNG.standard_normal((1, size))
        noise *= np.linalg.norm(truth) / np.linalg.norm(noise)
        sums.add(truth + error * noise, truth - baseline * noise, truth=truth)
    return sums.judge("logits", "fused", bound=BOUNDS[DType.FP16])


def test_a_long_correct_sample_does_not_mask_a_short_wrong_one() -> None:
    found = judged((100_000, 5e-4, 5e-4), (10, 2e-3, 5e-4))
    assert found.error <= found.tolerance
    assert found.worst_sample == 1
    assert not found.passed


def test_a_short_sample_is_judged_by_the_worst_sample_of_pytorch() -> None:
    assert judged((100_000, 5e-4, 5e-4), (10, 1.3e-3, 4e-4), (10, 4e-4, 9e-4)).passed
    assert not judged((100_000, 5e-4, 5e-4), (100, 1.9e-3, 4e-4), (100, 4e-4, 9e-4)).passed


def test_ten_values_have_a_larger_tolerance_than_a_hundred() -> None:
    """exp(4 / sqrt(10)) is 3.54, exp(4 / sqrt(100)) is 1.49: below the factor of the bound, 2."""
    assert judged((100_000, 5e-4, 5e-4), (10, 3.4e-3, 1e-3)).passed
    assert not judged((100_000, 5e-4, 5e-4), (10, 3.7e-3, 1e-3)).passed
    assert not judged((100_000, 5e-4, 5e-4), (100, 2.1e-3, 1e-3)).passed


def test_the_error_over_all_samples_has_its_own_bound() -> None:
    assert judged((1000, 9e-4, 5e-4), (10, 9e-4, 5e-4)).passed
    assert not judged((1000, 1.1e-3, 5e-4), (10, 4e-4, 1e-3)).passed


def test_the_cosine_of_zeros_is_defined() -> None:
    for actual, truth, cosine in ((0.0, 1.0, 0.0), (1.0, 0.0, 0.0), (0.0, 0.0, 1.0), (2.0, 1.0, 1.0)):
        sums = ErrorSums()
        sums.add(np.full((1, 4), actual), np.full((1, 4), truth), truth=np.full((1, 4), truth))
        assert sums.judge("logits", "fused", bound=BOUNDS[DType.FP16]).cosine == cosine


def test_a_covering_input_has_its_own_tolerance_and_raises_no_other() -> None:
    def errors(ordinary: float, covering: float) -> ErrorSums:
        sums = ErrorSums()
        for error, baseline, covers in ((ordinary, 1e-3, ""), (covering, 0.1, "large values")):
            truth = np.ones((1, 1000))
            sums.add(truth * (1 + error), truth * (1 - baseline), truth=truth, covers=covers)
        return sums

    assert errors(1.9e-3, 0.19).judge("logits", "fused", bound=BOUNDS[DType.FP16]).passed
    assert not errors(2.1e-3, 0.19).judge("logits", "fused", bound=BOUNDS[DType.FP16]).passed
    found = errors(1.9e-3, 0.21).judge("logits", "fused", bound=BOUNDS[DType.FP16])
    assert not found.passed
    assert (found.worst_sample, found.worst_sample_covers) == (1, "large values")


def test_the_largest_realisation_is_the_baseline() -> None:
    truth = np.ones((1, 1000))
    for realised, spread, passes in ((None, 1.0, False), (2e-3, 1.0, True), (None, 2.0, True)):
        sums = ErrorSums()
        sums.add(truth * 1.003, truth * 1.001, truth=truth, least_error=realised, spread=spread)
        assert sums.judge("logits", "fused", bound=BOUNDS[DType.FP16]).passed == passes
