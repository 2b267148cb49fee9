"""Positions chosen before a norm: the same numbers, and only where they are the same."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from ibnorm_export import IBNormSpec, onnx_op
from ibnorm_export.artifact import ExportedModel
from ibnorm_export.early_select import select_before_norm


def _then_gather(axis: int, also_whole: bool = False) -> ir.Model:
    """IBNormL over (2, 5, 8), then a Gather; `also_whole` gives the norm's own output too."""
    norm = onnx_op.node("X", "scale", "bias", "whole", IBNormSpec("L"), "norm")
    gather = helper.make_node("Gather", ["whole", "index"], ["Y"], axis=axis)
    kept = [n for i, n in enumerate([2, 5, 8]) if i != axis % 3]
    info = helper.make_tensor_value_info
    outputs = [info("Y", TensorProto.FLOAT, kept)] + [info("whole", TensorProto.FLOAT, [2, 5, 8])] * also_whole
    weights = [helper.make_tensor(n, TensorProto.FLOAT, [8], [1.0] * 8) for n in ("scale", "bias")]
    weights.append(helper.make_tensor("index", TensorProto.INT64, [], [1]))
    graph = helper.make_graph([norm, gather], "g", [info("X", TensorProto.FLOAT, [2, 5, 8])], outputs, weights)
    opsets, bodies = onnx_op.opset_imports(20), [onnx_op.functions(20)["IBNormL"]]
    return ir.serde.deserialize_model(helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=bodies))


@pytest.mark.parametrize(
    ("axis", "also_whole", "first"),
    [(1, False, "Gather"), (-2, False, "Gather"), (0, False, "Gather"),
     (2, False, "IBNormL"), (-1, False, "IBNormL"), (1, True, "IBNormL")],
)  # fmt: skip
def test_positions_are_chosen_before_a_norm(axis: int, also_whole: bool, first: str) -> None:
    """Where that is the same: not over the normalised axis, and not where the whole norm is wanted too."""
    x = np.random.default_rng(0).standard_normal((2, 5, 8), dtype=np.float32)
    made = _then_gather(axis, also_whole)
    before = ReferenceEvaluator(ir.serde.serialize_model(made)).run(None, {"X": x})
    select_before_norm(made.graph)
    assert made.graph[0].op_type == first
    proto = ir.serde.serialize_model(made)
    onnx.checker.check_model(proto, full_check=True)
    assert proto.graph.output[0].name == "Y"
    for old, new in zip(before, ReferenceEvaluator(proto).run(None, {"X": x}), strict=True):
        np.testing.assert_array_equal(old, new)


def test_a_vit_normalises_the_class_token_alone(exported_vit: ExportedModel) -> None:
    nodes = [node.op_type for node in exported_vit.proto.graph.node]
    assert nodes[-3:] == ["Gather", "IBNormT", "Gemm"]


def test_the_file_says_how_long_a_sequence_may_be(exported_llama: ExportedModel, exported_vit: ExportedModel) -> None:
    assert exported_llama.metadata["max_positions"] == 64
    assert exported_vit.metadata["max_positions"] == 0
