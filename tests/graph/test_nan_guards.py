"""Guards against NaN after a Softmax: only those that can never act are removed."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir
import onnx_ir.passes.common
import pytest

from ibnorm_export.graph.nan_guards import remove_nan_guards

LOWEST = float(np.finfo(np.float32).min)


def _attention(*, mask: str = "Where(keep, zero, low)") -> ir.Model:
    """The weights of attention with a boolean mask, as the exporter writes them."""
    model = ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 20]>
        g (float[2, 3] scores, bool[2, 3] keep, float[2, 3] other) => (float[2, 3] y)
        <float zero = {{0.0}}, float low = {{{LOWEST:.9g}}}> {{
            mask = {mask}
            masked = Add(scores, mask)
            weights = Softmax(masked)
            nan = IsNaN(weights)
            guarded = Where(nan, zero, weights)
            y = Neg(guarded)
        }}"""
    )
    ir.passes.common.ShapeInferencePass()(model)
    return model


def _kinds(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def test_a_guard_of_finite_scores_is_removed_and_the_results_stay() -> None:
    model = _attention()
    inputs = {
        "scores": np.array([[1.0, -2.0, 3.0], [5.0, 6.0, 1e30]], dtype=np.float32),
        "keep": np.array([[True, False, True], [False, False, False]]),  # one row is masked as a whole
        "other": np.zeros((2, 3), dtype=np.float32),
    }
    (expected,) = onnx.reference.ReferenceEvaluator(ir.serde.serialize_model(model)).run(None, inputs)
    remove_nan_guards(model.graph)
    assert _kinds(model) == ["Where", "Add", "Softmax", "Neg"]
    (actual,) = onnx.reference.ReferenceEvaluator(ir.serde.serialize_model(model)).run(None, inputs)
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(_attention(mask="Identity(other)"), id="a mask from outside"),
        pytest.param(_attention(mask="Where(keep, zero, other)"), id="one side from outside"),
    ],
)
def test_a_guard_that_may_act_stays(model: ir.Model) -> None:
    before = _kinds(model)
    remove_nan_guards(model.graph)
    assert _kinds(model) == before


def test_a_guard_of_an_infinite_mask_stays() -> None:
    model = _attention()
    low = model.graph.initializers["low"]
    low.const_value = ir.tensor(np.array(-np.inf, dtype=np.float32), name="low")
    before = _kinds(model)
    remove_nan_guards(model.graph)
    assert _kinds(model) == before


def test_a_guard_in_float16_stays() -> None:
    """There, a score below -16 plus the lowest number, -65504, is -inf."""
    model = _attention()
    for value in [*model.graph.initializers.values(), *(v for node in model.graph for v in node.outputs)]:
        if value.dtype is ir.DataType.FLOAT:
            value.type = ir.TensorType(ir.DataType.FLOAT16)
    low = model.graph.initializers["low"]
    low.const_value = ir.tensor(np.array(-65504.0, dtype=np.float16), name="low")
    before = _kinds(model)
    remove_nan_guards(model.graph)
    assert _kinds(model) == before
