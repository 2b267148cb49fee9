"""The CUDA kernels themselves, run on the CPU by the emulator, against the float64 reference.

The default sweep takes every width, type and compression once with drawn parameters. The full one
crosses them:

    python -m pytest tests/custom_ops/cuda/test_emulated_kernels.py --full-cuda-sweep -n 2
"""

from __future__ import annotations

import zlib
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ibnorm_export.op import reference
from ibnorm_export.op.spec import Compression, IBNormSpec
from tests.support.cuda_emulator import (
    DTYPES,
    ELEMENTS,
    FLOAT32_TOLERANCE,
    EmulationError,
    Emulator,
    guarded,
    judge,
    norm_error,
    outside_one_ulp,
)

WIDTHS = (1, 2, 3, 7, 15, 16, 17, 41, 111, 199, 760, 768, 1023, 1024, 1500, 4096, 8191, 16384, 65536)
#: In addition, both sides of every width at which the plan changes.
EDGES = (4, 8, 128, 132, 256, 264, 512, 520, 776, 1032, 1536, 1544, 2048, 2052, 2056, 32768, 32776)
COMPRESSIONS = tuple(Compression)

Array = NDArray[Any]


def rows_for(cols: int, elements: int = ELEMENTS) -> int:
    """Rows that make up `elements`; an eighth of them for rows of fewer than 4 columns.

    Each of those rows takes 32 fibres, and the share of equal elements, which needs many, is not judged there.
    """
    return max(2, -(-elements // cols) // (8 if cols < 4 else 1))


def draw_rows(rng: np.random.Generator, rows: int, cols: int, dtype: str, std: float, mean: float) -> Array:
    return (rng.standard_normal((rows, cols)) * std + mean * std).astype(DTYPES[dtype])


def draw_parameters(rng: np.random.Generator, cols: int, dtype: str) -> tuple[Array, Array]:
    return rng.normal(1.0, 0.2, cols).astype(DTYPES[dtype]), rng.normal(0.0, 0.2, cols).astype(DTYPES[dtype])


def assert_accurate(y: Array, x: Array, scale: Array, bias: Array, spec: IBNormSpec, mean: float) -> None:
    accuracy = judge(y, reference.ibnorm(x, scale, bias=bias, spec=spec), scale, bias, mean)
    assert accuracy, accuracy.problem


def same_bits(a: Array, b: Array) -> bool:
    return a.tobytes() == b.tobytes()


@pytest.mark.parametrize("cols", [*WIDTHS, *EDGES])
@pytest.mark.parametrize("compression", COMPRESSIONS, ids=lambda c: c.value)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sweep(
    emulator: Emulator, dtype: str, compression: Compression, cols: int, request: pytest.FixtureRequest
) -> None:
    """Plain and skip form are accurate and have the same bits, the sum is exact, and the schedule changes nothing."""
    rng = np.random.default_rng(zlib.crc32(f"{dtype} {compression} {cols}".encode()))
    full = request.config.getoption("--full-cuda-sweep", default=False)
    draws = 12 if full else 1 if cols < 16 else 2
    for draw in range(draws):
        mean = (0.0, 10.0)[draw % 2] if draws > 1 else float(rng.choice([0.0, 10.0]))
        std = float(10.0 ** rng.uniform(-6, 2))
        spec = IBNormSpec(compression, float(2.0 ** rng.uniform(-1, 4)), epsilon=float(10.0 ** rng.uniform(-6, -3)))
        affine = "float32" if draw % 4 < 2 else dtype
        rows = rows_for(cols)
        scale, bias = draw_parameters(rng, cols, affine)
        x = draw_rows(rng, rows, cols, dtype, std, mean)
        y = emulator.run(x, scale, bias, spec, seed=draw)
        assert_accurate(y, x, scale, bias, spec, mean)

        skip = draw_rows(rng, rows, cols, dtype, std, 0.0)
        total = np.full_like(x, np.nan)
        fused = emulator.run(x, scale, bias, spec, skip=skip, total=total, seed=draw + 100)
        _, expected = reference.skip_ibnorm(x, skip, scale=scale, bias=bias, spec=spec)
        assert same_bits(total, expected)
        assert same_bits(fused, emulator.run(total, scale, bias, spec, seed=draw + 200))
        if draw == 0:
            assert same_bits(fused, emulator.run(x, scale, bias, spec, skip=skip, seed=draw + 300))  # without the sum


@pytest.mark.parametrize("cols", [16, 760, 1024, 1500, 4096])
@pytest.mark.parametrize("compression", COMPRESSIONS, ids=lambda c: c.value)
@pytest.mark.parametrize("dtype", DTYPES)
def test_worst_errors_of_the_instructions(emulator: Emulator, dtype: str, compression: Compression, cols: int) -> None:
    """Each approximate instruction always errs by the bound of the PTX ISA."""
    rng = np.random.default_rng(cols)
    spec = IBNormSpec(compression, 2.0, epsilon=1e-6)
    scale, bias = draw_parameters(rng, cols, dtype)
    for std in (1e-6, 0.1, 3.0):
        x = draw_rows(rng, -(-ELEMENTS // cols), cols, dtype, std, 0.0)
        y = emulator.run(x, scale, bias, spec, injection=2)
        expected = reference.ibnorm(x, scale, bias=bias, spec=spec)
        if dtype == "float32":
            assert norm_error(y, expected) <= FLOAT32_TOLERANCE[0.0]
        else:
            ulp, _ = outside_one_ulp(y, expected, scale, bias)
            assert ulp <= 1.0


@pytest.mark.parametrize("rows", [0, 1, 2, 31, 1000])
@pytest.mark.parametrize("cols", [1, 41, 768, 4096])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows(emulator: Emulator, dtype: str, cols: int, rows: int) -> None:
    """Any number of rows, with a last block that is partly filled. A row does not depend on its neighbours."""
    if rows * cols > 200_000:
        rows = 33
    rng = np.random.default_rng(rows)
    spec = IBNormSpec(Compression.LOGARITHMIC)
    scale, bias = draw_parameters(rng, cols, dtype)
    x = draw_rows(rng, rows, cols, dtype, 1.0, 0.0)
    with ExitStack() as stack:
        guarded_x = stack.enter_context(guarded(emulator, x))
        y = stack.enter_context(emulator.guarded(x.shape, x.dtype))
        emulator.run(guarded_x, scale, bias, spec, y=y)
        y = y.copy()
        del guarded_x
    for row in {0, rows // 2, rows - 1} if rows else ():
        assert same_bits(y[row], emulator.run(x[row : row + 1], scale, bias, spec, seed=7)[0])


def test_no_columns(emulator: Emulator) -> None:
    empty = np.empty((3, 0), np.float32)
    emulator.run(empty, np.empty(0, np.float32), np.empty(0, np.float32), IBNormSpec(Compression.TANH))


@pytest.mark.parametrize("cols", [1, 8, 17, 264, 768, 1023, 4096, 8191])
@pytest.mark.parametrize("skipped", [False, True], ids=["plain", "skip"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_touches_nothing_outside(emulator: Emulator, dtype: str, skipped: bool, cols: int) -> None:
    """Inaccessible pages on either side of every array, at the alignment that the size gives."""
    rng = np.random.default_rng(cols)
    spec = IBNormSpec(Compression.LOGARITHMIC)
    scale, bias = draw_parameters(rng, cols, dtype)
    x, skip = (draw_rows(rng, 5, cols, dtype, 1.0, 0.0) for _ in range(2))
    for at_end in (False, True):
        # Nothing guarded outlives the block: a failing assertion would print unmapped memory.
        with ExitStack() as stack:
            inputs = [stack.enter_context(guarded(emulator, a, 0, at_end)) for a in (x, skip, scale, bias)]
            outputs = [stack.enter_context(emulator.guarded(x.shape, x.dtype, 0, at_end)) for _ in range(2)]
            y = emulator.run(
                inputs[0],
                inputs[2],
                inputs[3],
                spec,
                skip=inputs[1] if skipped else None,
                y=outputs[0],
                total=outputs[1] if skipped else None,
            )
            y, total = y.copy(), outputs[1].copy()
            unchanged = [same_bits(given, kept) for given, kept in zip(inputs, (x, skip, scale, bias), strict=True)]
            del inputs, outputs
        assert_accurate(y, total if skipped else x, scale, bias, spec, 0.0)
        assert all(unchanged)


@pytest.mark.parametrize("cols", [16, 768, 4096])
@pytest.mark.parametrize("moved", range(6))
@pytest.mark.parametrize("dtype", DTYPES)
def test_unaligned_pointers(emulator: Emulator, dtype: str, moved: int, cols: int) -> None:
    """Each array in turn at an address that is a multiple of its element only."""
    rng = np.random.default_rng(cols)
    spec = IBNormSpec(Compression.TANH)
    scale, bias = draw_parameters(rng, cols, dtype)
    x, skip = (draw_rows(rng, 3, cols, dtype, 1.0, 0.0) for _ in range(2))
    offset = [0] * 6
    offset[moved] = DTYPES[dtype].itemsize
    with ExitStack() as stack:
        inputs = [
            stack.enter_context(guarded(emulator, a, offset[i], False)) for i, a in enumerate((x, skip, scale, bias))
        ]
        y, total = (stack.enter_context(emulator.guarded(x.shape, x.dtype, offset[4 + i], False)) for i in range(2))
        emulator.run(inputs[0], inputs[2], inputs[3], spec, skip=inputs[1], y=y, total=total)
        y, total = y.copy(), total.copy()
        del inputs
    assert_accurate(y, total, scale, bias, spec, 0.0)


@pytest.mark.parametrize("cols", [41, 768, 4096])
@pytest.mark.parametrize("compression", COMPRESSIONS, ids=lambda c: c.value)
@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place(emulator: Emulator, dtype: str, compression: Compression, cols: int) -> None:
    """y may be x or skip; sum may be x or skip."""
    rng = np.random.default_rng(cols)
    spec = IBNormSpec(compression)
    scale, bias = draw_parameters(rng, cols, dtype)
    x, skip = (draw_rows(rng, 6, cols, dtype, 1.0, 0.0) for _ in range(2))
    plain = emulator.run(x, scale, bias, spec)
    total = np.empty_like(x)
    fused = emulator.run(x, scale, bias, spec, skip=skip, total=total)

    own = x.copy()
    assert same_bits(emulator.run(own, scale, bias, spec, y=own), plain)
    for y_at, sum_at in (("x", None), ("skip", None), ("x", "skip"), ("skip", "x"), (None, "x"), (None, "skip")):
        at = {"x": x.copy(), "skip": skip.copy()}
        y = at[y_at] if y_at else np.empty_like(x)
        out = at[sum_at] if sum_at else None
        emulator.run(at["x"], scale, bias, spec, skip=at["skip"], y=y, total=out, seed=3)
        assert same_bits(y, fused), (y_at, sum_at)
        assert out is None or same_bits(out, total), (y_at, sum_at)
    doubled = emulator.run(x, scale, bias, spec, skip=x)
    assert same_bits(doubled, emulator.run((x + x).astype(x.dtype), scale, bias, spec))


@pytest.mark.parametrize("cols", [1, 3, 41, 768, 1023, 4096, 16384, 65536])
@pytest.mark.parametrize("compression", COMPRESSIONS, ids=lambda c: c.value)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_values_give_bias(emulator: Emulator, dtype: str, compression: Compression, cols: int) -> None:
    """Within 1e-6 of scale for any value. With epsilon 0 the result is 0/0, which is NaN."""
    rng = np.random.default_rng(cols)
    scale, bias = draw_parameters(rng, cols, dtype)
    values = [0.0, 1.0, -3.7, 0.1, 1e-6, 1234.567, -6e4]
    if dtype != "float16":
        values += [1e6, -3.3e9, 1e15]
    x = np.repeat(np.array(values)[:, None], cols, axis=1).astype(DTYPES[dtype])
    for lambd, epsilon in ((4.0, 1e-5), (0.5, 1e-12)):
        y = emulator.run(x, scale, bias, IBNormSpec(compression, lambd, epsilon=epsilon))
        error = np.abs(y.astype(np.float64) - bias.astype(np.float64)) / np.abs(scale.astype(np.float64))
        assert error.max() <= 1e-6
    assert np.isnan(emulator.run(x, scale, bias, IBNormSpec(compression, 4.0, epsilon=0.0)).astype(np.float64)).all()


@pytest.mark.parametrize("cols", [41, 768, 1024, 4096, 65536])
@pytest.mark.parametrize("compression", COMPRESSIONS, ids=lambda c: c.value)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nearly_equal_values_keep_their_spread(
    emulator: Emulator, dtype: str, compression: Compression, cols: int
) -> None:
    """One element an ulp above the rest is not mistaken for a row of equal values."""
    x = np.repeat(np.array([1.0, 1.2345, -77.7])[:, None], cols, axis=1).astype(DTYPES[dtype])
    step = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}[dtype]
    x[:, cols // 2] = x[:, cols // 2] * DTYPES[dtype].type(1.0 + step)
    scale, bias = np.ones(cols, DTYPES[dtype]), np.zeros(cols, DTYPES[dtype])
    spec = IBNormSpec(compression, 1.0, epsilon=1e-20)
    y = emulator.run(x, scale, bias, spec).astype(np.float64)
    assert norm_error(y, reference.ibnorm(x, scale, bias=bias, spec=spec)) < 0.01


@pytest.mark.parametrize("cols", [3, 41, 768, 1500, 4096])
@pytest.mark.parametrize("compression", COMPRESSIONS, ids=lambda c: c.value)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_poison_their_row(emulator: Emulator, dtype: str, compression: Compression, cols: int) -> None:
    rng = np.random.default_rng(cols)
    spec = IBNormSpec(compression)
    scale, bias = draw_parameters(rng, cols, dtype)
    x = draw_rows(rng, 9, cols, dtype, 1.0, 0.0)
    clean = emulator.run(x, scale, bias, spec)
    poisons = {1: [np.nan], 3: [np.inf], 4: [-np.inf], 6: [np.inf, -np.inf]}
    for row, values in poisons.items():
        for value in values:
            x[row, rng.integers(cols)] = value
    skip = np.zeros_like(x)
    for y in (emulator.run(x, scale, bias, spec), emulator.run(x, scale, bias, spec, skip=skip)):
        for row in range(9):
            if row in poisons:
                assert np.isnan(y[row].astype(np.float64)).all()
            else:
                assert same_bits(y[row], clean[row])


@pytest.mark.parametrize("cols", [17, 768, 4096])
@pytest.mark.parametrize("compression", COMPRESSIONS, ids=lambda c: c.value)
@pytest.mark.parametrize("dtype", DTYPES)
def test_subnormal_values(emulator: Emulator, dtype: str, compression: Compression, cols: int) -> None:
    """They count like other numbers: a small lambda shows them, and epsilon does not hide them."""
    rng = np.random.default_rng(cols)
    tiny = {"float32": 2.0**-140, "float16": 2.0**-20, "bfloat16": 2.0**-130}[dtype]
    rows = -(-ELEMENTS // cols)
    x = (rng.integers(-400, 400, (rows, cols)) * tiny / (400 if dtype == "bfloat16" else 32)).astype(DTYPES[dtype])
    assert (x != 0).mean() > 0.5
    scale, bias = np.ones(cols, DTYPES[dtype]), np.zeros(cols, DTYPES[dtype])
    spec = IBNormSpec(compression, max(2.0**-126, tiny), epsilon=1e-5)
    assert_accurate(emulator.run(x, scale, bias, spec), x, scale, bias, spec, 10.0)


@pytest.mark.parametrize("cols", [3, 41, 768, 1023, 1024, 4096, 16384, 65536])
@pytest.mark.parametrize("compression", COMPRESSIONS, ids=lambda c: c.value)
@pytest.mark.parametrize("dtype", DTYPES)
def test_mean_of_ten_deviations(emulator: Emulator, dtype: str, compression: Compression, cols: int) -> None:
    """Rows far above lambda, where an error of the mean changes the few values near it most."""
    rng = np.random.default_rng(cols)
    scale, bias = draw_parameters(rng, cols, dtype)
    for std, lambd in ((1.0, 0.5), (100.0, 0.5), (100.0, 4.0)):
        x = draw_rows(rng, rows_for(cols, 4 * ELEMENTS), cols, dtype, std, 10.0)
        spec = IBNormSpec(compression, lambd, epsilon=1e-6)
        assert_accurate(emulator.run(x, scale, bias, spec), x, scale, bias, spec, 10.0)


@pytest.mark.parametrize("cols", [41, 1024, 4096])
@pytest.mark.parametrize("compression", COMPRESSIONS, ids=lambda c: c.value)
def test_huge_mean(emulator: Emulator, compression: Compression, cols: int) -> None:
    """The mean is 1e4 standard deviations: the error may grow with the mean, and no faster."""
    rng = np.random.default_rng(cols)
    scale, bias = draw_parameters(rng, cols, "float32")
    x = (rng.standard_normal((-(-ELEMENTS // cols), cols)) + 1e4).astype(np.float32)
    spec = IBNormSpec(compression, 1.0)
    assert norm_error(emulator.run(x, scale, bias, spec), reference.ibnorm(x, scale, bias=bias, spec=spec)) < 1e-3


@pytest.mark.parametrize("cols", [1023, 1024, 2056, 8192])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_schedule_changes_a_bit(emulator: Emulator, dtype: str, cols: int) -> None:
    """Twelve adversarial orders of the warps."""
    rng = np.random.default_rng(cols)
    spec = IBNormSpec(Compression.LOGARITHMIC)
    scale, bias = draw_parameters(rng, cols, dtype)
    x, skip = (draw_rows(rng, 3, cols, dtype, 1.0, 0.0) for _ in range(2))
    results = {emulator.run(x, scale, bias, spec, skip=skip, seed=seed).tobytes() for seed in range(12)}
    assert len(results) == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_plan_covers_every_width(emulator: Emulator, dtype: str) -> None:
    """Row kernels hold the row, and only their last vectors may lie outside it."""
    per_vector = 16 // DTYPES[dtype].itemsize
    guarded_after = {v: p for p, v in zip((0, 1, 2, 3, 4, 6), (1, 2, 3, 4, 6, 8), strict=True)}
    if dtype == "float32":
        guarded_after = {v: p for p, v in zip((0, 1, 2, 4, 6, 8, 12), (1, 2, 4, 6, 8, 12, 16), strict=True)}
    for cols in range(1, 40_000):
        plan = emulator.plan(cols, dtype)
        assert 32 <= plan.threads <= 1024
        assert plan.threads % 32 == 0
        if plan.method == "stream":
            assert cols % per_vector != 0 or cols > 32768
            continue
        assert cols % per_vector == 0
        threads_per_row = 32 if plan.method == "warp" else plan.threads
        complete = guarded_after[plan.vectors] if plan.method == "warp" else plan.vectors // 2
        assert complete * threads_per_row <= cols // per_vector <= plan.vectors * threads_per_row
        assert plan.threads <= (1024 if dtype == "float32" else 512)
    assert emulator.plan(1024, dtype, aligned=False).method == "stream"


_GOOD: dict[str, Any] = {"rows": 2, "cols": 8, "types": (0, 0), "compression": 1, "lambd": 4.0, "epsilon": 1e-5}


@pytest.mark.parametrize(
    "bad",
    [
        {"rows": -1},
        {"cols": -1},
        {"rows": 2**60, "cols": 2**60},
        {"types": (3, 0)},
        {"types": (0, 1)},
        {"types": (1, 2)},
        {"compression": 3},
        {"compression": -1},
        {"lambd": 0.0},
        {"lambd": -1.0},
        {"lambd": float("inf")},
        {"lambd": float("nan")},
        {"epsilon": -1e-9},
        {"epsilon": float("nan")},
        {"epsilon": float("inf")},
        *({"null": i} for i in (0, 2, 3, 4)),
        {"sum_without_skip": True},
        {"sum_is_y": True},
    ],
    ids=str,
)
def test_illegal_arguments_are_refused(emulator: Emulator, bad: dict[str, Any]) -> None:
    arrays = [np.ones((2, 8), np.float32) for _ in range(6)]
    pointers: list[int | None] = [a.ctypes.data for a in arrays]
    pointers[1] = pointers[5] = None
    if "null" in bad:
        pointers[bad["null"]] = None
    if "sum_without_skip" in bad:
        pointers[5] = arrays[5].ctypes.data
    if "sum_is_y" in bad:
        pointers[1], pointers[5] = arrays[1].ctypes.data, pointers[4]
    values = {**_GOOD, **{k: v for k, v in bad.items() if k in _GOOD}}
    assert emulator.raw_run(tuple(pointers), **values) == 1  # type: ignore[arg-type]


def test_legal_arguments_are_accepted(emulator: Emulator) -> None:
    nothing = (None,) * 6
    assert emulator.raw_run(nothing, **{**_GOOD, "rows": 0}) == 0
    assert emulator.raw_run(nothing, **{**_GOOD, "cols": 0}) == 0
    with pytest.raises(EmulationError, match="invalid argument"):
        emulator.run(
            np.ones((1, 8), np.float32),
            np.ones(8, DTYPES["float16"]),
            np.ones(8, DTYPES["float16"]),
            IBNormSpec(Compression.LINEAR),
        )
