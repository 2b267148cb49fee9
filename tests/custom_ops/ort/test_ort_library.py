"""The custom-op library in ONNX Runtime: schema, types, accuracy, and hostile models."""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest

from ibnorm_export.op import native, reference
from ibnorm_export.op import onnx_functions as onnx_op
from ibnorm_export.op.spec import OP_TYPES, SCHEMA, SKIP_OP_TYPES, Compression, IBNormSpec

ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

CODES = {
    np.dtype(np.float32): onnx.TensorProto.FLOAT,
    np.dtype(np.float16): onnx.TensorProto.FLOAT16,
    np.dtype(ml_dtypes.bfloat16): onnx.TensorProto.BFLOAT16,
}
F32, F16, BF16 = CODES
HEADER = Path(__file__).resolve().parents[3] / "custom_ops" / "include" / "ibnorm" / "spec.h"


def model(
    node: onnx.NodeProto,
    dtype: np.dtype[Any] = F32,
    affine: np.dtype[Any] = F32,
    constants: dict[str, np.ndarray[Any, Any]] | None = None,
    x_shape: list[Any] | None = None,
    with_function: bool = False,
) -> bytes:
    """A model of one node. bfloat16 inputs and outputs are float32, which NumPy has."""
    constants = constants or {}
    nodes, inputs, outputs = [], [], []
    info = onnx.helper.make_tensor_value_info
    for name in node.input:
        if not name or name in constants:
            continue
        kind = affine if name in ("scale", "bias") else dtype
        rank_known = x_shape if name in ("X", "skip") and x_shape is not None else None
        if kind == BF16:
            inputs.append(info(f"{name}_f", onnx.TensorProto.FLOAT, rank_known))
            nodes.append(onnx.helper.make_node("Cast", [f"{name}_f"], [name], to=onnx.TensorProto.BFLOAT16))
        else:
            inputs.append(info(name, CODES[kind], rank_known))
    nodes.append(node)
    for name in node.output:
        if not name:
            continue
        if dtype == BF16:
            outputs.append(info(f"{name}_f", onnx.TensorProto.FLOAT, None))
            nodes.append(onnx.helper.make_node("Cast", [name], [f"{name}_f"], to=onnx.TensorProto.FLOAT))
        else:
            outputs.append(info(name, CODES[dtype], None))
    tensors = [onnx.helper.make_tensor(n, CODES[a.dtype], a.shape, a.tobytes(), raw=True) for n, a in constants.items()]
    graph = onnx.helper.make_graph(nodes, "one", inputs, outputs, tensors)
    functions = [onnx_op.functions(20)[node.op_type]] if with_function else []
    made = onnx.helper.make_model(graph, opset_imports=onnx_op.opset_imports(20), ir_version=10, functions=functions)
    return bytes(made.SerializeToString())


def session(data: bytes, library: Path | None, threads: int = 2) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    if library is not None:
        options.register_custom_ops_library(str(library))
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def node_for(kind: Compression, skip: bool, spec: IBNormSpec | None = None) -> onnx.NodeProto:
    spec = spec or IBNormSpec(kind)
    if skip:
        return onnx_op.skip_node(
            "X", "skip", scale="scale", bias="bias", y="Y", total="sum", spec=spec, name="the_norm"
        )
    return onnx_op.node("X", "scale", bias="bias", y="Y", spec=spec, name="the_norm")


# -- contract ------------------------------------------------------------------------------------


def test_schema_equals_the_definition(ort_library: Path) -> None:
    found = native.inspect(ort_library)
    assert found, str(found)
    assert found.schema == SCHEMA
    assert "cpu" in found.providers
    assert found.instruction_set in ("avx512", "avx2", "generic")
    assert str(ort_library) in str(found)


def test_header_equals_the_definition() -> None:
    """Needs no compiler: it reads the literal in spec.h."""
    text = HEADER.read_text(encoding="utf-8")
    literal = "".join(re.findall(r'R"\((.*?)\)"', text))
    assert json.loads(literal) == SCHEMA


def test_exports_only_its_entry_points(ort_library: Path) -> None:
    tool = subprocess.run(["nm", "-D", "--defined-only", str(ort_library)], capture_output=True, text=True, check=False)
    if tool.returncode:
        pytest.skip("nm is not installed")
    names = {line.split()[-1] for line in tool.stdout.splitlines()}
    assert names == {"RegisterCustomOps", "ibnorm_schema", "ibnorm_build"}


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "does not exist"), (b"\x7fELF\x02\x01\x01", "cannot be loaded"), (b"hello", "cannot be loaded")],
)
def test_unusable_files_are_explained(tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "libibnorm_ort.so"
    if content is not None:
        path.write_bytes(content)
    found = native.inspect(path)
    assert not found
    assert words in found.problem
    assert "make native" in str(found)


def test_a_foreign_library_is_explained() -> None:
    import _ctypes

    found = native.inspect(Path(_ctypes.__file__))
    assert not found
    assert "is not an IBNorm library" in found.problem


# -- results -------------------------------------------------------------------------------------


@pytest.mark.parametrize("skip", [False, True], ids=["plain", "skip"])
@pytest.mark.parametrize("kind", list(Compression), ids=str)
@pytest.mark.parametrize(("dtype", "affine"), [(F32, F32), (F16, F16), (F16, F32), (BF16, BF16), (BF16, F32)])
def test_every_type_runs_fused(
    ort_library: Path, dtype: np.dtype[Any], affine: np.dtype[Any], kind: Compression, skip: bool
) -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((3, 40, 111)).astype(dtype)
    other = rng.standard_normal(x.shape).astype(dtype)
    scale = (1 + 0.1 * rng.standard_normal(111)).astype(affine)
    bias = (0.1 * rng.standard_normal(111)).astype(affine)
    spec = IBNormSpec(kind)
    run = session(model(node_for(kind, skip), dtype, affine), ort_library)
    feeds = {}
    for name, value in (("X", x), ("skip", other), ("scale", scale), ("bias", bias)):
        if name == "skip" and not skip:
            continue
        feeds[f"{name}_f" if value.dtype == BF16 else name] = value.astype(np.float32) if value.dtype == BF16 else value
    got = run.run(None, feeds)
    total = reference.skip_ibnorm(x, other, scale=scale, bias=bias, spec=spec)[1] if skip else x
    exact = reference.ibnorm(total, scale, bias=bias, spec=spec)
    if dtype == F32:
        assert np.linalg.norm(got[0] - exact) / np.linalg.norm(exact) < 5e-7
    else:
        assert np.mean(got[0].astype(float) == exact.astype(dtype).astype(float)) >= 0.99
    if skip:
        np.testing.assert_array_equal(got[1].astype(np.float32), total.astype(np.float32))


@pytest.mark.parametrize("shape", [(0, 5), (5,), (1, 1), (2, 0), (2, 3, 4, 7), (0,)], ids=str)
def test_any_shape(ort_library: Path, shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
    scale, bias = np.ones(shape[-1], np.float32), np.full(shape[-1], 0.5, np.float32)
    for with_constants in (False, True):
        constants = {"scale": scale, "bias": bias} if with_constants else {}
        run = session(model(node_for(Compression.TANH, False), constants=constants), ort_library)
        y = run.run(None, {"X": x} if with_constants else {"X": x, "scale": scale, "bias": bias})[0]
        assert y.shape == shape
        # values to about 4 in float32: eight units in the last place
        np.testing.assert_allclose(
            y, reference.ibnorm(x, scale, bias=bias, spec=IBNormSpec(Compression.TANH)), atol=2e-6
        )


@pytest.mark.parametrize("outputs", [("Y", ""), ("Y",), ("Y", "sum")], ids=str)
def test_skip_without_its_sum(ort_library: Path, outputs: tuple[str, ...]) -> None:
    node = node_for(Compression.LOGARITHMIC, True)
    del node.output[:]
    node.output.extend(outputs)
    x = np.random.default_rng(2).standard_normal((4, 33)).astype(np.float32)
    one = np.ones(33, np.float32)
    got = session(model(node), ort_library).run(None, {"X": x, "skip": x, "scale": one, "bias": one})
    exact = reference.ibnorm(x + x, one, bias=one, spec=IBNormSpec(Compression.LOGARITHMIC))
    # values to about 4 in float32: eight units in the last place
    np.testing.assert_allclose(got[0], exact, atol=2e-6)


def test_the_kernel_wins_over_the_function_of_the_same_file(ort_library: Path, tmp_path: Path) -> None:
    data = model(node_for(Compression.LOGARITHMIC, False), with_function=True)
    rng = np.random.default_rng(1)
    feeds = {
        "X": rng.standard_normal((8, 64)).astype(np.float32),
        "scale": np.ones(64, np.float32),
        "bias": np.zeros(64, np.float32),
    }
    ran = {}
    for name, library in (("kernel", ort_library), ("function", None)):
        options = ort.SessionOptions()
        options.enable_profiling = True
        options.profile_file_prefix = str(tmp_path / name)
        if library:
            options.register_custom_ops_library(str(library))
        run = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        ran[name] = run.run(None, feeds)[0]
        events = json.loads(Path(run.end_profiling()).read_text(encoding="utf-8"))
        ops = {e["args"]["op_name"] for e in events if "op_name" in e.get("args", {})}
        assert ("IBNormL" in ops) == (library is not None), ops
    # values to about 4 in float32: eight units in the last place
    np.testing.assert_allclose(ran["kernel"], ran["function"], atol=2e-6)


def test_threads_and_sessions_agree(ort_library: Path) -> None:
    """Eight callers of one session, and sessions with one and four threads, get the same bits."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((64, 1023)).astype(np.float32)
    one = np.ones(1023, np.float32)
    feeds = {"X": x, "scale": one, "bias": one}
    data = model(node_for(Compression.TANH, False))
    run = session(data, ort_library, 4)
    wanted = session(data, ort_library, 1).run(None, feeds)[0]
    results: list[Any] = [None] * 8

    def call(i: int) -> None:
        results[i] = [run.run(None, feeds)[0] for _ in range(5)]

    pool = [threading.Thread(target=call, args=(i,)) for i in range(8)]
    for thread in pool:
        thread.start()
    for thread in pool:
        thread.join()
    for outputs in results:
        for y in outputs:
            np.testing.assert_array_equal(y, wanted)


def test_graph_inputs_are_not_overwritten(ort_library: Path) -> None:
    """The kernel works in place only in buffers that the runtime owns; here X feeds the norm and the residual."""
    spec = IBNormSpec(Compression.LOGARITHMIC)
    info = onnx.helper.make_tensor_value_info
    nodes = [
        onnx.helper.make_node("Abs", ["X"], ["a"]),
        onnx_op.node("a", "scale", bias="bias", y="b", spec=spec, name="first"),
        onnx_op.skip_node("b", "a", scale="scale", bias="bias", y="c", total="d", spec=spec, name="second"),
        onnx_op.node("d", "scale", bias="bias", y="e", spec=spec, name="third"),
        onnx.helper.make_node("Add", ["c", "e"], ["Y"]),
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [info(n, onnx.TensorProto.FLOAT, None) for n in ("X", "scale", "bias")],
        [info("Y", onnx.TensorProto.FLOAT, None)],
    )
    made = onnx.helper.make_model(graph, opset_imports=onnx_op.opset_imports(20), ir_version=10)
    x = np.random.default_rng(1).standard_normal((70, 300)).astype(np.float32)
    kept = x.copy()
    scale, bias = np.full(300, 1.5, np.float32), np.full(300, 0.25, np.float32)
    y = session(made.SerializeToString(), ort_library).run(None, {"X": x, "scale": scale, "bias": bias})[0]
    a = np.abs(x)
    b = reference.ibnorm(a, scale, bias=bias, spec=spec).astype(np.float32)
    c, d = reference.skip_ibnorm(b, a, scale=scale, bias=bias, spec=spec)
    # three norms deep with a scale of 1.5, each a few units in the last place of values to about 8, and they add up
    np.testing.assert_allclose(y, c + reference.ibnorm(d, scale, bias=bias, spec=spec), atol=1e-5)
    np.testing.assert_array_equal(x, kept)


# -- hostile models ------------------------------------------------------------------------------


def with_attribute(name: str, value: object) -> onnx.NodeProto:
    node = node_for(Compression.LOGARITHMIC, False)
    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    node.attribute.extend(kept)
    if value is not None:
        node.attribute.append(onnx.helper.make_attribute(name, value))
    return node


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("lambd", 0.0, "lambd is 0; it must be finite and at least"),
        ("lambd", -4.0, "lambd is -4; it must be finite and at least"),
        ("lambd", float("nan"), "lambd is nan"),
        ("lambd", float("inf"), "lambd is inf"),
        ("lambd", 1e-45, "lambd is 1.4013e-45"),
        ("epsilon", -1e-5, "epsilon is -1e-05; it must be finite and not negative"),
        ("epsilon", float("nan"), "epsilon is nan"),
        ("epsilon", float("inf"), "epsilon is inf"),
        ("axis", 0, "axis is 0; version 1 of the operator accepts only -1"),
        ("axis", 2, "axis is 2"),
        ("lambd", None, "attribute 'lambd' is missing"),
        ("epsilon", None, "attribute 'epsilon' is missing"),
        ("axis", None, "attribute 'axis' is missing"),
        ("lambd", 4, "attribute 'lambd' is missing or not of type float"),
        ("lambd", "four", "attribute 'lambd' is missing or not of type float"),
        ("axis", -1.0, "attribute 'axis' is missing or not of type int"),
    ],
)
def test_illegal_attributes(ort_library: Path, name: str, value: object, words: str) -> None:
    with pytest.raises(Exception, match="IBNormL node 'the_norm'") as caught:
        session(model(with_attribute(name, value)), ort_library)
    assert words in str(caught.value)


@pytest.mark.parametrize("skip", [False, True], ids=["plain", "skip"])
@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"X": ()}, "X has rank 0; it must be 1 to 32"),
        ({"X": (1,) * 33}, "X has rank 33; it must be 1 to 32"),
        ({"scale": (5,)}, "scale has shape [5]; it must be [4]"),
        ({"bias": (3,)}, "bias has shape [3]; it must be [4]"),
        ({"scale": (1, 4)}, "scale has shape [1, 4]; it must be [4]"),
        ({"scale": ()}, "scale has shape []; it must be [4]"),
        ({"bias": (0,)}, "bias has shape [0]; it must be [4]"),
        ({"skip": (2, 3)}, "skip has shape [2, 3]; it must be that of X, [2, 4]"),
        ({"skip": (4,)}, "skip has shape [4]; it must be that of X, [2, 4]"),
        ({"skip": (1,) * 40}, "skip has shape [1, 1"),
    ],
    ids=str,
)
def test_wrong_shapes(ort_library: Path, shapes: dict[str, tuple[int, ...]], words: str, skip: bool) -> None:
    if "skip" in shapes and not skip:
        pytest.skip("the plain form has no skip")
    run = session(model(node_for(Compression.LINEAR, skip)), ort_library)
    feeds = {
        name: np.ones(shapes.get(name, shape), np.float32)
        for name, shape in (("X", (2, 4)), ("skip", (2, 4)), ("scale", (4,)), ("bias", (4,)))
        if skip or name != "skip"
    }
    if "X" in shapes and skip:
        feeds["skip"] = np.ones(shapes["X"], np.float32)
    with pytest.raises(Exception, match="IBNormS node 'the_norm'") as caught:
        run.run(None, feeds)
    assert words in str(caught.value)


def test_an_unknown_shape_stays_unknown(ort_library: Path) -> None:
    """If the library took it for a scalar, the Gather that follows would make the file unloadable."""
    skip = onnx_op.skip_node(
        "X",
        "skip",
        scale="scale",
        bias="bias",
        y="Y",
        total="sum",
        spec=IBNormSpec(Compression.LOGARITHMIC),
        name="first",
    )
    norm = onnx_op.node("sum", "scale", bias="bias", y="Z", spec=IBNormSpec(Compression.LINEAR), name="second")
    picked = onnx.helper.make_node("Gather", ["Z", "row"], ["picked"], axis=1)
    info, constant = onnx.helper.make_tensor_value_info, onnx.numpy_helper.from_array
    weights = {"scale": np.ones(4, np.float32), "bias": np.zeros(4, np.float32), "row": np.array(0)}
    graph = onnx.helper.make_graph(
        [skip, norm, picked],
        "g",
        [info(n, onnx.TensorProto.FLOAT, (2, 3, 4)) for n in ("X", "skip")],
        [info("picked", onnx.TensorProto.FLOAT, None)],
        [constant(v, k) for k, v in weights.items()],
    )
    file = onnx.helper.make_model(graph, opset_imports=onnx_op.opset_imports(20), ir_version=10)
    x = np.random.default_rng(0).standard_normal((2, 3, 4), dtype=np.float32)
    (y,) = session(file.SerializeToString(), ort_library).run(None, {"X": x, "skip": x})
    exact = reference.ibnorm(2 * x, weights["scale"], bias=weights["bias"], spec=IBNormSpec(Compression.LINEAR))
    # values to about 4 in float32: eight units in the last place
    np.testing.assert_allclose(y, exact[:, 0], rtol=0, atol=2e-6)


def test_a_constant_of_the_wrong_shape_is_refused(ort_library: Path) -> None:
    constants = {"scale": np.ones(5, np.float32), "bias": np.ones(4, np.float32)}
    run = session(model(node_for(Compression.LINEAR, False), constants=constants), ort_library)
    with pytest.raises(Exception, match=re.escape("scale has shape [5]; it must be [4]")):
        run.run(None, {"X": np.ones((2, 4), np.float32)})


@pytest.mark.parametrize("missing", ["X", "scale", "bias", "skip"])
def test_unconnected_inputs_are_refused(ort_library: Path, missing: str) -> None:
    node = node_for(Compression.TANH, True)
    names = ["" if name == missing else name for name in node.input]
    del node.input[:]
    node.input.extend(names)
    with pytest.raises(Exception, match=r"the_norm|SkipIBNormT|skip") as caught:
        run = session(model(node), ort_library)
        feeds = {n: np.ones((4,) if n in ("scale", "bias") else (2, 4), np.float32) for n in names if n}
        run.run(None, feeds)
    assert "SkipIBNormT" in str(caught.value)


def test_a_long_node_name_survives(ort_library: Path) -> None:
    node = with_attribute("axis", 3)
    node.name = "n" * 3000
    with pytest.raises(Exception, match="axis is 3"):
        session(model(node), ort_library)


def test_double_is_refused_by_the_runtime(ort_library: Path) -> None:
    info = onnx.helper.make_tensor_value_info
    names = ["X", "scale", "bias"]
    graph = onnx.helper.make_graph(
        [node_for(Compression.LINEAR, False)],
        "g",
        [info(n, onnx.TensorProto.DOUBLE, None) for n in names],
        [info("Y", onnx.TensorProto.DOUBLE, None)],
    )
    made = onnx.helper.make_model(graph, opset_imports=onnx_op.opset_imports(20), ir_version=10)
    with pytest.raises(Exception, match="double"):
        session(made.SerializeToString(), ort_library)


def test_all_op_types_are_registered(ort_library: Path) -> None:
    for kind, plain, fused in zip(Compression, OP_TYPES, SKIP_OP_TYPES, strict=True):
        assert (plain, fused) == (node_for(kind, False).op_type, node_for(kind, True).op_type)
        session(model(node_for(kind, False)), ort_library)
        session(model(node_for(kind, True)), ort_library)


def test_registering_and_exiting_is_clean(ort_library: Path) -> None:
    code = (
        "import onnxruntime as ort, sys\n"
        "for _ in range(3):\n"
        "    o = ort.SessionOptions(); o.register_custom_ops_library(sys.argv[1])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(ort_library)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert ctypes.CDLL(str(ort_library)).RegisterCustomOps


def chosen(library: Path, isa: str) -> Any:
    options = ort.SessionOptions()
    options.add_session_config_entry("ibnorm.instruction_set", isa)
    options.register_custom_ops_library(str(library))
    return options


def test_a_session_chooses_its_instruction_set(ort_library: Path, kernels: Any) -> None:
    """Each variant rounds in its own way, which shows that it ran."""
    spec = IBNormSpec(Compression.TANH, 0.5)
    rng = np.random.default_rng(3)
    x, scale, bias = (rng.standard_normal(shape).astype(F32) for shape in ((64, 768), 768, 768))
    data = model(onnx_op.node("X", "scale", bias="bias", y="Y", spec=spec, name="n"))
    found = set()
    for isa in kernels.sets:
        made = ort.InferenceSession(data, chosen(ort_library, isa), providers=["CPUExecutionProvider"])
        (y,) = made.run(None, {"X": x, "scale": scale, "bias": bias})
        np.testing.assert_array_equal(y, kernels.run(isa, x, scale, bias, spec))
        found.add(y.tobytes())
    assert len(found) == len(kernels.sets)


@pytest.mark.parametrize("isa", ["sse9", "", "a name that is longer than any"])
def test_an_unknown_instruction_set_is_refused(ort_library: Path, isa: str) -> None:
    with pytest.raises(ort.capi.onnxruntime_pybind11_state.InvalidArgument, match=r"this machine has generic"):
        chosen(ort_library, isa)
