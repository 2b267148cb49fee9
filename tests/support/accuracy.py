"""The accuracy that every implementation of the operator must have, and inputs that bring out bugs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ibnorm_export import Compression, IBNormSpec
from ibnorm_export.op import reference

Array = NDArray[Any]

#: Widths: one, odd ones, one below a power of two, the sizes of models, and a very long one.
WIDTHS = (1, 2, 3, 7, 111, 768, 1023, 4096, 65536)

#: (standard deviation, mean in standard deviations). At 1e-6 a naive ln(1 + r) loses all digits; at a mean of 10
#: deviations E[x^2] - mean^2 loses them.
REGIMES = ((1e-6, 0.0), (1.0, 0.0), (1e2, 0.0), (1e-6, 10.0), (1.0, 10.0), (1e2, 10.0))

#: (lambda, epsilon): the ends of the range and the paper's best.
SETTINGS = ((0.5, 1e-6), (4.0, 1e-5), (16.0, 1e-3))


@dataclass(frozen=True)
class Case:
    """One tensor of at least 4096 elements, its parameters, and the exact result."""

    x: Array
    scale: Array
    bias: Array
    spec: IBNormSpec
    exact: Array
    mean: float

    def __str__(self) -> str:
        return f"{self.spec} {self.x.dtype} {self.x.shape} mean {self.mean}"


def cases(kind: Compression, dtype: Any, widths: tuple[int, ...] = WIDTHS) -> Iterator[Case]:
    """Every width in every regime, each with one of the settings in turn."""
    for index, width in enumerate(widths):
        for turn, (deviation, mean) in enumerate(REGIMES):
            lambd, epsilon = SETTINGS[(index + turn) % len(SETTINGS)]
            spec = IBNormSpec(kind, float(np.float32(lambd)), epsilon=float(np.float32(epsilon)))
            rng = np.random.default_rng(1000 * index + turn)
            rows = max(2, -(-4096 // width))
            x = ((rng.standard_normal((rows, width)) + mean) * deviation).astype(dtype)
            scale, bias = ((rng.standard_normal(width)).astype(dtype) for _ in range(2))
            exact = reference.ibnorm(x, scale, bias=bias, spec=spec)
            yield Case(x, scale, bias, spec, exact, mean)


#: How far two float32 runs of a small model may differ in one row, relative to its norm. A row is a sum of products in
#: each of some ten layers, and each run has an error of up to 4e-6 (verification's bound, 3 * PyTorch's error + 1e-6,
#: where PyTorch's is at most 1e-6); two such errors add up to 8e-6 in the mean over rows. A wrong token, position or
#: cached row changes a row by 1e-2 and more.
ROW_TOLERANCE = 2e-5


def assert_rows_close(actual: Array, expected: Array) -> None:
    """Assert that two float32 results of one model are equal but for the order of their sums, row by row."""
    assert actual.shape == expected.shape, f"{actual.shape}, expected {expected.shape}"
    exact = np.asarray(expected, np.float64)
    errors = np.linalg.norm(np.asarray(actual, np.float64) - exact, axis=-1) / np.linalg.norm(exact, axis=-1)
    assert np.all(errors <= ROW_TOLERANCE), f"a row differs by {np.max(errors):.1e} of its norm"


def relative_error(actual: Array, exact: Array) -> float:
    """Norm of the error, divided by the norm of the exact tensor."""
    difference = np.linalg.norm(np.asarray(actual, np.float64) - exact)
    size = np.linalg.norm(exact)
    return float(difference / size) if size else float(difference)


def assert_half_exact(actual: Array, case: Case, share: float = 0.99) -> None:
    """Within one ulp of the float64 result rounded to the type everywhere, equal to it on `share` of the elements.

    An ulp is taken at max(|y|, 2^-8 (|scale| + |bias|)): below that, cancellation of scale and bias decides.
    """
    dtype = case.x.dtype
    rounded = case.exact.astype(dtype).astype(np.float64)
    got = actual.astype(np.float64)
    floor = 2.0**-8 * (np.abs(case.scale.astype(np.float64)) + np.abs(case.bias.astype(np.float64)))
    at = np.maximum(np.abs(rounded), floor)
    info = ml_dtypes.finfo(dtype)
    ulp = np.maximum(2.0 ** np.floor(np.log2(np.maximum(at, 1e-300))) * float(info.eps), float(info.smallest_subnormal))
    off = np.abs(got - rounded)
    assert (off <= ulp * (1 + 1e-9)).all(), f"{case}: {float((off / ulp).max()):.2f} ulp"
    assert (off == 0).mean() >= share, f"{case}: equal on {(off == 0).mean():.4f}"
