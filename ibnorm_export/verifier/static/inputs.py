"""Check that a file uses its inputs as PyTorch does: token ids are only looked up, images only enter a convolution.

A file that clips, remaps or compares them may be right on every input that is run. Here, no number has to show it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import onnx
import torch

from ibnorm_export.artifacts.tensors import DType
from ibnorm_export.findings.code import FindingCode
from ibnorm_export.verifier.checkpoint.coverage import Coverage
from ibnorm_export.verifier.report import Finding
from ibnorm_export.verifier.static.dataflow import DataFlow, FlowNode

__all__ = ["check_inputs"]

#: PyTorch's operators on an input, and the operators that a file may have for each, with the position of the input.
#: Some are those of ONNX Runtime's own domains, which it writes into optimised files.
_Uses = dict[str, frozenset[tuple[str, int]]]
_SAME: Final[_Uses] = {
    "embedding": frozenset({("Gather", 1), ("EmbedLayerNormalization", 0), ("GatherBlockQuantized", 1)}),
    "convolution": frozenset(
        {("Conv", 0), ("FusedConv", 0), ("NhwcConv", 0), ("NhwcFusedConv", 0), ("ReorderInput", 0)}
    ),
}

#: The same for positions: they are looked up, or multiply the frequencies of a rotary embedding.
_PRODUCT: Final = frozenset((op_type, position) for op_type in ("Mul", "MatMul", "Gemm") for position in (0, 1))
_POSITIONS: Final[_Uses] = {**_SAME, "mul": _PRODUCT, "mm": _PRODUCT, "bmm": _PRODUCT}

#: The same for a cache: it is extended.
_CACHE: Final[_Uses] = {
    "cat": frozenset(
        {
            *(("Concat", 0), ("Concat", 1), ("Attention", 4), ("Attention", 5), ("TensorScatter", 0)),
            *(("GroupQueryAttention", 3), ("GroupQueryAttention", 4)),
        }
    )
}

#: Operators that leave values as they are, in another shape or type, and those that read only the shape.
_MOVING: Final = frozenset(
    {"Identity", "Cast", "Reshape", "Unsqueeze", "Squeeze", "Flatten", "Transpose", "Expand", "Tile"}
)
_SHAPES: Final = frozenset({"Shape", "Size"})

#: Types of integers that do not hold every position or id, and what PyTorch calls them.
_NARROW: Final = {
    onnx.TensorProto.INT8: torch.int8,
    onnx.TensorProto.UINT8: torch.uint8,
    onnx.TensorProto.INT16: torch.int16,
    onnx.TensorProto.UINT16: torch.uint16,
}


#: Types of numbers that hold fewer values, or fewer digits, than others do.
_HALF: Final = {onnx.TensorProto.FLOAT16: DType.FP16, onnx.TensorProto.BFLOAT16: DType.BF16}


def check_inputs(flow: DataFlow, coverage: Coverage, *, own_code: bool) -> Iterator[Finding]:
    """Compare what happens to the values of every input with what PyTorch does with them.

    Args:
        flow: the data flow of the file.
        coverage: the operators that took each input in one run of the checkpoint.
        own_code: whether the model is the user's own code, which may convert values to any type.
    """
    yield from _narrow_casts(flow, coverage)
    if not own_code:
        yield from _half_casts(flow)
    for name, operators in coverage.uses.items():
        known = _POSITIONS if name == "position_ids" else _CACHE if name.startswith("past_key_values.") else _SAME
        if not operators or not operators <= known.keys():
            continue
        same = frozenset().union(*(known[operator] for operator in operators))
        for node, position in _uses(flow, name):
            if (node.proto.op_type, position) not in same:
                what = f"goes into the {node}; PyTorch uses it in {', '.join(sorted(operators))} only"
                yield Finding(f"input {name}", what, code=FindingCode.INPUT_USE)


def _uses(flow: DataFlow, name: str) -> Iterator[tuple[FlowNode, int]]:
    """Nodes that take the values of an input, and at which position."""
    moved = {name}
    for node in flow.nodes:  # in the order of the file, so a value comes before its readers
        for position, read in enumerate(node.inputs):
            if read not in moved or node.proto.op_type in _SHAPES:
                continue
            if (node.proto.op_type in _MOVING and position == 0) or flow.renumbers(node):
                moved.update(node.outputs)
            else:
                yield node, position


def _narrow_casts(flow: DataFlow, coverage: Coverage) -> Iterator[Finding]:
    """Conversions to integers that lose large ones."""
    for node in flow.nodes:
        kind: Any = flow.converts_to(node)
        narrow = kind in _NARROW and _NARROW[kind] not in coverage.integers
        if narrow and not all(flow.is_constant(name) for name in node.outputs):
            what = f"the {node} converts to {onnx.TensorProto.DataType.Name(kind)}, which PyTorch does not use"
            yield Finding("types", what, code=FindingCode.CONVERSION)


def _half_casts(flow: DataFlow) -> Iterator[Finding]:
    """Conversions of data to a half type that the file is not in. A copy without rounding would not show them."""
    own = (flow.exported.dtype, flow.exported.stored_dtype)
    for node in flow.nodes:
        kind: Any = flow.converts_to(node)
        other = kind in _HALF and _HALF[kind] not in own
        if other and not all(flow.is_constant(name) for name in node.outputs):
            what = f"the {node} converts to {_HALF[kind]}, and the file is in {own[0]}"
            yield Finding("types", what, code=FindingCode.CONVERSION)
