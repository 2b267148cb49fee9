"""The CPU kernels against the float64 reference, with every instruction set of this machine."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from ibnorm_export.op import reference
from ibnorm_export.op.spec import Compression, IBNormSpec

BF16 = np.dtype(ml_dtypes.bfloat16)
F16 = np.dtype(np.float16)
F32 = np.dtype(np.float32)
PAIRS = [(F32, F32), (F16, F16), (F16, F32), (BF16, BF16), (BF16, F32)]
PAIR_IDS = ["f32", "f16", "f16-f32", "bf16", "bf16-f32"]
ROWS = [0, 1, 2, 31, 1000]
MANTISSA = {F16: 10, BF16: 7}
SMALLEST = {F16: -14, BF16: -126}  # exponent of the smallest normal number

Array = np.ndarray[Any, Any]

#: lambda, epsilon, standard deviation, mean, and the float32 tolerance: 5e-7 at mean 0, 1e-5 at 10 deviations.
REGIMES = [
    (4.0, 1e-5, 1.0, 0.0, 5e-7),
    (0.5, 1e-6, 100.0, 0.0, 5e-7),
    (0.5, 1e-3, 1e-6, 0.0, 5e-7),
    (16.0, 1e-6, 1e-2, 0.0, 5e-7),
    (0.5, 1e-6, 1.0, 10.0, 1e-5),
    (4.0, 1e-6, 100.0, 1000.0, 1e-5),
    (1.0, 1e-5, 0.8, 0.0, 5e-7),  # packs on both sides of the range of the near forms
]


def make(rows: int, cols: int, dtype: np.dtype[Any], affine: np.dtype[Any], std: float = 1.0, mean: float = 0.0) -> Any:
    rng = np.random.default_rng(rows * 100003 + cols)
    x = (rng.standard_normal((rows, cols)) * std + mean).astype(dtype)
    scale = (1 + 0.3 * rng.standard_normal(cols)).astype(affine)
    bias = (0.2 * rng.standard_normal(cols)).astype(affine)
    return x, scale, bias


def ulp_steps(y: Array, exact: Array, scale: Array, bias: Array) -> Array:
    """|y - round(exact)| in ulps of the type, taken at max(|exact|, 2^-8 (|scale| + |bias|))."""
    size = np.maximum(np.abs(exact), 2.0**-8 * (np.abs(scale.astype(float)) + np.abs(bias.astype(float))))
    exponent = np.floor(np.log2(np.maximum(size, 1e-300)))
    ulp = 2.0 ** (np.maximum(exponent, SMALLEST[y.dtype]) - MANTISSA[y.dtype])
    return np.abs(y.astype(float) - exact.astype(y.dtype).astype(float)) / ulp


def check(y: Array, exact: Array, scale: Array, bias: Array, tolerance: float, what: str) -> None:
    assert y.shape == exact.shape
    if not y.size:
        return
    if y.dtype == F32:
        error = np.linalg.norm(y.astype(float) - exact) / np.linalg.norm(exact)
        assert error <= tolerance, f"{what}: relative error {error:.2e}, tolerance {tolerance:.0e}"
        return
    steps = ulp_steps(y, exact, scale, bias)
    assert steps.max() <= 1.0, f"{what}: {steps.max():.2f} ulp"
    if y.size >= 4096:
        equal = np.mean(y.astype(float) == exact.astype(y.dtype).astype(float))
        assert equal >= 0.99, f"{what}: only {equal:.4f} of elements are equal"


@pytest.mark.parametrize("kind", list(Compression), ids=str)
@pytest.mark.parametrize(("dtype", "affine"), PAIRS, ids=PAIR_IDS)
def test_accuracy(
    kernels: Any, widths: tuple[int, ...], dtype: np.dtype[Any], affine: np.dtype[Any], kind: Compression
) -> None:
    for number, (lambd, epsilon, std, mean, tolerance) in enumerate(REGIMES):
        spec = IBNormSpec(kind, lambd, epsilon=epsilon)
        for cols in widths:
            if cols > 8191 and number not in (0, 4):
                continue
            x, scale, bias = make(-(-4096 // cols), cols, dtype, affine, std, mean)
            exact = reference.ibnorm(x, scale, bias=bias, spec=spec)
            for isa in kernels.sets:
                y = kernels.run(isa, x, scale, bias, spec)
                check(y, exact, scale, bias, tolerance, f"{isa} D={cols} {spec} std {std:g} mean {mean:g}")


@pytest.mark.parametrize("kind", [Compression.LOGARITHMIC, Compression.TANH], ids=str)
def test_one_outlier_in_a_row(kernels: Any, kind: Compression) -> None:
    """The mean of c is many times its deviation, so mean(c^2) - mean(c)^2 cancels.

    The tolerance is the error of rounding c to float32, which no kernel that keeps c in float32 avoids.
    """
    spec = IBNormSpec(kind, 4.0)
    compress = np.tanh if kind is Compression.TANH else lambda t: np.sign(t) * np.log1p(np.abs(t))
    for cols in (1024, 4096, 16384):
        scale, bias = np.ones(cols, np.float32), np.zeros(cols, np.float32)
        for far in (1e5, 1e7, 3e7):
            for std in (0.0, 0.1):
                x = make(4, cols, F32, F32, std)[0]
                x[:, cols // 3] = far
                t = (x - x.mean(1, dtype=float, keepdims=True)) / spec.lambd
                c = compress(t).astype(np.float32).astype(float)
                assert (np.abs(c.mean(1)) > 5 * c.std(1)).all(), "the outlier does not move the mean far enough"
                rounded = reference.ibnorm(c, scale, bias=bias, spec=IBNormSpec(Compression.LINEAR, 1.0))
                exact = reference.ibnorm(x, scale, bias=bias, spec=spec)
                least = float(np.linalg.norm(rounded - exact) / np.linalg.norm(exact))
                for isa in kernels.sets:
                    y = kernels.run(isa, x, scale, bias, spec)
                    what = f"{isa} D={cols} {spec} one value {far:g}, the others deviate by {std:g}"
                    check(y, exact, scale, bias, 2 * least + 3e-7, what)


@pytest.mark.parametrize("kind", list(Compression), ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_rows(kernels: Any, rows: int, kind: Compression) -> None:
    """A call writes its rows, however many and however they are split, and no others."""
    spec = IBNormSpec(kind)
    for dtype, affine in PAIRS:
        for cols in (1, 17, 111, 768):
            x, scale, bias = make(rows, cols, dtype, affine)
            exact = reference.ibnorm(x, scale, bias=bias, spec=spec)
            for isa in kernels.sets:
                y = kernels.run(isa, x, scale, bias, spec)
                check(y, exact, scale, bias, 5e-7, f"{isa} {rows} x {cols}")
                third = rows // 3
                part = kernels.run(isa, x, scale, bias, spec, rows=(third, rows - third))
                inside = slice(third, rows - third)
                np.testing.assert_array_equal(part[inside], y[inside])
                outside = np.concatenate([part[:third], part[rows - third :]]).astype(float)
                assert (outside == 7).all(), "wrote outside its rows"


@pytest.mark.parametrize("kind", list(Compression), ids=str)
@pytest.mark.parametrize(("dtype", "affine"), PAIRS, ids=PAIR_IDS)
def test_skip_is_bit_equal_to_the_pair(
    kernels: Any, widths: tuple[int, ...], dtype: np.dtype[Any], affine: np.dtype[Any], kind: Compression
) -> None:
    spec = IBNormSpec(kind)
    for cols in [*widths, 20000]:
        rows = 3 if cols > 2000 else 9
        x, scale, bias = make(rows, cols, dtype, affine)
        skip = make(rows + 1, cols, dtype, affine, 3.0)[0][:rows]
        exact, total = reference.skip_ibnorm(x, skip, scale=scale, bias=bias, spec=spec)
        for isa in kernels.sets:
            what = f"{isa} D={cols}"
            given = np.full_like(x, 7)
            y = kernels.run(isa, x, scale, bias, spec, skip=skip, total=given)
            assert given.tobytes() == total.tobytes(), f"{what}: the sum is not x + skip rounded once"
            assert y.tobytes() == kernels.run(isa, total, scale, bias, spec).tobytes(), f"{what}: differs from the pair"
            check(y, exact, scale, bias, 5e-7, what)
            assert kernels.run(isa, x, scale, bias, spec, skip=skip).tobytes() == y.tobytes(), f"{what}: without a sum"
            for y_in, sum_in in (("x", "skip"), ("skip", "x"), ("x", None), ("skip", None)):
                place = {"x": x.copy(), "skip": skip.copy()}
                kernels.run(
                    isa,
                    place["x"],
                    scale,
                    bias,
                    spec,
                    skip=place["skip"],
                    y=place[y_in],
                    total=place[sum_in] if sum_in else None,
                )
                assert place[y_in].tobytes() == y.tobytes(), f"{what}: y in {y_in}, sum in {sum_in}"
                if sum_in:
                    assert place[sum_in].tobytes() == total.tobytes(), f"{what}: sum in {sum_in}"


@pytest.mark.parametrize("kind", list(Compression), ids=str)
@pytest.mark.parametrize(("dtype", "affine"), PAIRS, ids=PAIR_IDS)
def test_any_alignment_and_in_place(
    kernels: Any, dtype: np.dtype[Any], affine: np.dtype[Any], kind: Compression
) -> None:
    spec = IBNormSpec(kind)
    for cols in (1, 7, 17, 111, 768, 16400):
        rows = 4
        x, scale, bias = make(rows, cols, dtype, affine)
        for isa in kernels.sets:
            y = kernels.run(isa, x, scale, bias, spec)
            for offset in (1, 3):

                def shifted(a: Array, by: int = offset) -> Array:
                    room = np.full(a.size + 2 * by, 5, a.dtype)
                    view = room[by : by + a.size].reshape(a.shape)
                    view[...] = a
                    return view

                moved = shifted(x)
                out = kernels.run(isa, moved, shifted(scale), shifted(bias), spec, y=shifted(np.zeros_like(x)))
                assert out.tobytes() == y.tobytes(), f"{isa} D={cols} offset {offset}"
                room = out.base.reshape(-1).astype(float)
                assert (room[:offset] == 5).all() and (room[-offset:] == 5).all(), "wrote outside the array"
                kernels.run(isa, moved, scale, bias, spec, y=moved)
                assert moved.tobytes() == y.tobytes(), f"{isa} D={cols} in place"


@pytest.mark.parametrize("kind", list(Compression), ids=str)
@pytest.mark.parametrize(("dtype", "affine"), PAIRS, ids=PAIR_IDS)
def test_nan_and_infinity_stay_in_their_row(
    kernels: Any, dtype: np.dtype[Any], affine: np.dtype[Any], kind: Compression
) -> None:
    spec = IBNormSpec(kind)
    for cols in (2, 17, 768, 16400):
        x, scale, bias = make(5, cols, dtype, affine)
        clean = x.copy()
        x[1, cols - 1] = np.nan
        x[2, 0] = np.inf
        x[3, cols // 2] = -np.inf
        for isa in kernels.sets:
            y = kernels.run(isa, x, scale, bias, spec).astype(float)
            assert np.isnan(y[1:4]).all(), (
                f"{isa} D={cols}: {np.isnan(y[1:4]).mean()} of the rows with a NaN or infinity is NaN"
            )
            healthy = kernels.run(isa, clean, scale, bias, spec).astype(float)
            np.testing.assert_array_equal(y[[0, 4]], healthy[[0, 4]])


#: NaN in float32: of every length of payload, quiet and signalling, with both signs.
NANS = np.array([0x7F800001, 0x7F80FFFF, 0x7FC00000, 0x7FFF8001, 0x7FFFFFFF], np.uint32)
NANS = np.concatenate([NANS, NANS | 0x80000000])


@pytest.mark.parametrize("kind", list(Compression), ids=str)
@pytest.mark.parametrize(("dtype", "affine"), PAIRS, ids=PAIR_IDS)
def test_every_nan_stays_one(kernels: Any, dtype: np.dtype[Any], affine: np.dtype[Any], kind: Compression) -> None:
    """Rounding to bfloat16 adds to the bits, and could turn a NaN with many of them into another number."""

    def nans(of: np.dtype[Any]) -> Array:
        bits = NANS if of == F32 else np.unique(NANS >> 16).astype(np.uint16) | (1 if of == BF16 else 0x7C01)
        return bits.view(of)

    for rows, cols in ((1, 17), (8, 199), (2, 4096)):
        x, scale, bias = make(rows, cols, dtype, affine)
        for isa in kernels.sets:
            for parameter in (scale, bias):
                given = parameter.copy()
                given[: len(nans(affine))] = nans(affine)
                pair = (given, bias) if parameter is scale else (scale, given)
                y = kernels.run(isa, x, *pair, IBNormSpec(kind)).astype(float)
                np.testing.assert_array_equal(np.isnan(y).all(0), np.arange(cols) < len(nans(affine)))
                assert not np.isnan(y[:, len(nans(affine)) :]).any()
            for value in nans(dtype):
                given = x.copy()
                given[-1, cols // 2] = value
                y = kernels.run(isa, given, scale, bias, IBNormSpec(kind)).astype(float)
                assert np.isnan(y[-1]).all() and not np.isnan(y[:-1]).any(), f"{isa} D={cols}"


@pytest.mark.parametrize("kind", list(Compression), ids=str)
@pytest.mark.parametrize(("dtype", "affine"), PAIRS, ids=PAIR_IDS)
def test_a_row_of_equal_values_gives_bias(
    kernels: Any, dtype: np.dtype[Any], affine: np.dtype[Any], kind: Compression
) -> None:
    for cols in (1, 3, 17, 41, 199, 768, 1500, 16384, 65536):
        values = np.array([0.0, 0.1, -1 / 3, 99.7, -100.0, 1e-5, 33.333], dtype)
        x = np.repeat(values[:, None], cols, axis=1)
        _, scale, bias = make(1, cols, dtype, affine)
        for lambd, epsilon in ((0.5, 1e-12), (4.0, 1e-5)):
            for isa in kernels.sets:
                y = kernels.run(isa, x, scale, bias, IBNormSpec(kind, lambd, epsilon=epsilon)).astype(float)
                wanted = bias.astype(dtype).astype(float)
                off = np.abs(y - wanted) / np.abs(scale.astype(float))
                assert off.max() <= 1e-6, f"{isa} D={cols} epsilon {epsilon:g}: {off.max():.1e} of scale"
        for isa in kernels.sets:
            zero = kernels.run(isa, np.zeros((2, cols), dtype), scale, bias, IBNormSpec(kind, 4.0, epsilon=0.0))
            assert np.isnan(zero.astype(float)).all(), "0/0 must be NaN, as in LayerNorm"


@pytest.mark.parametrize("kind", list(Compression), ids=str)
def test_denormal_tiny_and_huge(kernels: Any, kind: Compression) -> None:
    rng = np.random.default_rng(5)
    scale, bias = np.ones(199, np.float32), np.full(199, 0.5, np.float32)
    base = rng.standard_normal((31, 199))
    for size, mean, tolerance in (
        (1e-40, 0.0, 5e-7),  # subnormal: vanishes beside epsilon
        (1e-30, 0.0, 5e-7),
        (1e30, 0.0, 5e-7),
        (1.0, 1e4, 1e-2),  # float32 holds three digits of the deviation
        (1e20, 1e22, 1e-4),
    ):
        # The lambda keeps S's variance inside float32, as in any LayerNorm.
        spec = IBNormSpec(kind, 4.0 if size < 1e10 else size / 4, epsilon=1e-5)
        x = (base * size + mean).astype(np.float32)
        exact = reference.ibnorm(x, scale, bias=bias, spec=spec)
        for isa in kernels.sets:
            check(
                kernels.run(isa, x, scale, bias, spec),
                exact,
                scale,
                bias,
                tolerance,
                f"{isa} size {size:g} mean {mean:g}",
            )


def test_log_of_huge_arguments_is_finite(kernels: Any) -> None:
    x = np.array([[1e30, -1e30, 3e37, -2e37]], np.float32)
    spec = IBNormSpec(Compression.LOGARITHMIC, 2.0**-20, epsilon=1e-5)
    one, zero = np.ones(4, np.float32), np.zeros(4, np.float32)
    for isa in kernels.sets:
        y = kernels.run(isa, x, one, zero, spec)
        assert np.isfinite(y).all(), f"{isa}: {y}"


def test_outliers_keep_their_accuracy(kernels: Any) -> None:
    """One channel of 1e4 deviations, as in language models: the mean of c is far from 0, its variance small."""
    for kind in Compression:
        spec = IBNormSpec(kind, 2.0, epsilon=1e-5)
        for place in (0, 5, 767):
            x, scale, bias = make(31, 768, F32, F32)
            x[:, place] = 1e4
            exact = reference.ibnorm(x, scale, bias=bias, spec=spec)
            for isa in kernels.sets:
                check(kernels.run(isa, x, scale, bias, spec), exact, scale, bias, 5e-6, f"{isa} {kind}")


def test_streaming_stores(kernels: Any) -> None:
    """Outputs above 32 MiB use non-temporal stores."""
    spec = IBNormSpec(Compression.LOGARITHMIC)
    for dtype, cols in ((F32, 1024), (F16, 2048), (BF16, 2064), (F32, 1025)):
        rng = np.random.default_rng(2)
        x = np.tile(rng.standard_normal((41, cols)).astype(dtype), (200, 1))
        scale, bias = np.full(cols, 1.5, dtype), np.full(cols, 0.5, dtype)
        few = reference.ibnorm(x[:41], scale, bias=bias, spec=spec)
        for isa in kernels.sets:
            y = kernels.run(isa, x, scale, bias, spec)
            check(y[:41], few, scale, bias, 5e-7, f"{isa} {dtype}")
            repeats = y.reshape(200, 41, cols).view(np.uint8) == y[:41].view(np.uint8)
            assert repeats.all(), f"{isa} {dtype}: a row differs"


LEGAL = {"shape": (2, 4), "dtypes": (0, 0), "spec": (1, 4.0, 1e-5)}


@pytest.mark.parametrize(
    "wrong",
    [
        {"spec": (1, 0.0, 1e-5)},
        {"spec": (1, -1.0, 1e-5)},
        {"spec": (1, float("nan"), 1e-5)},
        {"spec": (1, float("inf"), 1e-5)},
        {"spec": (1, 4.0, -1e-9)},
        {"spec": (1, 4.0, float("nan"))},
        {"spec": (1, 4.0, float("inf"))},
        {"spec": (3, 4.0, 1e-5)},
        {"spec": (-1, 4.0, 1e-5)},
        {"dtypes": (3, 3)},
        {"dtypes": (0, 1)},
        {"dtypes": (1, 2)},
        {"shape": (-1, 4)},
        {"shape": (2, -4)},
        {"rows": (1, 3)},
        {"rows": (-1, 1)},
        {"rows": (2, 1)},
        {"x": None},
        {"y": None},
        {"scale": None},
        {"bias": None},
        {"total": np.zeros((2, 4), np.float32)},
    ],
    ids=repr,
)
def test_illegal_problems_are_refused(kernels: Any, wrong: dict[str, Any]) -> None:
    given: dict[str, Any] = {
        "x": np.ones((2, 4), np.float32),
        "scale": np.ones(4, np.float32),
        "bias": np.ones(4, np.float32),
        "y": np.full((2, 4), 7, np.float32),
        **LEGAL,
        **wrong,
    }
    y = given["y"]
    for isa in (*kernels.sets, "dispatcher"):
        assert kernels.status(isa, **given) == 1
        assert y is None or (y == 7).all()


def test_empty_problems_need_no_pointers(kernels: Any) -> None:
    for shape in ((0, 4), (2, 0), (0, 0)):
        for isa in (*kernels.sets, "dispatcher"):
            assert kernels.status(isa, None, None, None, (1, 4.0, 1e-5), None, shape=shape, dtypes=(0, 0)) == 0
