"""The float64 reference: values that were calculated by hand, and properties that define the operator."""

from __future__ import annotations

import numpy as np
import pytest

from ibnorm_export import Compression, IBNormSpec
from ibnorm_export.op.reference import ibnorm, skip_ibnorm

EVERY = pytest.mark.parametrize("kind", list(Compression))


def test_values_calculated_by_hand() -> None:
    # x = [0, 0, 3]: mu 1, d = [-1, -1, 2]; with lambda 1 and g = ln(1 + r): c = [-ln 2, -ln 2, ln 3]
    a, b = np.log(2.0), np.log(3.0)
    mean = (b - 2 * a) / 3
    c = np.array([-a, -a, b]) - mean
    expected = 2.0 * c / np.sqrt((c**2).mean() + 0.5) + 1.0
    got = ibnorm(
        np.array([0.0, 0.0, 3.0]),
        np.full(3, 2.0),
        bias=np.ones(3),
        spec=IBNormSpec(Compression.LOGARITHMIC, 1.0, epsilon=0.5),
    )
    np.testing.assert_allclose(got, expected, rtol=1e-14)


def test_linear_is_layernorm_with_another_epsilon() -> None:
    x = np.random.default_rng(0).standard_normal((4, 9))
    y = ibnorm(x, None, bias=None, spec=IBNormSpec(Compression.LINEAR, 4.0, epsilon=1e-2))
    d = x - x.mean(-1, keepdims=True)
    np.testing.assert_allclose(y, d / np.sqrt(x.var(-1, keepdims=True) + 1e-2 * 16), rtol=1e-12)


@EVERY
def test_odd_and_shift_invariant(kind: Compression) -> None:
    x = np.random.default_rng(1).standard_normal((5, 31))
    spec = IBNormSpec(kind)
    np.testing.assert_allclose(
        ibnorm(-x, None, bias=None, spec=spec), -ibnorm(x, None, bias=None, spec=spec), rtol=1e-12
    )
    np.testing.assert_allclose(
        ibnorm(x + 8.0, None, bias=None, spec=spec), ibnorm(x, None, bias=None, spec=spec), rtol=1e-9, atol=1e-12
    )


@EVERY
def test_rows_are_independent(kind: Compression) -> None:
    x = np.random.default_rng(2).standard_normal((4, 8))
    spec = IBNormSpec(kind)
    clean = ibnorm(x, None, bias=None, spec=spec)
    for poison in (np.nan, np.inf, -np.inf):
        bad = x.copy()
        bad[2, 3] = poison
        y = ibnorm(bad, None, bias=None, spec=spec)
        assert np.isnan(y[2]).all()
        np.testing.assert_array_equal(np.delete(y, 2, 0), np.delete(clean, 2, 0))


@EVERY
def test_edge_cases(kind: Compression) -> None:
    spec, scale, bias = IBNormSpec(kind), np.full(3, 2.0), np.arange(3.0)
    assert ibnorm(np.empty((0, 3)), scale, bias=bias, spec=spec).shape == (0, 3)
    np.testing.assert_allclose(
        ibnorm(np.full((2, 3), 1e2 / 3), scale, bias=bias, spec=spec), np.tile(bias, (2, 1)), atol=1e-12
    )
    np.testing.assert_array_equal(ibnorm(np.array([[7.0]]), None, bias=None, spec=spec), [[0.0]])
    assert np.isnan(ibnorm(np.ones((1, 3)), None, bias=None, spec=IBNormSpec(kind, epsilon=0.0))).all()


def test_the_skip_sum_is_rounded_to_its_type() -> None:
    x, skip = np.float16([[1.0, 2.0, 3.0]]), np.float16([[0.0003, 0.0003, 0.0003]])
    spec = IBNormSpec(Compression.TANH)
    y, total = skip_ibnorm(x, skip, scale=None, bias=None, spec=spec)
    assert total.dtype == np.float16
    np.testing.assert_array_equal(total, x + skip)
    np.testing.assert_array_equal(y, ibnorm(total, None, bias=None, spec=spec))
