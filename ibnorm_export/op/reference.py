"""The reference implementation, in float64 NumPy.

It shares no code with the implementations that are tested against it: it uses neither PyTorch nor ONNX, and defines the
three compressions itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ibnorm_export.op.spec import Compression, IBNormSpec

__all__ = ["ibnorm", "skip_ibnorm"]

Float64Array = NDArray[np.float64]

_COMPRESS: dict[Compression, Callable[[Float64Array], Float64Array]] = {
    Compression.LINEAR: lambda t: t,
    Compression.LOGARITHMIC: lambda t: np.asarray(np.sign(t) * np.log1p(np.abs(t))),
    Compression.TANH: np.tanh,
}


def ibnorm(
    x: NDArray[Any],  # (..., n)
    scale: NDArray[Any] | None,  # (n,)
    *,
    bias: NDArray[Any] | None,  # (n,)
    spec: IBNormSpec,
) -> Float64Array:  # (..., n)
    """Compute IBNorm over the last axis in float64.

    A row with NaN or infinity becomes NaN; other rows are not affected. With epsilon 0 a row of equal values is
    0/0 = NaN, as in LayerNorm.

    Source: arXiv 2510.25262, section 4.2.
    """
    d = np.asarray(x, dtype=np.float64)
    if d.size == 0:
        return np.empty(d.shape)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        d = d - d.mean(axis=-1, keepdims=True)
        d = d - d.mean(axis=-1, keepdims=True)  # removes the rounding of the first mean
        c = _COMPRESS[spec.compression](d / spec.lambd)
        c = c - c.mean(axis=-1, keepdims=True)
        y = c / np.sqrt((c * c).mean(axis=-1, keepdims=True) + spec.epsilon)
        if scale is not None:
            y = y * np.asarray(scale, dtype=np.float64)
        if bias is not None:
            y = y + np.asarray(bias, dtype=np.float64)
    return np.asarray(y, dtype=np.float64)


def skip_ibnorm(
    x: NDArray[Any],  # (..., n)
    skip: NDArray[Any],  # (..., n)
    *,
    scale: NDArray[Any] | None,  # (n,)
    bias: NDArray[Any] | None,  # (n,)
    spec: IBNormSpec,
) -> tuple[Float64Array, NDArray[Any]]:
    """Compute IBNorm of a residual sum.

    Returns:
        (ibnorm(sum), sum), where sum is x + skip rounded to the dtype of x.
    """
    total = (x.astype(np.float64) + skip.astype(np.float64)).astype(x.dtype)
    return ibnorm(total, scale, bias=bias, spec=spec), total
