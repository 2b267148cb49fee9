"""What `analyze` computes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass
from typing import Any, Final

from ibnorm_export.artifacts.tensors import DType
from ibnorm_export.choices import real_number, whole_number
from ibnorm_export.errors import IBNormError, quoted

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
        given: dict[str, Any] = {"dtypes": self.dtypes, "lambdas": self.lambdas}
        if isinstance(given["dtypes"], str):
            given["dtypes"] = (given["dtypes"],)
        for name, value in given.items():
            if isinstance(value, str) or not isinstance(value, Iterable):
                raise IBNormError(f"{name} is {quoted(value)}; it must be a list")
            given[name] = tuple(value)
        object.__setattr__(self, "dtypes", tuple(DType.of(dtype) for dtype in given["dtypes"]))
        lambdas = tuple(real_number(lambd, name="a value of lambdas", above=0.0) for lambd in given["lambdas"])
        object.__setattr__(self, "lambdas", lambdas)
        if not self.dtypes:
            raise IBNormError("dtypes is empty; name at least one type")
        if real_number(self.alpha, name="alpha", above=0.0) == 1.0:
            raise IBNormError("alpha is 1; it must not be 1, where the Renyi entropy is a limit: use 1.01")
        if self.width is not None:
            real_number(self.width, name="width", above=0.0)
        for name, least in (("samples", 2), ("seed", 0)):
            object.__setattr__(self, name, whole_number(getattr(self, name), name=name, least=least))
