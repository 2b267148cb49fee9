"""The node and its function bodies, run by ONNX Runtime and by onnx.reference, against the float64 reference.

For each known numerical pitfall, a second test shows that a wrong body fails the check.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.checker
import onnx.helper
import onnx.inliner
import onnx.reference
import onnxruntime as ort
import pytest

from ibnorm_export import Compression, IBNormSpec
from ibnorm_export.errors import SpecError
from ibnorm_export.op import onnx_functions as onnx_op
from ibnorm_export.op import reference
from ibnorm_export.op.spec import DOMAIN, SCHEMA
from ibnorm_export.runtimes.ort import OrtRunner
from tests.support.accuracy import Array, Case, assert_half_exact, cases, relative_error

EVERY = pytest.mark.parametrize("kind", list(Compression))
BOTH = pytest.mark.parametrize("skip", [False, True], ids=["plain", "skip"])
BACKENDS = pytest.mark.parametrize("backend", ["ort", "onnx.reference"])
TYPES = {
    np.dtype(np.float32): onnx.TensorProto.FLOAT,
    np.dtype(np.float16): onnx.TensorProto.FLOAT16,
    np.dtype(ml_dtypes.bfloat16): onnx.TensorProto.BFLOAT16,
}
NODES = {Compression.LINEAR: 4, Compression.TANH: 5, Compression.LOGARITHMIC: 11}

#: Plausible but wrong bodies of L, and which checks they fail: activations of 1e-4, of 1e-6, equal values.
WRONG_LOGARITHMS: dict[str, tuple[str, list[bool]]] = {
    "ln(1 + r) as written": (
        """
        one = Constant <value_float = 1.0> ()
        r = Abs(t)
        one_r = Add(one, r)
        log_q = Log(one_r)
        sign = Sign(t)
        c = Mul(sign, log_q)""",
        [True, True, False],
    ),
    "divided by r, not by the rounded q - 1": (
        """
        one = Constant <value_float = 1.0> ()
        smallest = Constant <value_float = 1.00000011920928955078125> ()
        tiny = Constant <value_float = 1.1754943508222875e-38> ()
        r = Abs(t)
        one_r = Add(one, r)
        q = Max(one_r, smallest)
        log_q = Log(q)
        r_1 = Max(r, tiny)
        numerator = Mul(t, log_q)
        c = Div(numerator, r_1)""",
        [True, True, False],
    ),
    "no floor under q": (
        """
        one = Constant <value_float = 1.0> ()
        r = Abs(t)
        q = Add(one, r)
        log_q = Log(q)
        q_1 = Sub(q, one)
        numerator = Mul(t, log_q)
        c = Div(numerator, q_1)""",
        [True, True, True],
    ),
}


def bare(spec: IBNormSpec, dtype: Any = np.float32, *, opset: int = 23, skip: bool = False) -> onnx.ModelProto:
    """A node of `dtype` with its function. Inputs and outputs are float32, because NumPy lacks bfloat16."""
    elem, single = TYPES[np.dtype(dtype)], onnx.TensorProto.FLOAT
    names = ["X", "skip", "scale", "bias"] if skip else ["X", "scale", "bias"]
    outputs = ["Y", "sum"] if skip else ["Y"]
    cast = elem != single
    inner = [f"{n}_t" if cast else n for n in (*names, *outputs)]
    if skip:
        x, s, a, b, y, total = inner
        norm = onnx_op.skip_node(x, s, scale=a, bias=b, y=y, total=total, spec=spec, name="norm")
    else:
        norm = onnx_op.node(inner[0], inner[1], bias=inner[2], y=inner[3], spec=spec, name="norm")
    nodes = [norm]
    if cast:
        before = [onnx.helper.make_node("Cast", [n], [f"{n}_t"], to=elem) for n in names]
        after = [onnx.helper.make_node("Cast", [f"{n}_t"], [n], to=single) for n in outputs]
        nodes = [*before, norm, *after]
    shapes: dict[str, list[str]] = {"scale": ["n"], "bias": ["n"]}
    graph = onnx.helper.make_graph(
        nodes,
        "bare",
        [onnx.helper.make_tensor_value_info(n, single, shapes.get(n, ["rows", "n"])) for n in names],
        [onnx.helper.make_tensor_value_info(n, single, ["rows", "n"]) for n in outputs],
    )
    body = (onnx_op.skip_function if skip else onnx_op.function)(spec.compression, opset)
    imports = onnx_op.opset_imports(opset)
    return onnx.helper.make_model(graph, functions=[body], opset_imports=imports, ir_version=10)


def run(model: onnx.ModelProto, backend: str, **arrays: Array) -> list[Array]:
    """Run a model at the default optimisation level; outputs are in the order of the graph."""
    feeds = {name: np.asarray(array, np.float32) for name, array in arrays.items()}
    if backend == "ort":
        return list(OrtRunner(model.SerializeToString(), threads=1).run(feeds).values())
    with np.errstate(all="ignore"):
        return list(onnx.reference.ReferenceEvaluator(model).run(None, feeds))


def tolerance(case: Case) -> float:
    """The largest relative error that the function may have."""
    if case.x.shape[-1] <= 1024:
        return 1e-5 if case.mean else 5e-7
    return 3e-5 if case.mean else 2e-5


def affine(width: int) -> tuple[Array, Array]:
    rng = np.random.default_rng(7)
    return tuple(rng.standard_normal((2, width)).astype(np.float32))  # type: ignore[return-value]


@EVERY
@BACKENDS
def test_float32_accuracy(kind: Compression, backend: str) -> None:
    for case in cases(kind, np.float32):
        (y,) = run(bare(case.spec), backend, X=case.x, scale=case.scale, bias=case.bias)
        assert y.dtype == np.float32
        assert relative_error(y, case.exact) <= tolerance(case), str(case)


@EVERY
@BACKENDS
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["fp16", "bf16"])
def test_half_accuracy(kind: Compression, dtype: Any, backend: str) -> None:
    """A bfloat16 graph loads on a CPU because the body computes in float32."""
    for case in cases(kind, dtype, (1, 7, 111, 1023, 4096)):
        (y,) = run(bare(case.spec, dtype), backend, X=case.x, scale=case.scale, bias=case.bias)
        assert_half_exact(y, case)


@EVERY
@BACKENDS
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=["fp32", "fp16", "bf16"])
def test_the_skip_form_normalises_the_rounded_sum(kind: Compression, dtype: Any, backend: str) -> None:
    for case in cases(kind, dtype, (7, 768)):
        if case.mean and dtype is not np.float32:
            continue  # float32's own mean of such rows is further off than an ulp of fp16 where lambda is 0.5
        skip = np.roll(case.x, 1, axis=0)
        exact, total = reference.skip_ibnorm(case.x, skip, scale=case.scale, bias=case.bias, spec=case.spec)
        model = bare(case.spec, dtype, skip=True)
        y, got = run(model, backend, X=case.x, skip=skip, scale=case.scale, bias=case.bias)
        np.testing.assert_array_equal(got, total.astype(np.float32))
        summed = Case(total, case.scale, case.bias, case.spec, exact, case.mean)
        if dtype is np.float32:
            assert relative_error(y, exact) <= tolerance(summed), str(case)
        else:
            assert_half_exact(y, summed)


@EVERY
@BOTH
@BACKENDS
@pytest.mark.parametrize("opset", [18, 20, 23])
def test_all_opsets_compute_the_same(kind: Compression, skip: bool, backend: str, opset: int) -> None:
    rng = np.random.default_rng(opset)
    x, other = rng.standard_normal((2, 8, 520)).astype(np.float32)
    scale, bias = affine(520)
    spec = IBNormSpec(kind, 2.0, epsilon=1e-5)
    arrays = {"X": x, "scale": scale, "bias": bias, **({"skip": other} if skip else {})}
    y, *_ = run(bare(spec, opset=opset, skip=skip), backend, **arrays)
    assert relative_error(y, reference.ibnorm(x + other if skip else x, scale, bias=bias, spec=spec)) <= 5e-7


def small_error(backend: str, deviation: float) -> float:
    """Error of L for small activations; with epsilon 0 it only depends on the compressed values."""
    x = (np.random.default_rng(3).standard_normal((8, 512)) * deviation).astype(np.float32)
    spec = IBNormSpec(Compression.LOGARITHMIC, 4.0, epsilon=0.0)
    (y,) = run(bare(spec), backend, X=x, scale=np.ones(512), bias=np.zeros(512))
    return relative_error(y, reference.ibnorm(x, None, bias=None, spec=spec))


def constant_rows(backend: str, kind: Compression) -> float:
    """Largest difference from the bias in rows of equal values, in units of the scale."""
    x = np.tile(np.float32([[0.0], [10.1], [-1e-6], [1e6]]), 768)
    scale, bias = affine(768)
    (y,) = run(bare(IBNormSpec(kind, 4.0, epsilon=1e-12)), backend, X=x, scale=scale, bias=bias)
    return float(np.max(np.abs(y.astype(np.float64) - bias) / np.abs(scale)))


@BACKENDS
@pytest.mark.parametrize("deviation", [1e-2, 1e-4, 1e-6])
def test_small_activations(backend: str, deviation: float) -> None:
    assert small_error(backend, deviation) <= 5e-7


@BACKENDS
@EVERY
def test_rows_of_equal_values_give_the_bias(backend: str, kind: Compression) -> None:
    assert constant_rows(backend, kind) <= 1e-6


@BACKENDS
@pytest.mark.parametrize("wrong", list(WRONG_LOGARITHMS))
def test_a_wrong_logarithm_is_caught(wrong: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        onnx_op._COMPRESS,  # type: ignore[arg-type]  # Final is for the type checker
        Compression.LOGARITHMIC,
        WRONG_LOGARITHMS[wrong][0],
    )
    large = (np.random.default_rng(3).standard_normal((8, 512)) * 10).astype(np.float32)
    spec = IBNormSpec(Compression.LOGARITHMIC)
    (y,) = run(bare(spec), backend, X=large, scale=np.ones(512), bias=np.zeros(512))
    assert relative_error(y, reference.ibnorm(large, None, bias=None, spec=spec)) <= 1e-6, "correct for large values"
    caught = [not small_error(backend, d) <= 5e-7 for d in (1e-4, 1e-6)]
    caught.append(not constant_rows(backend, Compression.LOGARITHMIC) <= 1e-6)
    assert caught == WRONG_LOGARITHMS[wrong][1]


@BACKENDS
@pytest.mark.parametrize(
    ("kind", "size"), [("S", 1e15), ("L", 1e15), ("L", 1e30), ("L", 1e35), ("T", 1e15), ("T", 1e30)]
)
def test_huge_activations(kind: str, size: float, backend: str) -> None:
    x = (np.random.default_rng(4).standard_normal((8, 512)) * size).astype(np.float32)
    spec = IBNormSpec(Compression(kind))
    scale, bias = affine(512)
    (y,) = run(bare(spec), backend, X=x, scale=scale, bias=bias)
    assert relative_error(y, reference.ibnorm(x, scale, bias=bias, spec=spec)) <= 5e-7


@EVERY
@BOTH
@BACKENDS
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_stay_in_their_row(kind: Compression, skip: bool, backend: str, poison: float) -> None:
    x = np.random.default_rng(5).standard_normal((4, 33)).astype(np.float32)
    scale, bias = affine(33)
    model = bare(IBNormSpec(kind), skip=skip)
    extra = {"skip": np.zeros_like(x)} if skip else {}
    clean = run(model, backend, X=x, scale=scale, bias=bias, **extra)[0]
    bad = x.copy()
    bad[1, 5] = poison
    y = run(model, backend, X=bad, scale=scale, bias=bias, **extra)[0]
    assert np.isnan(y[1]).all()
    np.testing.assert_array_equal(np.delete(y, 1, 0), np.delete(clean, 1, 0))


@EVERY
@BOTH
@BACKENDS
def test_an_input_without_rows(kind: Compression, skip: bool, backend: str) -> None:
    empty = np.empty((0, 16))
    extra = {"skip": empty} if skip else {}
    outputs = run(bare(IBNormSpec(kind), skip=skip), backend, X=empty, scale=np.ones(16), bias=np.zeros(16), **extra)
    assert [o.shape for o in outputs] == [(0, 16)] * len(outputs)


@EVERY
def test_any_number_of_leading_axes(kind: Compression) -> None:
    """The function does not fix the rank: a graph may normalise a vector or a tensor of five axes."""
    scale, bias = affine(6)
    spec = IBNormSpec(kind)
    for shape in ((6,), (2, 3, 6), (2, 1, 2, 3, 6)):
        model = bare(spec)
        for value in (model.graph.input[0], model.graph.output[0]):
            value.type.tensor_type.ClearField("shape")
        x = np.random.default_rng(6).standard_normal(shape).astype(np.float32)
        (y,) = run(model, "ort", X=x, scale=scale, bias=bias)
        assert y.shape == shape
        assert relative_error(y, reference.ibnorm(x, scale, bias=bias, spec=spec)) <= 5e-7


def optimised(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """The model after ONNX Runtime inlined functions and folded Casts and constants, without fusions."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return onnx.load(folder / "optimised.onnx")


@EVERY
def test_nodes_after_inlining(kind: Compression, tmp_path: Path) -> None:
    """Nodes of the inlined function, without those that vanish in float32, and nodes that ONNX Runtime runs."""
    model = bare(IBNormSpec(kind))
    inlined = onnx.inliner.inline_local_functions(model)
    assert not inlined.functions
    kept = [n.op_type for n in inlined.graph.node if n.op_type not in ("Cast", "CastLike", "Constant")]
    assert len(kept) == NODES[kind], kept

    # Between two nodes, as in a model: a Cast that writes a graph output itself is never folded.
    (norm,) = model.graph.node
    norm.input[0], norm.output[0] = "before", "after"
    model.graph.node.insert(0, onnx.helper.make_node("Relu", ["X"], ["before"]))
    model.graph.node.append(onnx.helper.make_node("Softplus", ["after"], ["Y"]))
    served = [n.op_type for n in optimised(model, tmp_path).graph.node]
    assert sorted(served) == sorted([*kept, "Relu", "Softplus"])


@EVERY
@BOTH
@pytest.mark.parametrize("opset", list(onnx_op.OPSETS))
def test_the_checker_accepts_every_body(kind: Compression, skip: bool, opset: int) -> None:
    onnx.checker.check_model(bare(IBNormSpec(kind), opset=opset, skip=skip), full_check=True)


@EVERY
@BOTH
def test_a_node_has_all_inputs_and_attributes(kind: Compression, skip: bool) -> None:
    spec = IBNormSpec(kind, 0.1, epsilon=3e-7)
    (node,) = bare(spec, skip=skip).graph.node
    assert (node.domain, node.op_type) == (DOMAIN, ("Skip" if skip else "") + f"IBNorm{kind.value}")
    written = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert written == {
        "lambd": float(np.float32(0.1)),
        "epsilon": float(np.float32(3e-7)),
        "axis": -1,
        "plugin_namespace": b"",
    }
    kinds = {"float": onnx.AttributeProto.FLOAT, "int": onnx.AttributeProto.INT, "string": onnx.AttributeProto.STRING}
    assert {a.name: a.type for a in node.attribute} == {k: kinds[v] for k, v in SCHEMA["attributes"].items()}


def test_functions_have_no_attribute_defaults() -> None:
    """onnx.reference ignores defaults of a function, and TensorRT miscompiles overloads."""
    bodies = onnx_op.functions(23)
    assert list(bodies) == SCHEMA["ops"]
    for op_type, body in bodies.items():
        assert (body.domain, body.name, body.overload) == (DOMAIN, op_type, "")
        assert sorted(body.attribute) == sorted(SCHEMA["attributes"])
        assert not body.attribute_proto
        assert {n.domain for n in body.node} == {""}


@pytest.mark.parametrize("opset", [0, 17, 27, -1])
def test_an_opset_outside_the_range_is_an_error(opset: int) -> None:
    for make in (onnx_op.function, onnx_op.skip_function):
        with pytest.raises(SpecError, match=rf"opset is {opset};.* 18 to 26"):
            make(Compression.LINEAR, opset)
