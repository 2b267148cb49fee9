"""Check that a file computes with masks, positions and token ids only what PyTorch computes with them.

A mask that is summed, shifted or compared may decide about data in rows that no input has, e.g. those with 37 tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import onnx

from ibnorm_export.artifacts.metadata import Target
from ibnorm_export.findings.code import FindingCode
from ibnorm_export.verifier.checkpoint.coverage import Coverage
from ibnorm_export.verifier.checkpoint.operator_names import is_among, operator_words
from ibnorm_export.verifier.report import Finding
from ibnorm_export.verifier.static.dataflow import DataFlow, FlowNode

__all__ = ["check_masks"]

_INTEGER_TYPES: Final = (onnx.TensorProto.INT32, onnx.TensorProto.INT64, onnx.TensorProto.BOOL)

#: What a file computes with a mask, or with what is computed from one, and words in the names of PyTorch's operators
#: that become it. Others only move a mask, or join it with the causal one.
_OPERATORS: Final = {
    **dict.fromkeys(("ReduceSum", "ReduceMean", "ReduceL1", "ReduceSumSquare"), ("sum", "mean", "count*", "cum*")),
    **dict.fromkeys(
        ("ReduceMax", "ReduceMin", "ReduceProd", "ArgMax", "ArgMin", "TopK"),
        ("max", "amax", "min", "amin", "aminmax", "argmax", "argmin", "any", "all", "prod", "topk", "sort"),
    ),
    **dict.fromkeys(("MatMul", "Gemm", "Einsum", "MatMulInteger"), ("mm", "bmm", "addmm", "matmul", "einsum", "dot")),
    **dict.fromkeys(("MaxPool", "AveragePool", "GlobalMaxPool", "Conv", "ConvInteger"), ("pool", "conv*")),
    "Concat": ("cat", "stack", "pad", "constant*"),
    "Split": ("split*", "chunk", "unbind", "slice", "select", "narrow"),
    "Slice": ("slice", "select", "narrow", "index*", "split*", "chunk", "unbind", "unfold"),
    "Add": ("add", "addcmul", "sum", "cum*", "or", "rsub", "sub"),
    **dict.fromkeys(("Sub", "Neg"), ("sub", "rsub", "neg", "add", "not")),
    "Mul": ("mul", "and", "where", "masked*", "pow", "square"),
    **dict.fromkeys(("Div", "Mod", "BitShift"), ("div*", "true*", "floor*", "remainder", "fmod", "shift*", "mean")),
    **dict.fromkeys(
        ("Min", "Max", "Clip", "Relu", "Abs", "Sign"),
        ("min", "max", "minimum", "maximum", "clamp", "clip", "abs", "sign", "sgn", "relu"),
    ),
    **dict.fromkeys(("Pow", "Sqrt", "Exp", "Log", "Reciprocal"), ("pow", "square", "sqrt", "rsqrt", "exp", "log*")),
}

#: Operators that combine truth values, and words in the names of PyTorch's operators that become them.
_TRUTHS: Final = frozenset({"And", "Or", "Xor", "Not"})
_TRUTH_WORDS: Final = ("and", "or", "xor", "not", "invert", "eq", "ne", "mul", "where", "masked*")

#: Further combinations that a right file may have: PyTorch's code leaves them out where no token is masked.
_MASKS: Final = 3

#: Operators that give sizes, not values.
_SIZES: Final = frozenset({"Shape", "Size"})

#: Operators that look up other data, by the position of it among their inputs.
_TABLES: Final = {"Gather": 0, "GatherBlockQuantized": 0, "EmbedLayerNormalization": 2}


def check_masks(flow: DataFlow, coverage: Coverage) -> Iterator[Finding]:
    """Find what is computed with integers of the input, and not by PyTorch.

    Args:
        flow: the data flow of the file.
        coverage: the operators of one run of the checkpoint.
    """
    operators = coverage.integer_operators
    words = {word for name, count in operators.items() if count > 0 for word in operator_words(name)}
    # GroupQueryAttention takes the lengths of rows.
    lengths = ("ReduceSum", "Sub") if flow.exported.metadata.target is Target.ORT_GENAI else ()
    truths = 0
    for node, source in _computed(flow):
        kind = node.proto.op_type
        parts = () if kind in lengths else _OPERATORS.get(kind, ())
        if parts and not any(is_among(part, words) for part in parts):
            what = f"the {node} computes with a mask, positions or ids ({source}) what PyTorch does not"
            yield Finding("operators", f"{what} for this checkpoint", code=FindingCode.OPERATOR_UNKNOWN)
        truths += kind in _TRUTHS
    known = sum(n for name, n in operators.items() if any(is_among(p, set(operator_words(name))) for p in _TRUTH_WORDS))
    if truths > known + _MASKS:
        what = f"the file combines truth values that follow from a mask {truths} times, and PyTorch at most {known}"
        yield Finding("operators", f"{what} for this checkpoint", code=FindingCode.OPERATOR_UNKNOWN)


def _computed(flow: DataFlow) -> Iterator[tuple[FlowNode, str]]:
    """Nodes whose result follows only from integers of the input and from sizes, and the name of such an input."""
    graph = flow.exported.proto.graph
    integers = {v.name for v in graph.input if v.type.tensor_type.elem_type in _INTEGER_TYPES}
    sizes: set[str] = set()
    for node in flow.nodes:
        given = [name for name in node.inputs if name and not flow.is_constant(name)]
        source = next((name for name in given if name in integers), "")
        if node.proto.op_type in _SIZES or (given and all(name in sizes for name in given)):
            sizes.update(node.outputs)
        elif (table := _TABLES.get(node.proto.op_type)) is not None and integers.isdisjoint(
            node.inputs[table : table + 1]
        ):
            continue
        elif source and all(name in integers or name in sizes for name in given):
            integers.update(node.outputs)
            yield node, source
