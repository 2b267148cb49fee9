"""Expanded norms: few kinds of nodes, no conversions that change nothing, and the same results."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.graph.cleanup import constant
from ibnorm_export.graph.inlining import remove_idle_casts
from ibnorm_export.runtimes.ort import OrtRunner
from tests.support.shared_exports import SharedExports


@pytest.fixture(scope="module")
def inlined(exports: SharedExports) -> ExportedModel:
    return exports("vit", inline=True)


def test_an_inlined_file_has_only_nodes_that_compute(inlined: ExportedModel) -> None:
    graph = inlined.proto.graph
    assert not {"Cast", "CastLike", "Constant", "Identity"} & {node.op_type for node in graph.node}
    names = [node.name for node in graph.node]
    assert all(names)
    assert len(set(names)) == len(names)
    typed = {info.name for info in graph.value_info}
    assert not typed & set(inlined.weights), "a value_info for an initializer makes quantize_dynamic fail"


def test_an_inlined_file_shares_its_constants(inlined: ExportedModel) -> None:
    assert [name for name in inlined.weights if name.startswith(("axes", "lambd"))] == ["axes", "lambd"]


def test_an_inlined_file_computes_the_same(inlined: ExportedModel, exported_vit: ExportedModel) -> None:
    """To the last bit: ONNX Runtime expands the functions of the other file into the same nodes."""
    x = np.random.default_rng(0).standard_normal((3, 1, 8, 8), dtype=np.float32)
    expected, actual = (
        OrtRunner(file.path, threads=1).run({"pixel_values": x})["logits"] for file in (exported_vit, inlined)
    )
    np.testing.assert_array_equal(actual, expected)


def test_half_precision_keeps_the_casts_of_norms_without_castlike(exports: SharedExports) -> None:
    exported = exports("vit", dtype="fp16", inline=True)
    assert "CastLike" not in exported.operators
    to = [a.i for n in exported.proto.graph.node if n.op_type == "Cast" for a in n.attribute]
    assert set(to) == {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16}


def _casts() -> ir.Model:
    """Casts between the ends of a graph, and within it."""
    return ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 20]>
        g (float[2] x, float16[2] h) => (float[2] copy, float[2] y, float16[2] z) {
            copy = Cast <to = 1> (x)
            same = Cast <to = 1> (x)
            a = Neg(same)
            y = CastLike(a, x)
            b = CastLike(a, h)
            z = Neg(b)
        }"""
    )


def test_casts_to_the_same_type_go_and_outputs_keep_their_names() -> None:
    model = _casts()
    for node in model.graph:
        for value in node.outputs:
            value.type = ir.TensorType(ir.DataType.FLOAT16 if value.name in ("b", "z") else ir.DataType.FLOAT)
    remove_idle_casts(model.graph)
    assert [node.op_type for node in model.graph] == ["Cast", "Neg", "Cast", "Neg"]
    proto = ir.serde.serialize_model(model)
    onnx.checker.check_model(proto, full_check=True)
    assert [output.name for output in proto.graph.output] == ["copy", "y", "z"]
    x = np.array([1.5, -2.0], dtype=np.float32)
    copy, y, z = onnx.reference.ReferenceEvaluator(proto).run(None, {"x": x, "h": x.astype(np.float16)})
    for result, expected in ((copy, x), (y, -x), (z, x.astype(np.float16))):
        np.testing.assert_array_equal(result, expected)


def test_a_cast_of_an_unknown_type_stays() -> None:
    model = _casts()
    for node in model.graph:
        for value in node.outputs:
            value.type = None
    before = [node.op_type for node in model.graph]
    constant(model.graph, "unused", array=np.zeros(1, dtype=np.float32))
    remove_idle_casts(model.graph)
    assert [node.op_type for node in model.graph if node.op_type != "Cast"] == [n for n in before if n != "Cast"]
