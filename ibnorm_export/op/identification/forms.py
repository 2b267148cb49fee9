"""The formulas that a norm is compared with: that of the family, and norms that differ from it in a known way.

Each form is written with the statistics of the last axis of x (samples, outer, G). Rows are groups of values that share
statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

from ibnorm_export.op.identification.fitting import Array, Form

__all__ = ["FAMILY", "NEIGHBOURS"]

_Compress = Callable[[Array], Array]


def _centred(values: Array) -> Array:
    return np.asarray(values - values.mean(-1, keepdims=True))


def _mean_square(values: Array) -> Array:
    return np.asarray((values * values).mean(-1, keepdims=True))


def _standardised(c: Array, epsilon: float) -> Array:
    centred = _centred(c)
    return np.asarray(centred / np.sqrt(_mean_square(centred) + epsilon))


def _family(x: Array, g: _Compress, lambd: float, epsilon: float, bound: float) -> tuple[Array, ...]:
    return (_standardised(g(_centred(x) / lambd), epsilon),)


def _epsilon_outside(x: Array, g: _Compress, lambd: float, epsilon: float, bound: float) -> tuple[Array, ...]:
    c = _centred(g(_centred(x) / lambd))
    return (c / (np.sqrt(_mean_square(c)) + epsilon),)


def _epsilon_minimum(x: Array, g: _Compress, lambd: float, epsilon: float, bound: float) -> tuple[Array, ...]:
    c = _centred(g(_centred(x) / lambd))
    return (c / np.maximum(np.sqrt(_mean_square(c)), epsilon),)


def _no_second_mean(x: Array, g: _Compress, lambd: float, epsilon: float, bound: float) -> tuple[Array, ...]:
    c = g(_centred(x) / lambd)
    return (c / np.sqrt(_mean_square(_centred(c)) + epsilon),)


def _no_second_mean_rms(x: Array, g: _Compress, lambd: float, epsilon: float, bound: float) -> tuple[Array, ...]:
    c = g(_centred(x) / lambd)
    return (c / np.sqrt(_mean_square(c) + epsilon),)


def _mean_square_of_compressed(x: Array, g: _Compress, lambd: float, epsilon: float, bound: float) -> tuple[Array, ...]:
    c = g(_centred(x) / lambd)
    return (_centred(c) / np.sqrt(_mean_square(c) + epsilon),)


def _variance_of_input(x: Array, g: _Compress, lambd: float, epsilon: float, bound: float) -> tuple[Array, ...]:
    d = _centred(x)
    return (_centred(g(d / lambd)) / np.sqrt(_mean_square(d) + epsilon),)


def _no_first_mean(x: Array, g: _Compress, lambd: float, epsilon: float, bound: float) -> tuple[Array, ...]:
    return (_standardised(g(x / lambd), epsilon),)


def _no_mean(x: Array, g: _Compress, lambd: float, epsilon: float, bound: float) -> tuple[Array, ...]:
    c = g(x / lambd)
    return (c / np.sqrt(_mean_square(c) + epsilon),)


def _relative_lambda(x: Array, g: _Compress, lambd: float, epsilon: float, bound: float) -> tuple[Array, ...]:
    d = _centred(x)
    return (_standardised(g(d / (lambd * np.sqrt(_mean_square(d) + epsilon))), 0.0),)


def _relative_lambda_twice(x: Array, g: _Compress, lambd: float, epsilon: float, bound: float) -> tuple[Array, ...]:
    d = _centred(x)
    return (_standardised(g(d / (lambd * np.sqrt(_mean_square(d) + epsilon))), epsilon),)


def _compressed_last(x: Array, g: _Compress, lambd: float, epsilon: float, bound: float) -> tuple[Array, ...]:
    return (g(_standardised(x, epsilon) / lambd),)


def _mean_kept(x: Array, g: _Compress, lambd: float, epsilon: float, bound: float) -> tuple[Array, ...]:
    c = g(_centred(x) / lambd)
    return (c / np.sqrt(_mean_square(_centred(c)) + epsilon), x.mean(-1, keepdims=True) + np.zeros_like(x))


def _residual(x: Array, g: _Compress, lambd: float, epsilon: float, bound: float) -> tuple[Array, ...]:
    return (_standardised(g(_centred(x) / lambd), epsilon), x)


def _mean_deviation(x: Array, g: _Compress, lambd: float, epsilon: float, bound: float) -> tuple[Array, ...]:
    c = _centred(g(_centred(x) / lambd))
    return (c / (np.abs(c).mean(-1, keepdims=True) + epsilon),)


def _clipped_centred(x: Array, g: _Compress, lambd: float, epsilon: float, bound: float) -> tuple[Array, ...]:
    return (_standardised(g(np.clip(_centred(x), -bound, bound) / lambd), epsilon),)


def _clipped_input(x: Array, g: _Compress, lambd: float, epsilon: float, bound: float) -> tuple[Array, ...]:
    return (_standardised(g(_centred(np.clip(x, -bound, bound)) / lambd), epsilon),)


#: z of IBNorm: g of the centred values, centred and divided by sqrt(variance + epsilon).
FAMILY: Final = Form("", "it is IBNorm", _family)

#: Norms outside the family.
NEIGHBOURS: Final = (
    Form("epsilon outside the root", "epsilon is added to the standard deviation, outside the root", _epsilon_outside),
    Form("no mean", "no mean is subtracted, as in RMSNorm", _no_mean),
    Form("no first mean", "the mean of x is not subtracted", _no_first_mean),
    Form("no second mean", "the mean of the compressed values is not subtracted", _no_second_mean),
    Form(
        "no second mean",
        "the mean of the compressed values is not subtracted, and their mean square takes the place of the variance",
        _no_second_mean_rms,
    ),
    Form(
        "mean square for variance",
        "the mean square of the compressed values takes the place of their variance",
        _mean_square_of_compressed,
    ),
    Form("variance of x", "the variance is that of x, not that of the compressed values", _variance_of_input),
    Form("mean added again", "the mean of x is added again after the compression", _mean_kept),
    Form("epsilon as a minimum", "epsilon is the smallest standard deviation, not a term of a sum", _epsilon_minimum),
    Form("relative lambda", "lambda is relative to the standard deviation of each row", _relative_lambda),
    Form("relative lambda", "lambda is relative to the standard deviation of each row", _relative_lambda_twice),
    Form("compressed last", "the compression comes after the standardisation", _compressed_last),
    Form("residual added", "the input is added to the output, as in a residual connection", _residual),
    Form(
        "mean absolute deviation",
        "the mean absolute deviation takes the place of the standard deviation",
        _mean_deviation,
    ),
    Form(
        "clipped inside",
        "the centred values are clipped before or after the compression",
        _clipped_centred,
        has_bound=True,
    ),
    Form("clipped input", "the input is clipped", _clipped_input, has_bound=True),
)
