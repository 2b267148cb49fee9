"""Check that a file computes with masks, positions and token ids only what PyTorch computes with them.

A mask that is summed, shifted or compared may decide about data in rows that no input has, e.g. those with 37 tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from typing import Final

import onnx

from ibnorm_export.artifacts.metadata import Target
from ibnorm_export.findings.code import FindingCode
from ibnorm_export.verifier.checkpoint.coverage import Coverage
from ibnorm_export.verifier.checkpoint.operator_names import is_among, operator_words
from ibnorm_export.verifier.report import Finding
from ibnorm_export.verifier.static.dataflow import DataFlow, FlowNode
from ibnorm_export.verifier.static.numbers import BRANCHES
from ibnorm_export.verifier.static.operators import FUNCTIONS
from ibnorm_export.verifier.static.sizes import COMPARING

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
    **dict.fromkeys(("MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool"), ("pool",)),
    **dict.fromkeys(("Conv", "ConvInteger"), ("conv*",)),
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
    "NonZero": ("nonzero", "argwhere"),
    **dict.fromkeys(("Pow", "Sqrt", "Exp", "Log", "Reciprocal"), ("pow", "square", "sqrt", "rsqrt", "exp", "log*")),
}

#: Operators that combine truth values, as such or as numbers, and words in the names of PyTorch's that become them.
_TRUTHS: Final = frozenset({"And", "Or", "Xor", "Not", "Where", *COMPARING})
_TRUTH_WORDS: Final = (
    *("and", "or", "xor", "not", "invert", "eq", "ne", "lt", "le", "gt", "ge", "where", "masked*", "tril", "triu"),
)
_PRODUCTS: Final = frozenset({"Mul", "Min", "Max"})
_PRODUCT_WORDS: Final = ("and", "mul", "where", "masked*", "min", "max", "minimum", "maximum", "clamp")

#: Operators that only move such values, or compute angles of positions.
_PLAIN: Final = frozenset(
    {
        *("Cast", "CastLike", "Identity", "Reshape", "Unsqueeze", "Squeeze", "Flatten", "Transpose", "Expand", "Tile"),
        *("Gather", "GatherND", "GatherElements", "Pad", "Trilu", "Range", "ConstantOfShape", "Cos", "Sin", "IsNaN"),
        *("ScatterND", "ScatterElements", "OneHot", "EyeLike", "Dropout", *BRANCHES),
    }
)

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
    combined: Counter[str] = Counter()
    for node, source in _computed(flow):
        kind = node.proto.op_type
        combined[kind] += 1
        if kind in lengths or (kind in _TRUTHS | _PLAIN and kind not in _OPERATORS):
            continue
        parts = _OPERATORS.get(kind, FUNCTIONS.get(kind, ()))
        if not any(is_among(part, words) for part in parts):
            what = f"the {node} computes with a mask, positions or ids ({source}) what PyTorch does not"
            yield Finding("operators", f"{what} for this checkpoint", code=FindingCode.OPERATOR_UNKNOWN)
    for kinds, parts in ((_TRUTHS, _TRUTH_WORDS), (_PRODUCTS, _PRODUCT_WORDS)):
        times = sum(combined[kind] for kind in kinds)
        known = sum(n for name, n in operators.items() if any(is_among(p, set(operator_words(name))) for p in parts))
        if times > known + _MASKS:
            what = f"the file combines truth values that follow from a mask {times} times, and PyTorch at most {known}"
            yield Finding("operators", f"{what} for this checkpoint", code=FindingCode.OPERATOR_UNKNOWN)


def _computed(flow: DataFlow) -> Iterator[tuple[FlowNode, str]]:
    """Nodes whose result follows only from integers of the input and from sizes, and the name of such an input."""
    graph = flow.exported.proto.graph
    given_types = {v.name: v.type.tensor_type.elem_type for v in graph.input if not flow.is_constant(v.name)}
    integers = {name for name, kind in given_types.items() if kind in _INTEGER_TYPES}
    sizes: set[str] = set()
    for node in flow.nodes:
        given = [name for name in node.inputs if name and not flow.is_constant(name)]
        source = next((name for name in given if name in integers), "")
        if node.proto.op_type in _SIZES or (given and all(name in sizes for name in given)):
            sizes.update(node.outputs)
        elif _looks_up(flow, node, integers):
            continue
        elif source and all(name in integers or name in sizes for name in given):
            integers.update(node.outputs)
            yield node, source


def _looks_up(flow: DataFlow, node: FlowNode, integers: AbstractSet[str]) -> bool:
    """Whether a node looks up other data: its table is neither computed from integers of the input nor made of such."""
    table = _TABLES.get(node.proto.op_type)
    return table is not None and integers.isdisjoint(node.inputs[table : table + 1]) and not flow.renumbers(node)
