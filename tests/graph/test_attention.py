"""Passes over attention: fewer nodes, the same results, and other graphs stay as they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.shape_inference
import onnx_ir as ir
import onnx_ir.passes.common
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from ibnorm_export.graph.attention import keep_heads_joined, transpose_keys_directly
from ibnorm_export.graph.attention_cache import grow_cache_by_concat, grow_cache_in_attention
from ibnorm_export.graph.attention_mask import use_mask_directly
from tests.support.shared_exports import SharedExports

#: How far an output may move when its sums run in another order. A score is a sum of 4 products of values up to 4, by
#: 0.3: at most 20, so rounding moves it by up to 4 * 2^-24 * 20 = 5e-6, and its exponential relatively by as much. The
#: output is an average of values up to 4 whose weights move by up to twice that.
_ROUNDING = 4e-5


def _constant(name: str, *values: int) -> onnx.TensorProto:
    return helper.make_tensor(name, TensorProto.INT64, [len(values)], values)


def _keys(others: tuple[int, int] = (0, -2)) -> ir.Model:
    """The nodes with which the exporter swaps the last two axes of K (2, 3, 5, 4)."""
    large = 2**63 - 1
    nodes = [
        helper.make_node("Shape", ["K"], ["shape"]),
        helper.make_node("Slice", ["shape", "last", "end"], ["features"]),
        helper.make_node("Slice", ["shape", "second", "last"], ["sequence"]),
        helper.make_node("Slice", ["shape", "from", "to"], ["others"]),
        helper.make_node("Concat", ["last", "sequence", "features"], ["flat"], axis=0),
        helper.make_node("Reshape", ["K", "flat"], ["rows"]),
        helper.make_node("Transpose", ["rows"], ["swapped"], perm=[0, 2, 1]),
        helper.make_node("Concat", ["others", "features", "sequence"], ["whole"], axis=0),
        helper.make_node("Reshape", ["swapped", "whole"], ["Y"]),
    ]
    weights = [_constant("last", -1), _constant("second", -2), _constant("end", large)]
    weights += [_constant("from", others[0]), _constant("to", others[1])]
    info = helper.make_tensor_value_info
    outputs = [info("Y", TensorProto.FLOAT, None)]
    graph = helper.make_graph(nodes, "g", [info("K", TensorProto.FLOAT, [2, 3, 5, 4])], outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return ir.serde.deserialize_model(model)


@pytest.mark.parametrize("start", [0, -4, -(2**63)])
def test_keys_are_transposed_directly(start: int) -> None:
    k = np.random.default_rng(0).standard_normal((2, 3, 5, 4), dtype=np.float32)
    model = _keys((start, -2))
    transpose_keys_directly(model.graph)
    (y,) = ReferenceEvaluator(ir.serde.serialize_model(model)).run(None, {"K": k})
    np.testing.assert_array_equal(y, k.transpose(0, 1, 3, 2))
    assert model.graph.outputs[0].producer().op_type == "Transpose"  # type: ignore[union-attr]  # it has a producer


def test_another_reshape_is_left_alone() -> None:
    """With one batch axis instead of two, it is another transposition."""
    model = _keys((1, -2))
    before = [node.op_type for node in model.graph]
    transpose_keys_directly(model.graph)
    assert [node.op_type for node in model.graph] == before


def _attention(heads: int, kv_heads: int, past: bool = False, rotary: bool = False) -> ir.Model:
    """Attention with heads that are split before it and joined after it; (2, 5, heads * 4) -> the same."""
    info = helper.make_tensor_value_info
    nodes, weights = [], [_constant("joined", 0, 0, heads * 4)]
    inputs = [info("q", TensorProto.FLOAT, [2, 5, heads * 4])]
    inputs += [info(name, TensorProto.FLOAT, [2, 5, kv_heads * 4]) for name in "kv"]
    outputs = [info("Y", TensorProto.FLOAT, [2, 5, heads * 4])]
    for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
        weights.append(_constant(f"{name}.shape", 0, 0, count, 4))
        nodes.append(helper.make_node("Reshape", [name, f"{name}.shape"], [f"{name}.split"]))
        nodes.append(helper.make_node("Transpose", [f"{name}.split"], [f"{name}.heads"], perm=[0, 2, 1, 3]))
    seen = ["q.heads", "k.heads", "v.heads"]
    if rotary:
        inputs += [info(name, TensorProto.FLOAT, [2, 5, 2]) for name in ("cos", "sin")]
        for name in "qk":
            nodes.append(helper.make_node("RotaryEmbedding", [f"{name}.heads", "cos", "sin"], [f"{name}.rotated"]))
        seen = ["q.rotated", "k.rotated", "v.heads"]
    if past:
        inputs += [info(f"past.{name}", TensorProto.FLOAT, [2, kv_heads, 3, 4]) for name in "kv"]
        outputs += [info(f"present.{name}", TensorProto.FLOAT, [2, kv_heads, 8, 4]) for name in "kv"]
        for place, name in ((1, "k"), (2, "v")):
            nodes.append(helper.make_node("Concat", [f"past.{name}", seen[place]], [f"present.{name}"], axis=-2))
            seen[place] = f"present.{name}"
    # aligned to the last key, which is_causal does not express if there is a past
    weights.append(numpy_helper.from_array(np.tri(5, 8 if past else 5, 3 if past else 0, dtype=bool), "mask"))
    nodes += [
        helper.make_node("Attention", [*seen, "mask"], ["y.heads"], scale=0.3),
        helper.make_node("Transpose", ["y.heads"], ["y.split"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["y.split", "joined"], ["Y"]),
    ]
    graph = helper.make_graph(nodes, "g", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    return ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(model))


def _types(model: ir.Model) -> list[str]:
    ir.passes.common.RemoveUnusedNodesPass()(model)
    return [node.op_type for node in model.graph]


def _run(model: ir.Model, feeds: dict[str, NDArray[np.float32]]) -> list[NDArray[np.float32]]:
    proto = ir.serde.serialize_model(model)
    onnx.checker.check_model(proto, full_check=True)
    evaluated: list[NDArray[np.float32]] = ReferenceEvaluator(proto).run([t.name for t in proto.graph.output], feeds)
    return evaluated


def _feeds(model: ir.Model) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(0)
    return {
        str(t.name): rng.standard_normal([int(d) for d in t.shape or ()], dtype=np.float32) for t in model.graph.inputs
    }


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (4, 2)])
def test_attention_takes_joined_heads(heads: int, kv_heads: int, rotary: bool) -> None:
    model = _attention(heads, kv_heads, rotary=rotary)
    feeds = _feeds(model)
    (before,) = _run(model, feeds)
    keep_heads_joined(model.graph)
    assert _types(model) == ["RotaryEmbedding"] * 2 * rotary + ["Attention"]
    (after,) = _run(model, feeds)
    np.testing.assert_allclose(after, before, rtol=0, atol=_ROUNDING)


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (4, 2)])
def test_a_cache_grows_in_attention_and_by_concat_again(heads: int, kv_heads: int, rotary: bool) -> None:
    model = _attention(heads, kv_heads, past=True, rotary=rotary)
    feeds = _feeds(model)
    before = _run(model, feeds)
    assert [b.shape for b in before[1:]] == [(2, kv_heads, 8, 4)] * 2
    grow_cache_in_attention(model.graph)
    keep_heads_joined(model.graph)
    assert _types(model) == ["RotaryEmbedding"] * 2 * rotary + ["Attention"]
    after = _run(model, feeds)
    for b, a in zip(before, after, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=_ROUNDING)
    assert grow_cache_by_concat(model.graph)
    types = _types(model)
    assert (types.count("Concat"), types.count("Attention")) == (2, 1)
    assert all(len(node.outputs) == 1 for node in model.graph)
    for b, a in zip(before, _run(model, feeds), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=_ROUNDING)
    assert not grow_cache_by_concat(model.graph)


def test_a_cache_that_another_node_reads_stays_in_the_graph() -> None:
    model = _attention(4, 2, past=True)
    present = next(value for value in model.graph.outputs if value.name == "present.k")
    model.graph.append(ir.node("Shape", [present]))
    grow_cache_in_attention(model.graph)
    assert [len(node.outputs) for node in model.graph if node.op_type == "Attention"] == [1]


def test_a_causal_attention_does_not_take_the_cache() -> None:
    """Its mask would start after the past, which is another mask."""
    model = _attention(4, 2, past=True)
    attention = next(node for node in model.graph if node.op_type == "Attention")
    attention.attributes["is_causal"] = ir.AttrInt64("is_causal", 1)
    grow_cache_in_attention(model.graph)
    assert [len(node.outputs) for node in model.graph if node.op_type == "Attention"] == [1]
    del attention.attributes["is_causal"]
    grow_cache_in_attention(model.graph)
    within = next(node for node in model.graph if node.op_type == "Attention")
    within.attributes["is_causal"] = ir.AttrInt64("is_causal", 1)
    assert not grow_cache_by_concat(model.graph)


def _looked_up(
    mask: tuple[int | str | None, int | str | None] = ("batch", "total"),
    name: str = "attention_mask",
    columns: int | str | None = "past + sequence",
    start: int = 0,
    step: int = 1,
    swapped: bool = False,
    queries: int = 1,
    batch_dims: int = 0,
) -> ir.Model:
    """mask[row, column] -> Y (batch, 1, queries, columns), by pairs of indices, as transformers does."""
    info = helper.make_tensor_value_info
    weights = [_constant("last", -1), _constant("trailing", 1, 2, 3), _constant("before", 0, 1, 2)]
    weights += [numpy_helper.from_array(np.array(n), f"n{i}") for i, n in enumerate((start, step, 0, 1))]
    nodes = [
        helper.make_node("Cast", [name], ["mask"], to=TensorProto.BOOL),
        helper.make_node("Range", ["n2", "rows", "n3"], ["row"]),
        helper.make_node("Range", ["n0", "columns", "n1"], ["column"]),
        helper.make_node("Unsqueeze", ["row", "trailing"], ["row.4"]),
        helper.make_node("Unsqueeze", ["column", "before"], ["column.4"]),
        helper.make_node("Max", ["row.4", "column.4", "queries.4"], ["both"]),
        helper.make_node("Shape", ["both"], ["shape"]),
        helper.make_node("Expand", ["row.4", "shape"], ["rows.4"]),
        helper.make_node("Expand", ["column.4", "shape"], ["columns.4"]),
        helper.make_node("Unsqueeze", ["rows.4", "last"], ["rows.5"]),
        helper.make_node("Unsqueeze", ["columns.4", "last"], ["columns.5"]),
        helper.make_node("Concat", ["columns.5", "rows.5"] if swapped else ["rows.5", "columns.5"], ["pairs"], axis=-1),
        helper.make_node("GatherND", ["mask", "pairs"], ["Y"], batch_dims=batch_dims),
    ]
    weights.append(numpy_helper.from_array(np.zeros((1, 1, queries, 1), np.int64), "queries.4"))
    inputs = [info(name, TensorProto.INT64, mask), *(info(n, TensorProto.INT64, []) for n in ("rows", "columns"))]
    graph = helper.make_graph(nodes, "g", inputs, [info("Y", TensorProto.BOOL, None)], weights)
    model = ir.serde.deserialize_model(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    )
    shapes = {"mask": mask, "row.4": (mask[0], 1, 1, 1), "column.4": (1, 1, 1, columns)}
    shapes["Y"] = (mask[0], 1, queries, columns)
    for node in model.graph:
        value = node.outputs[0]
        if value.name in shapes:
            value.shape = ir.Shape(shapes[str(value.name)])
    return model


@pytest.mark.parametrize(
    ("mask", "columns"), [(("batch", "total"), "sequence + past"), (("batch", "sequence"), "sequence")]
)
def test_a_whole_mask_is_used_directly(mask: tuple[str, str], columns: str) -> None:
    model = _looked_up(mask, columns=columns)
    array = np.random.default_rng(0).integers(0, 2, (3, 7))
    feeds = {"attention_mask": array, "rows": np.array(3), "columns": np.array(7)}
    (before,) = ReferenceEvaluator(ir.serde.serialize_model(model)).run(None, feeds)
    use_mask_directly(model.graph)
    assert _types(model) == ["Cast", "Unsqueeze", "Concat", "Reshape"]
    proto = ir.serde.serialize_model(model)
    (after,) = ReferenceEvaluator(proto).run(None, feeds)
    np.testing.assert_array_equal(after, before)
    np.testing.assert_array_equal(after, array[:, None, None, :] != 0)
    for wrong in (array[:, :1], array[:, :6], np.tile(array, (1, 2))):  # nothing is broadcast over the keys
        with pytest.raises(ValueError, match="cannot reshape"):
            ReferenceEvaluator(proto).run(None, {**feeds, "attention_mask": wrong})


@pytest.mark.parametrize(
    "other",
    [
        {"name": "table"},  # it may have more columns than are looked up
        {"columns": "window"},
        {"columns": "sequence"},
        {"columns": 1},
        {"queries": 2},
        {"batch_dims": 1},
        {"mask": (1, "total"), "swapped": True},
        {"mask": ("rows of a table", "total"), "name": "table", "columns": "total", "swapped": True},
        {"start": 1},
        {"step": 2},
        {"swapped": True},
        {"mask": (3, 7), "name": "table", "columns": 5},
        {"mask": (None, None), "name": "table", "columns": None},  # unnamed sizes are not equal
    ],
)
def test_a_part_of_a_mask_is_still_looked_up(other: dict[str, Any]) -> None:
    model = _looked_up(**other)
    before = _types(model)
    use_mask_directly(model.graph)
    assert _types(model) == before


def test_a_language_model_has_no_lookup_of_masks(exports: SharedExports) -> None:
    for task in (None, "text-generation"):
        exported = exports("llama", task)
        assert exported.opset == 23
        assert "GatherND" not in {node.op_type for node in exported.proto.graph.node}


def test_a_vit_keeps_heads_joined(exports: SharedExports) -> None:
    types = [node.op_type for node in exports("vit").proto.graph.node]
    assert types.count("Slice") == 0
    assert types.count("Shape") == 1, "of the batch"
    types = [node.op_type for node in exports("vit", opset=23).proto.graph.node]
    assert types.count("Attention") == 2
    assert types.count("Reshape") == types.count("Transpose") == 1, "of the patches"


@pytest.mark.parametrize(("swapped", "kind"), [(False, "Reshape"), (True, "GatherND")])
def test_a_lookup_by_constant_indices_is_a_reshape_only_if_it_reads_the_whole_mask(swapped: bool, kind: str) -> None:
    pairs = np.argwhere(np.ones((2, 3), dtype=bool))
    if swapped:
        pairs[[0, 1]] = pairs[[1, 0]]
    graph = helper.make_graph(
        [helper.make_node("GatherND", ["mask", "pairs"], ["y"])],
        "lookup",
        [helper.make_tensor_value_info("mask", TensorProto.BOOL, [2, 3])],
        [helper.make_tensor_value_info("y", TensorProto.BOOL, [2, 1, 1, 3])],
        [numpy_helper.from_array(pairs.reshape(2, 1, 1, 3, 2), "pairs")],
    )
    model = ir.serde.deserialize_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]))
    mask = np.array([[True, False, True], [False, False, True]])
    (expected,) = ReferenceEvaluator(ir.serde.serialize_model(model)).run(None, {"mask": mask})
    use_mask_directly(model.graph)
    assert [node.op_type for node in model.graph] == [kind]
    (actual,) = ReferenceEvaluator(ir.serde.serialize_model(model)).run(None, {"mask": mask})
    np.testing.assert_array_equal(actual, expected)
