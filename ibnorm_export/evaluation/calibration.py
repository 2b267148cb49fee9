"""Calibration: does a classifier that is sure of an answer to 80% get 80% of such answers right?

Source: Guo, Pleiss, Sun and Weinberger, "On Calibration of Modern Neural Networks", ICML 2017: the expected calibration
error over bins of equal width of the probability of the answer.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from ibnorm_export.evaluation.statistics import merge_units

__all__ = ["BINS", "binned", "calibration_curve", "calibration_error"]

#: Bins of equal width between 0 and 1.
BINS: Final = 15


def binned(confidence: NDArray[np.float64], correct: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return (units, BINS): correct minus confidence in the bin of each sample, added up over the units of samples.

    Units are those of `merge_units`, so the memory does not grow with the number of samples.
    """
    gaps, bins = correct - confidence, _bin(confidence)
    return np.stack([merge_units(np.where(bins == index, gaps, 0.0))[0] for index in range(BINS)], axis=1)


def _bin(confidence: NDArray[np.float64]) -> NDArray[np.int64]:
    """Bins include their upper end."""
    return np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)


def calibration_error(sums: NDArray[np.float64], samples: int) -> NDArray[np.float64]:
    """Return the expected calibration error (...,) of sums over units (..., BINS) of `binned`."""
    found: NDArray[np.float64] = np.abs(sums).sum(axis=-1) / samples
    return found


def calibration_curve(confidence: NDArray[np.float64], correct: NDArray[np.float64]) -> tuple[tuple[float, float], ...]:
    """Points (mean confidence, accuracy) of the bins that have samples."""
    bins = _bin(confidence)
    counts = np.bincount(bins, minlength=BINS)
    means = np.bincount(bins, weights=confidence, minlength=BINS)
    hits = np.bincount(bins, weights=correct, minlength=BINS)
    return tuple((float(means[b] / counts[b]), float(hits[b] / counts[b])) for b in range(BINS) if counts[b])
