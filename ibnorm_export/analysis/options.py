"""What `analyze` is to compute."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Final

from ibnorm_export.artifacts.tensors import DType

__all__ = ["ALPHA", "SAMPLES", "AnalysisOptions"]

#: Order of the entropy: near 1, where it tends to Shannon's.
ALPHA: Final = 1.01

#: Samples of the Gram matrices: their eigenvalues cost the cube of it.
SAMPLES: Final = 256


@dataclass(frozen=True, slots=True)
class AnalysisOptions:
    """What to compute.

    Args:
        lambdas: canonical ones to apply beside each norm's own.
        dtypes: that a checkpoint is run in.
        alpha: order of the Renyi entropies.
        width: of the Gaussian kernels; None takes the median distance between samples, per matrix.
        samples: tokens or images in the Gram matrices.
        seed: of their choice.
    """

    lambdas: tuple[float, ...] = ()
    dtypes: tuple[DType, ...] = (DType.FP32,)
    _: KW_ONLY
    alpha: float = ALPHA
    width: float | None = None
    samples: int = SAMPLES
    seed: int = 0
