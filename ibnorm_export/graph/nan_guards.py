"""Removal of guards against NaN that never act.

The exporter lets 0 replace NaN after the Softmax of attention with a boolean mask, for rows that are masked as a whole.
But it masks with the lowest finite number, so such a row has equal weights and no NaN. In float32 and bfloat16 a guard
acts only on infinite or NaN scores, where PyTorch returns NaN too; MNN has no IsNaN. In float16 the sum of a score and
the lowest number may be -inf, so the guard stays.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import onnx_ir as ir

from ibnorm_export.graph.patterns import producer_of_type

__all__ = ["remove_nan_guards"]

#: Types in which a finite score plus the lowest number stays finite.
_WIDE: Final = (ir.DataType.FLOAT, ir.DataType.BFLOAT16)


def remove_nan_guards(graph: ir.Graph) -> None:
    """Remove Where(IsNaN(s), 0, s) after a Softmax whose masked scores are all finite.

    Before: values have types. After: outputs have the same names, and the same values for finite scores.
    """
    for node in list(graph):
        guard = producer_of_type(node.inputs[0], "IsNaN") if node.domain == "" and node.op_type == "Where" else None
        if guard is None or guard.inputs[0] is not node.inputs[2]:
            continue
        weights, result = node.inputs[2], node.outputs[0]
        softmax = producer_of_type(weights, "Softmax")
        if weights is None or softmax is None or weights.dtype not in _WIDE or result.is_graph_output():
            continue
        if not _is_finite_mask(producer_of_type(softmax.inputs[0], "Add")):
            continue
        result.replace_all_uses_with(weights)
        graph.remove(node, safe=True)
        if not guard.outputs[0].uses():
            graph.remove(guard, safe=True)


def _is_finite_mask(add: ir.Node | None) -> bool:
    """Whether a node adds a mask of finite numbers, which it chooses from constants or which is one."""
    for value in () if add is None else add.inputs:
        choice = producer_of_type(value, "Where")
        parts = [value] if choice is None else list(choice.inputs[1:])
        if all(_is_finite(part) for part in parts):
            return True
    return False


def _is_finite(value: ir.Value | None) -> bool:
    tensor = None if value is None or value.is_graph_input() else ir.convenience.get_const_tensor(value)
    return tensor is not None and bool(np.isfinite(tensor.numpy().astype(np.float32)).all())
