"""The one table of tolerances, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ibnorm_export.artifacts.tensors import DType

__all__ = ["BOUNDS", "Bound", "QualityBound"]


@dataclass(frozen=True, slots=True)
class Bound:
    """A runtime passes with error <= factor * (PyTorch's own error) + floor; errors are norm-wise relative."""

    factor: float
    floor: float


#: The one table of tolerances.
#: fp32: another order of summation costs up to about twice PyTorch's error; the floor covers models
#: so small that PyTorch's own error is luck. Halves: rounding of storage dominates and is the same
#: on both sides, so the factor is tighter and nothing is forgiven absolutely.
BOUNDS: Final = {DType.FP32: Bound(3.0, 1e-6), DType.FP16: Bound(2.0, 0.0), DType.BF16: Bound(2.0, 0.0)}


@dataclass(frozen=True, slots=True)
class QualityBound:
    """Greedy agreement at least, mean KL divergence (nats) at most, perplexity over PyTorch's at most."""

    agreement: float
    divergence: float
    perplexity: float
