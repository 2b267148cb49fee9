"""The one table of tolerances, each with its reason. Errors are norm-wise relative to the float64 truth."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from ibnorm_export.artifacts.tensors import DType

__all__ = [
    "BOUNDS",
    "MAX_BASELINE_ERROR",
    "QUALITY_BOUNDS",
    "QUANTIZATION_STEPS",
    "Bound",
    "QualityBound",
    "chance_ratio",
]


@dataclass(frozen=True, slots=True)
class Bound:
    """A runtime passes when its error is at most `factor` * (baseline error) + `floor`.

    The baseline error is that of PyTorch in the same dtype.
    """

    factor: float
    floor: float

    def tolerance(self, baseline_error: float) -> float:
        """The largest error that passes."""
        return self.factor * baseline_error + self.floor


#: fp32: a different order of summation costs up to about twice PyTorch's error. The floor covers models so small that
#: PyTorch's error is a matter of chance.
#: fp16 and bf16: rounding of stored values dominates and is the same on both sides, so the factor is smaller, and no
#: floor is needed.
BOUNDS: Final[Mapping[DType, Bound]] = {
    DType.FP32: Bound(3.0, 1e-6),
    DType.FP16: Bound(2.0, 0.0),
    DType.BF16: Bound(2.0, 0.0),
}

#: The largest baseline error that a file can be compared with. An output of zeros has an error of 1, so a multiple of
#: a larger baseline error would let it pass.
MAX_BASELINE_ERROR: Final = 0.2

#: The largest distance of a quantised weight from the checkpoint's, in steps of its block. Rounding to the nearest
#: value costs half a step, a rounded zero point up to another half; 0.1% covers the rounding of scale and product.
QUANTIZATION_STEPS: Final = 1.001


@dataclass(frozen=True, slots=True)
class QualityBound:
    """Limits on a language model's predictions, compared with PyTorch in fp32.

    Args:
        agreement: smallest share of positions with the same likeliest token.
        divergence: largest mean KL divergence, in nats.
        perplexity: largest ratio of the file's perplexity to PyTorch's.
    """

    agreement: float
    divergence: float
    perplexity: float


#: By dtype of the file. fp32, fp16 and bf16: a few times what rounding costs. int8 and int4: for trained models,
#: whose weights use their blocks well; an untrained one has many near ties.
QUALITY_BOUNDS: Final[Mapping[str, QualityBound]] = {
    "fp32": QualityBound(1.0, 1e-6, 1.0001),
    "fp16": QualityBound(0.995, 1e-4, 1.001),
    "bf16": QualityBound(0.97, 1e-3, 1.01),
    "int8": QualityBound(0.97, 2e-3, 1.01),
    "int4": QualityBound(0.88, 4e-2, 1.03),
}


def chance_ratio(size: int) -> float:
    """How far apart two equally good errors of `size` values may be by chance, as a ratio: four standard deviations.

    The logarithm of a root mean square of n independent values has the variance 1 / 2n, that of a ratio of two 1 / n.
    """
    return math.exp(4.0 / math.sqrt(max(size, 1)))
