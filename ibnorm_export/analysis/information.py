"""Kurtosis of values, and information between them by the matrix-based Renyi estimator.

For n samples, the Gram matrix K of a Gaussian kernel is normalised to A = K / trace(K). The entropy of order alpha is
S(A) = log2(sum of eigenvalues^alpha) / (1 - alpha) in bits. The joint entropy is that of the normalised Hadamard
product, and I(A; B) = S(A) + S(B) - S(A, B).

Source: Sanchez Giraldo, Rao and Principe, "Measures of entropy from data using infinitely divisible
kernels", IEEE Transactions on Information Theory 61(1), 2015.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import pdist, squareform
from scipy.stats import kurtosis as scipy_kurtosis

from ibnorm_export.analysis.options import ALPHA

__all__ = [
    "BETA",
    "InformationBottleneck",
    "InformationErrors",
    "entropy_bits",
    "excess_kurtosis",
    "gram",
    "information_bottleneck",
    "information_with_errors",
]

Matrix = NDArray[np.float64]

#: Weight of I(T; X) in the value of the bottleneck.
BETA: Final = 0.5

#: Random halves of the samples that standard errors come from: they are then known to a fifth of themselves.
_HALVES: Final = 16

#: With fewer samples, half of them say nothing about all.
_FEWEST_FOR_ERRORS: Final = 8


def gram(
    samples: NDArray[Any],  # (n, features)
    width: float | None = None,
) -> Matrix:  # (n, n), trace 1
    """Gram matrix of a Gaussian kernel, normalised to trace 1.

    Args:
        samples: one sample per row; values of shape (n,) are class labels, whose kernel is 1 if they are equal.
        width: standard deviation of the kernel; None means the median distance between samples.
    """
    samples = np.asarray(samples)
    if samples.ndim == 1:
        kernel = (samples[:, None] == samples[None, :]).astype(np.float64)
    else:
        distances = squareform(pdist(samples.astype(np.float64)))
        if width is None:
            width = float(np.median(distances[np.triu_indices(len(samples), 1)])) or 1.0
        kernel = np.exp(-(distances**2) / (2.0 * width**2))
    return np.asarray(kernel / np.trace(kernel))


def entropy_bits(normalised: Matrix, alpha: float = ALPHA) -> float:
    """Renyi entropy of a Gram matrix of trace 1, in bits: 0 for equal samples, log2(n) for n distinct ones."""
    eigenvalues = np.linalg.eigvalsh(normalised)
    eigenvalues = eigenvalues[eigenvalues > 0.0]
    return float(np.log2((eigenvalues**alpha).sum()) / (1.0 - alpha))


def _mutual_bits(a: Matrix, b: Matrix, *, alpha: float) -> float:
    joint = a * b
    return entropy_bits(a, alpha) + entropy_bits(b, alpha) - entropy_bits(joint / np.trace(joint), alpha)


@dataclass(frozen=True, slots=True)
class InformationBottleneck:
    """I(T; Y) and I(T; X): information that a representation holds about the target and the input, in bits."""

    about_target: float
    about_input: float

    def value(self, beta: float = BETA) -> float:
        """I(T; Y) - beta * I(T; X): higher is a better bottleneck."""
        return self.about_target - beta * self.about_input


def information_bottleneck(
    inputs: NDArray[Any],  # (n, features)
    representation: NDArray[Any],  # (n, features)
    *,
    target: NDArray[Any],  # (n,) labels or (n, features)
    alpha: float = ALPHA,
    width: float | None = None,
) -> InformationBottleneck:
    """Information that a representation holds about its target and input, with one sample (token, image) per row.

    Args:
        inputs, representation, target: values of the same samples.
        alpha: order of the entropies.
        width: width of the kernels of inputs, representation and target, as in `gram`.
    """
    x, t, y = gram(inputs, width), gram(representation, width), gram(target, width)
    return InformationBottleneck(_mutual_bits(t, y, alpha=alpha), _mutual_bits(t, x, alpha=alpha))


@dataclass(frozen=True, slots=True)
class InformationErrors:
    """Standard errors of I(T; Y), I(T; X) and the value of the bottleneck, in bits."""

    about_target: float
    about_input: float
    value: float


def information_with_errors(
    inputs: NDArray[Any],  # (n, features)
    representation: NDArray[Any],  # (n, features)
    *,
    target: NDArray[Any],  # (n,) labels or (n, features)
    alpha: float = ALPHA,
    width: float | None = None,
) -> tuple[InformationBottleneck, InformationErrors | None]:
    """`information_bottleneck`, with the standard errors that the choice of samples causes.

    They are those of the delete-half jackknife: the standard deviation over random halves of the samples. A bootstrap
    would draw samples twice, and equal samples have less entropy.

    Args:
        inputs, representation, target, alpha, width: as in `information_bottleneck`.

    Returns:
        The information, and its errors; None if there are too few samples to halve.

    Source: Shao and Wu, "A general theory for jackknife variance estimation", Annals of Statistics 17(3), 1989.
    """
    whole = information_bottleneck(inputs, representation, target=target, alpha=alpha, width=width)
    count = len(inputs)
    if count < _FEWEST_FOR_ERRORS:
        return whole, None
    rng = np.random.default_rng(0)  # the same halves for every norm, type and lambda
    halves = []
    for _ in range(_HALVES):
        rows = rng.choice(count, count // 2, replace=False)
        found = information_bottleneck(
            inputs[rows], representation[rows], target=target[rows], alpha=alpha, width=width
        )
        halves.append((found.about_target, found.about_input, found.value()))
    return whole, InformationErrors(*(float(error) for error in np.std(halves, axis=0)))


def excess_kurtosis(values: NDArray[Any]) -> float:
    """Mean over rows of the excess kurtosis along the last axis: 0 for Gaussian values."""
    return float(np.mean(scipy_kurtosis(np.asarray(values, dtype=np.float64), axis=-1)))
