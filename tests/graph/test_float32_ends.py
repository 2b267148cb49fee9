"""Casts at the ends of a graph in half precision."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from ibnorm_export.graph.float32_ends import float32_ends

TEXT = """
<ir_version: 10, opset_import: ["" : 20]>
graph (float16[n] x, float16[n] past, int64[n] ids) => (float16[n] y, float16[n] present)
{ d = Cast <to: int = 10> (ids)
  y = Add (x, d)
  present = Add (past, x) }
"""


def test_wanted_ends_become_float32_and_keep_their_names() -> None:
    before = onnx.parser.parse_model(TEXT)
    model = ir.from_proto(before)
    float32_ends(model.graph, wanted=lambda name: not name.startswith(("past", "present")))
    after = ir.to_proto(model)
    onnx.checker.check_model(after, full_check=True)
    types = {v.name: v.type.tensor_type.elem_type for v in (*after.graph.input, *after.graph.output)}
    half, single, integer = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
    assert types == {"x": single, "past": half, "ids": integer, "y": single, "present": half}
    x = np.array([0.1, 2.0], dtype=np.float16)
    feeds = {"x": x, "past": x, "ids": np.array([3, 4])}
    y, present = ReferenceEvaluator(before).run(None, feeds)
    new_y, new_present = ReferenceEvaluator(after).run(None, feeds | {"x": x.astype(np.float32)})
    assert new_y.dtype == np.float32
    assert np.array_equal(new_y, y.astype(np.float32))
    assert np.array_equal(new_present, present)


def test_a_model_in_float32_stays_as_it_is() -> None:
    proto = onnx.parser.parse_model(TEXT.replace("float16", "float").replace("= 10", "= 1"))
    model = ir.from_proto(proto)
    before = ir.to_proto(model).SerializeToString()
    float32_ends(model.graph, wanted=lambda name: True)
    assert ir.to_proto(model).SerializeToString() == before
