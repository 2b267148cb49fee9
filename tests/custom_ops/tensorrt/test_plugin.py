"""Every IPluginV3 call of the plugin library, including `enqueue`, with emulated kernels."""

from __future__ import annotations

import ctypes
import itertools
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from ibnorm_export.op import reference
from ibnorm_export.op.spec import OP_TYPES, SCHEMA, SKIP_OP_TYPES, Compression, IBNormSpec
from tests.support import trt_plugin
from tests.support.trt_plugin import DATA_TYPES, FIELD_TYPES, Plugin, Refused, cuda_emulator

ALL = (*OP_TYPES, *SKIP_OP_TYPES)
F32, F16, BF16 = np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
SPEC = IBNormSpec("L", 2.5, epsilon=1e-6)


@contextmanager
def opened(harness: Path, library: Path, op_type: str, fields: Any = None) -> Iterator[Plugin]:
    plugin = Plugin(harness, library, op_type, trt_plugin.fields_of(SPEC) if fields is None else fields)
    yield plugin
    plugin.close()


@pytest.fixture(params=ALL)
def plugin(request: pytest.FixtureRequest, harness: Path, plugin_library: Path) -> Iterator[Plugin]:
    with opened(harness, plugin_library, request.param) as made:
        yield made


# -- the library ---------------------------------------------------------------------------------


def test_schema_equals_the_definition(plugin_library: Path) -> None:
    call = ctypes.CDLL(str(plugin_library)).ibnorm_schema
    call.restype = ctypes.c_char_p
    assert json.loads(call()) == SCHEMA


def test_six_creators_ask_for_the_attributes(harness: Path, plugin_library: Path) -> None:
    """All except plugin_namespace, which only the parser reads."""
    described = trt_plugin.describe(harness, plugin_library)
    assert tuple(described) == ALL
    codes = {"float": FIELD_TYPES["float32"], "int": FIELD_TYPES["int32"]}
    wanted = {name: codes[kind] for name, kind in SCHEMA["attributes"].items() if name != "plugin_namespace"}
    assert all(fields == wanted for fields in described.values())


# -- creation ------------------------------------------------------------------------------------


def test_serialisation_round_trips(harness: Path, plugin_library: Path) -> None:
    rng = np.random.default_rng(0)
    for op_type in ALL:
        for _ in range(8):
            lambd = float(np.float32(10.0 ** rng.uniform(-37, 38)))
            epsilon = float(np.float32(10.0 ** rng.uniform(-45, 38)))
            fields = trt_plugin.fields_of(IBNormSpec("L", lambd, epsilon=epsilon))
            with opened(harness, plugin_library, op_type, fields) as plugin:
                assert plugin.fields == (lambd, epsilon, -1)


def test_has_a_timing_cache_id_and_no_workspace(plugin: Plugin) -> None:
    assert plugin.timing_cache_id in ALL
    assert plugin.workspace == 0


GOOD = {"lambd": ("float32", 4.0), "epsilon": ("float32", 1e-5), "axis": ("int32", -1)}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"axis": None},
        {"axis": ("int64", -1)},
        {"lambd": ("float64", 4.0)},
        {"epsilon": ("float32", 0.0)},
        {"plugin_namespace": ("char", b"\0")},
        {"plugin_namespace": ("char", b"")},
    ],
    ids=str,
)
def test_legal_fields_are_accepted(harness: Path, plugin_library: Path, change: dict[str, Any]) -> None:
    fields = {name: value for name, value in {**GOOD, **change}.items() if value is not None}
    with opened(harness, plugin_library, "IBNormL", fields) as plugin:
        assert plugin.fields[0] == 4.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lambd": None}, "field 'lambd' is missing"),
        ({"epsilon": None}, "field 'epsilon' is missing"),
        ({"lambd": ("float32", 0.0)}, "lambd is 0; it must be finite and at least"),
        ({"lambd": ("float32", -1.0)}, "lambd is -1"),
        ({"lambd": ("float32", math.nan)}, "lambd is nan"),
        ({"lambd": ("float32", math.inf)}, "lambd is inf"),
        ({"lambd": ("float32", 1e-39)}, "it must be finite and at least"),
        ({"lambd": ("float64", 1e300)}, "lambd is inf"),
        ({"lambd": ("int32", 4)}, "field 'lambd' has type 5"),
        ({"lambd": ("float32", [1.0, 2.0])}, "field 'lambd' has length 2"),
        ({"epsilon": ("float32", -1e-6)}, "epsilon is -1e-06; it must be finite and not negative"),
        ({"epsilon": ("float32", math.nan)}, "epsilon is nan"),
        ({"axis": ("int32", 1)}, "axis is 1; version 1 of the operator accepts only -1"),
        ({"axis": ("float32", -1.0)}, "field 'axis' has type 1"),
        ({"lambda": ("float32", 4.0)}, "there is no field 'lambda'; there are lambd, epsilon and axis"),
        ({"plugin_namespace": ("char", b"mine\0")}, "'plugin_namespace' must be the empty string"),
    ],
    ids=str,
)
def test_bad_fields_are_rejected_with_a_message(
    harness: Path, plugin_library: Path, capfd: pytest.CaptureFixture[str], change: dict[str, Any], words: str
) -> None:
    fields = {name: value for name, value in {**GOOD, **change}.items() if value is not None}
    with pytest.raises(Refused, match=r"session\.build != nullptr"):
        Plugin(harness, plugin_library, "SkipIBNormT", fields)
    said = capfd.readouterr().err
    assert said.startswith("ibnorm: SkipIBNormT plugin: ")
    assert words in said
    assert said.count("\n") == 1


# -- building ------------------------------------------------------------------------------------


def test_format_combinations(plugin: Plugin) -> None:
    """X may have three types, scale and bias that of X or float, and everything else has that of X."""
    count = plugin.inputs + plugin.outputs
    universe = (*DATA_TYPES.values(), 2, 3)  # and int8, int32
    taken = {types for types in itertools.product(universe, repeat=count) if plugin.supports(list(types))}
    scale = plugin.inputs - 2
    expected = {
        tuple(affine if i in (scale, scale + 1) else data for i in range(count))
        for data in DATA_TYPES.values()
        for affine in {data, DATA_TYPES["float32"]}
    }
    assert taken == expected
    assert len(taken) == 5
    for place in range(count):
        formats = [1 if i == place else trt_plugin.LINEAR for i in range(count)]
        assert not plugin.supports([0] * count, formats)
    assert not plugin.supports([0] * (count - 1), inputs=plugin.inputs - 1)


def test_outputs_follow_x(plugin: Plugin) -> None:
    for dtype, rank in itertools.product(DATA_TYPES.values(), (1, 3, 8)):
        assert plugin.infer(rank, dtype) == [dtype] * plugin.outputs
    assert plugin.infer(0, 0) is None
    assert plugin.infer(3, 0, inputs=plugin.inputs - 1) is None


# -- running -------------------------------------------------------------------------------------


def run(plugin: Plugin, x: NDArray[Any], scale: NDArray[Any], bias: NDArray[Any]) -> tuple[list[Any], Any]:
    """Run the plugin, and return its outputs with the expected normalised values."""
    outputs = [np.full(x.shape, np.nan, x.dtype) for _ in range(plugin.outputs)]
    skip = [x[::-1].copy()] if plugin.outputs == 2 else []
    assert plugin.run([x, *skip, scale, bias], outputs) == 0
    total = (x.astype(np.float32) + skip[0].astype(np.float32)).astype(x.dtype) if skip else x
    if skip:
        assert outputs[1].tobytes() == total.tobytes()
    return outputs, total


@pytest.mark.parametrize(("dtype", "affine"), [(F32, F32), (F16, F16), (F16, F32), (BF16, BF16), (BF16, F32)], ids=str)
@pytest.mark.parametrize("op_type", ALL)
def test_enqueue_is_accurate(
    harness: Path, plugin_library: Path, op_type: str, dtype: np.dtype[Any], affine: np.dtype[Any]
) -> None:
    """One plugin meets the accuracy targets with shapes that change from call to call."""
    spec = IBNormSpec(Compression(op_type[-1]), 2.5, epsilon=1e-6)
    rng = np.random.default_rng(len(op_type))
    with opened(harness, plugin_library, op_type, trt_plugin.fields_of(spec)) as plugin:
        for shape in ((2, 7, 384), (4096,), (3, 1, 2, 1023)):
            x = rng.normal(0.2, 1.5, shape).astype(dtype)
            scale, bias = (rng.normal(m, 0.2, shape[-1]).astype(affine) for m in (1.0, 0.0))
            outputs, total = run(plugin, x, scale, bias)
            exact = reference.ibnorm(total, scale, bias=bias, spec=spec)
            if dtype == F32:
                assert cuda_emulator.norm_error(outputs[0], exact) <= 5e-7
            else:
                ulp, equal = cuda_emulator.outside_one_ulp(outputs[0], exact, scale, bias)
                assert ulp <= 1.0
                assert equal >= 0.99


def test_lambda_and_epsilon_are_used(harness: Path, plugin_library: Path) -> None:
    x = np.linspace(-3, 3, 64, dtype=np.float32).reshape(2, 32) ** 3
    ones, zeros = np.ones(32, np.float32), np.zeros(32, np.float32)
    for lambd, epsilon in ((0.5, 0.0), (8.0, 0.0), (0.5, 10.0)):
        spec = IBNormSpec("T", lambd, epsilon=epsilon)
        with opened(harness, plugin_library, "IBNormT", trt_plugin.fields_of(spec)) as plugin:
            outputs, _ = run(plugin, x, ones, zeros)
        assert cuda_emulator.norm_error(outputs[0], reference.ibnorm(x, ones, bias=zeros, spec=spec)) <= 1e-6


def test_an_input_without_rows_is_accepted(plugin: Plugin) -> None:
    ones = np.ones(8, np.float32)
    run(plugin, np.zeros((0, 8), np.float32), ones, ones)


@pytest.mark.parametrize(
    ("op_type", "shapes", "words"),
    [
        ("IBNormL", [(2, 8), (7,), (8,)], "as long as the last axis of X"),
        ("IBNormL", [(2, 8), (8,), (1, 8)], "as long as the last axis of X"),
        ("IBNormL", [(), (8,), (8,)], "X is a scalar"),
        ("SkipIBNormL", [(2, 8), (1, 8), (8,), (8,)], "skip must have the shape of X"),
        ("IBNormL", [(2, 8), (8,)], "not connected"),
    ],
    ids=str,
)
def test_wrong_shapes_are_rejected_with_a_message(
    harness: Path,
    plugin_library: Path,
    capfd: pytest.CaptureFixture[str],
    op_type: str,
    shapes: list[tuple[int, ...]],
    words: str,
) -> None:
    with opened(harness, plugin_library, op_type) as plugin:
        inputs = [np.zeros(shape, np.float32) for shape in shapes]
        outputs = [np.zeros(shapes[0], np.float32) for _ in range(plugin.outputs)]
        assert plugin.run(inputs, outputs) >= 1000
    assert words in capfd.readouterr().err
