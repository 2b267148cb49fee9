"""What `analyze` computes."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import Final

from ibnorm_export.artifacts.tensors import DType
from ibnorm_export.errors import IBNormError

__all__ = ["ALPHA", "SAMPLES", "AnalysisOptions"]

#: Order of the entropies: near 1, where the Renyi entropy tends to Shannon's.
ALPHA: Final = 1.01

#: Samples in a Gram matrix; the cost of its eigenvalues grows with the cube of their number.
SAMPLES: Final = 256


@dataclass(frozen=True, slots=True)
class AnalysisOptions:
    """What to compute.

    Args:
        lambdas: canonical lambdas to apply in addition to each norm's own.
        dtypes: types to run a checkpoint in; a file runs in its own type.
        alpha: order of the Renyi entropies.
        width: width of the Gaussian kernels; None means the median distance between samples, per matrix.
        samples: number of tokens or images in a Gram matrix.
        seed: seed for the choice of the samples.
    """

    lambdas: tuple[float, ...] = ()
    dtypes: tuple[DType, ...] = (DType.FP32,)
    _: KW_ONLY
    alpha: float = ALPHA
    width: float | None = None
    samples: int = SAMPLES
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtypes", tuple(DType.of(dtype) for dtype in self.dtypes))
        for lambd in self.lambdas:
            if not 0.0 < lambd < math.inf:
                raise IBNormError(f"lambdas contains {lambd}; each must be finite and above 0")
        if not self.dtypes:
            raise IBNormError("dtypes is empty; name at least one type")
        if not 0.0 < self.alpha < math.inf or self.alpha == 1.0:
            raise IBNormError(f"alpha is {self.alpha}; it must be finite, above 0 and not 1")
        if self.width is not None and not 0.0 < self.width < math.inf:
            raise IBNormError(f"width is {self.width}; the kernel width must be finite and above 0")
        if self.samples < 2:
            raise IBNormError(f"samples is {self.samples}; it must be at least 2")
