"""Selecting rows early: the same results, and only where the results are the same."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.shape_inference
import onnx_ir as ir
import onnx_ir.passes.common
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from ibnorm_export import IBNormSpec
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.graph.early_gather import gather_early, selected_rows
from ibnorm_export.op import onnx_functions as onnx_op


def _then_gather(axis: int, also_whole: bool = False) -> ir.Model:
    """IBNormL over (2, 5, 8), then a Gather; `also_whole` makes the norm an output too."""
    norm = onnx_op.node("X", "scale", bias="bias", y="whole", spec=IBNormSpec("L"), name="norm")
    gather = helper.make_node("Gather", ["whole", "index"], ["Y"], axis=axis)
    kept = [n for i, n in enumerate([2, 5, 8]) if i != axis % 3]
    info = helper.make_tensor_value_info
    outputs = [info("Y", TensorProto.FLOAT, kept)] + [info("whole", TensorProto.FLOAT, [2, 5, 8])] * also_whole
    weights = [helper.make_tensor(n, TensorProto.FLOAT, [8], [1.0] * 8) for n in ("scale", "bias")]
    weights.append(helper.make_tensor("index", TensorProto.INT64, [], [1]))
    known = [] if also_whole else [info("whole", TensorProto.FLOAT, [2, 5, 8])]
    graph = helper.make_graph(
        [norm, gather], "g", [info("X", TensorProto.FLOAT, [2, 5, 8])], outputs, weights, value_info=known
    )
    opsets, bodies = onnx_op.opset_imports(20), [onnx_op.functions(20)["IBNormL"]]
    return ir.serde.deserialize_model(helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=bodies))


@pytest.mark.parametrize(
    ("axis", "also_whole", "first"),
    [
        (1, False, "Gather"),
        (-2, False, "Gather"),
        (0, False, "Gather"),
        (2, False, "IBNormL"),
        (-1, False, "IBNormL"),
        (1, True, "IBNormL"),
    ],
)
def test_rows_are_selected_before_a_norm(axis: int, also_whole: bool, first: str) -> None:
    """Not along the normalised axis, and not where the whole norm is used too."""
    x = np.random.default_rng(0).standard_normal((2, 5, 8), dtype=np.float32)
    model = _then_gather(axis, also_whole)
    before = ReferenceEvaluator(ir.serde.serialize_model(model)).run(None, {"X": x})
    gather_early(model.graph)
    assert model.graph[0].op_type == first
    proto = ir.serde.serialize_model(model)
    onnx.checker.check_model(proto, full_check=True)
    assert proto.graph.output[0].name == "Y"
    for old, new in zip(before, ReferenceEvaluator(proto).run(None, {"X": x}), strict=True):
        np.testing.assert_array_equal(old, new)


def _block(index: list[int] | int, **extra: str) -> ir.Model:
    """x + MatMul(Gelu(x + row)) over (2, 5, 8), then a Gather over axis 1."""
    info = helper.make_tensor_value_info
    nodes = [
        helper.make_node("Add", ["X", "row"], ["shifted"]),
        helper.make_node("Gelu", ["shifted"], ["active"]),
        helper.make_node("MatMul", ["active", "matrix"], ["product"]),
        helper.make_node("Add", ["product", "X"], ["whole"]),
        helper.make_node("Gather", ["whole", "index"], ["Y"], axis=1),
    ]
    rng = np.random.default_rng(1)
    weights = [
        onnx.numpy_helper.from_array(rng.standard_normal((8, 8)).astype(np.float32), "matrix"),
        onnx.numpy_helper.from_array(rng.standard_normal(8).astype(np.float32), "row"),
        onnx.numpy_helper.from_array(np.asarray(index, np.int64), "index"),
    ]
    chosen = [2, 8] if isinstance(index, int) else [2, len(index), 8]
    outputs = [info("Y", TensorProto.FLOAT, chosen)]
    if "also" in extra:
        outputs.append(info(extra["also"], TensorProto.FLOAT, [2, 5, 8]))
    graph = helper.make_graph(nodes, "g", [info("X", TensorProto.FLOAT, [2, 5, 8])], outputs, weights)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(proto))


def _largest_difference(block: ir.Model, x: NDArray[np.float32]) -> NDArray[np.float64]:
    """Bound of the difference between two float32 results of `_block` whose sums run in different orders.

    A sum of n products, in any order, is within n u of the sum of their sizes (N. Higham, Accuracy and Stability of
    Numerical Algorithms, 2nd edition, section 3.1), and |Gelu(t)| <= |t|. The residual addition rounds once more.
    """
    matrix, row = (np.abs(block.graph.initializers[name].const_value.numpy()) for name in ("matrix", "row"))  # type: ignore[union-attr]  # an initializer has a value
    sizes = (np.abs(x) + row).astype(np.float64) @ matrix
    unit = 2.0**-24
    return 2 * unit * (len(matrix) * sizes + sizes + np.abs(x))


@pytest.mark.parametrize(
    ("index", "also", "types"),
    [
        (0, "", ["Gather", "Add", "Gelu", "MatMul", "Add"]),
        (-1, "", ["Gather", "Add", "Gelu", "MatMul", "Add"]),
        ([3, 1], "", ["Gather", "Add", "Gelu", "MatMul", "Add"]),
        ([4, 3, 2, 1, 0], "", ["Add", "Gelu", "MatMul", "Add", "Gather"]),  # all rows: nothing to save
        (2, "product", ["Add", "Gelu", "MatMul", "Gather", "Gather", "Add"]),
        (2, "whole", ["Add", "Gelu", "MatMul", "Add", "Gather"]),
    ],
)
def test_rows_are_selected_as_early_as_possible(index: list[int] | int, also: str, types: list[str]) -> None:
    x = np.random.default_rng(0).standard_normal((2, 5, 8), dtype=np.float32)
    model = _block(index, **({"also": also} if also else {}))
    before = ReferenceEvaluator(ir.serde.serialize_model(model)).run(None, {"X": x})
    gather_early(model.graph)
    ir.passes.common.CommonSubexpressionEliminationPass()(model)  # two Gathers of X are one
    assert sorted(node.op_type for node in model.graph) == sorted(types)
    proto = ir.serde.serialize_model(model)
    onnx.checker.check_model(proto, full_check=True)
    largest = _largest_difference(model, x)
    bounds = [largest.take(index, axis=1), largest]
    for old, new, bound in zip(before, ReferenceEvaluator(proto).run(None, {"X": x}), bounds, strict=False):
        assert (np.abs(new - old) <= bound).all()


def test_a_value_that_broadcasts_along_the_axis_stays_whole() -> None:
    """(5, 8) added to (2, 5, 8) has a different row for every position, so the Gather must stay after it."""
    model = _block(0)
    row = model.graph.initializers["row"]
    row.const_value = ir.tensor(np.arange(40, dtype=np.float32).reshape(5, 8), name="row")
    row.shape = ir.Shape([5, 8])
    x = np.random.default_rng(0).standard_normal((2, 5, 8), dtype=np.float32)
    (before,) = ReferenceEvaluator(ir.serde.serialize_model(model)).run(None, {"X": x})
    gather_early(model.graph)
    (after,) = ReferenceEvaluator(ir.serde.serialize_model(model)).run(None, {"X": x})
    assert (np.abs(after - before) <= _largest_difference(model, x)[:, 0]).all()


def test_a_vit_only_computes_the_class_token_at_its_end(exported_vit: ExportedModel) -> None:
    """From its last attention on; every node records the rows that it computes."""
    graph = ir.load(exported_vit.path).graph
    chosen = [node.op_type for node in graph if selected_rows(node) is not None]
    assert chosen == ["MatMul", "Add", "SkipIBNormT", "MatMul", "Add", "Gelu", "MatMul", "Add", "Add", "IBNormT"]
    rows = selected_rows(graph[-2])
    assert rows is not None
    assert (rows.indices.tolist(), rows.axis) == (0, 1)
    np.testing.assert_array_equal(rows.of(np.arange(12).reshape(2, 3, 2)), [[0, 1], [6, 7]])


def test_a_file_records_its_longest_sequence(exported_llama: ExportedModel, exported_vit: ExportedModel) -> None:
    assert exported_llama.metadata.max_positions == 64
    assert exported_vit.metadata.max_positions == 0
