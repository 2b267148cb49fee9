"""Check that a file applies only functions that PyTorch applies, and decides nothing by comparing sizes.

A function that is nearly linear where inputs are drawn, a limit that is computed from other data, and a branch on a
ratio of sizes show in no number of the file, and may act on no input that is run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import onnx

from ibnorm_export.findings.code import FindingCode
from ibnorm_export.op import onnx_functions
from ibnorm_export.verifier.constants import SHAPE_INPUTS
from ibnorm_export.verifier.coverage import Coverage
from ibnorm_export.verifier.dataflow import DataFlow, FlowNode
from ibnorm_export.verifier.report import Finding

__all__ = ["check_operators"]

#: Words in the names of PyTorch's operators that compare or choose; the beginning of a word ends with an asterisk.
_CHOOSING: Final = (
    *("lt", "le", "gt", "ge", "eq", "ne", "where", "clamp", "clip", "max", "maximum", "amax", "min", "minimum", "amin"),
    *(
        "sign",
        "sgn",
        "copysign",
        "mask*",
        "fill*",
        "relu6",
        "hardtanh",
        "threshold",
        "hard*",
        "elu",
        "celu",
        "selu",
        "shrink*",
    ),
    *("softplus", "nan*", "isnan", "isinf", "isfinite", "isneginf", "isclose", "sort", "topk", "put", "tril", "triu"),
    *("heaviside", "nonzero", "round", "floor*", "remainder", "fmod", "upsample*", "grid*", "bucketize", "bernoulli"),
)
_SIGMOIDS: Final = ("sigmoid", "silu", "gelu", "glu", "swish", "mish", "lstm", "gru", "softmax")
_ROUNDING: Final = ("floor*", "ceil", "round", "trunc", "remainder", "fmod", "div", "frac")

#: What a file computes with floating-point data, and words in the names of PyTorch's operators that become it.
_FUNCTIONS: Final = {
    **dict.fromkeys(("Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal"), _CHOOSING),
    **dict.fromkeys(("Where", "IsNaN", "IsInf"), (*_CHOOSING, "attention", "softmax", "log*")),
    **dict.fromkeys(("Max", "Clip"), (*_CHOOSING, "relu", "log*", "acos")),
    "Min": _CHOOSING,
    "Tanh": ("tanh", "gelu", "mish", "lstm", "gru", "rnn"),
    "Erf": ("erf*", "gelu"),
    "Sigmoid": _SIGMOIDS,
    **{name: (name.lower(),) for name in ("Sin", "Cos", "Tan", "Atan", "Asin", "Acos", "Sinh", "Cosh", "Asinh")},
    **{name: (name.lower(),) for name in ("Acosh", "Atanh")},
    "Softsign": ("softsign", "abs"),
    "Softplus": ("softplus", "mish", "log*"),
    **dict.fromkeys(("LeakyRelu", "PRelu"), ("leaky", "prelu", "rrelu", "where")),
    **dict.fromkeys(("Elu", "Celu", "Selu"), ("elu", "celu", "selu", "expm1")),
    "ThresholdedRelu": ("threshold",),
    "Shrink": ("shrink*", "hardshrink", "softshrink"),
    "Relu": ("relu*", "clamp", "threshold", "hard*", "max", "maximum"),
    **dict.fromkeys(("HardSigmoid", "HardSwish"), ("hard*",)),
    "Mish": ("mish", "softplus"),
    **dict.fromkeys(("Gelu", "FastGelu", "BiasGelu", "QuickGelu"), ("gelu", "erf*", "tanh", "sigmoid", "silu")),
    "LogSoftmax": ("log*",),
    "Hardmax": ("max", "argmax"),
    "Softmax": ("softmax", "attention"),
    **dict.fromkeys(("Floor", "Ceil", "Round"), _ROUNDING),
    "Mod": ("remainder", "fmod", "floor*"),
    "CumSum": ("cum*",),
    **dict.fromkeys(("TopK", "ArgMax", "ArgMin"), ("topk", "sort", "max", "min", "argmax", "argmin", "median", "kth*")),
    "ReverseSequence": ("flip", "lstm", "gru", "rnn"),
    **dict.fromkeys(("LRN", "LpNormalization", "MeanVarianceNormalization"), ("norm", "normalize")),
    **dict.fromkeys(("GroupNormalization", "InstanceNormalization"), ("norm",)),
}

#: Operators whose result is floating-point data, whatever their inputs are.
_FLOATING: Final = frozenset(
    {"MatMul", "Gemm", "Conv", "Attention", "MatMulNBits", "GroupQueryAttention", "LayerNormalization"}
)

#: Operators that compare.
_COMPARING: Final = frozenset({"Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal"})

#: Operators that give an integer, a size or a truth value.
_NOT_FLOATING: Final = frozenset(
    {"Shape", "Size", "ArgMax", "ArgMin", "NonZero", "IsNaN", "IsInf", "Not", "And", "Or", *_COMPARING}
)

#: Operators that limit a size or divide it. What follows may depend on it in steps.
_STEPPING: Final = frozenset({"Mod", "Max", "Min", "Clip", "Relu", "Sign", "Abs", "Pow", "BitShift"})

#: Operators that make many values of sizes.
_SPREADING: Final = frozenset({"Range", "ConstantOfShape", "Expand", "EyeLike", "OneHot", "NonZero", "CumSum", "Tile"})

#: A smaller row is in the batches that are run.
_FEW_ROWS: Final = 8

_FLOAT_TYPES: Final = (
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.FLOAT16,
    onnx.TensorProto.BFLOAT16,
    onnx.TensorProto.DOUBLE,
)


def check_operators(flow: DataFlow, coverage: Coverage) -> Iterator[Finding]:
    """Find functions of floating-point data that PyTorch does not compute, and decisions by sizes.

    Args:
        flow: the data flow of the file.
        coverage: the operators of one run of the checkpoint.
    """
    words = {word for name in coverage.float_operators for word in _words(name)}
    norms = {node.op_type for body in onnx_functions.functions(flow.exported.opset).values() for node in body.node}
    # Norms that are written out have the functions of their definition.
    inlined = norms if not any(node.proto.domain for node in flow.nodes) or flow.exported.metadata.inlined else set()
    floating = _floating(flow)
    for node in flow.nodes:
        parts = _FUNCTIONS.get(node.proto.op_type)
        if parts is None or node.proto.op_type in inlined or not any(name in floating for name in node.inputs):
            continue
        if node.proto.domain in ("", "ai.onnx", "com.microsoft") and not any(_is_among(part, words) for part in parts):
            what = "computes with floating-point data what PyTorch does not compute for this checkpoint"
            yield Finding("operators", f"the {node} {what}", code=FindingCode.OPERATOR_UNKNOWN)
    yield from _cut_rows(flow, floating)
    yield from _compared_sizes(flow)


def _words(operator: str) -> list[str]:
    """The words of the name of an operator; a pool takes the largest value, and chooses nothing else."""
    return ["pool"] if "pool" in operator else operator.removeprefix("ibnorm.").lower().split("_")


def _is_among(part: str, words: set[str]) -> bool:
    return any(word.startswith(part[:-1]) for word in words) if part.endswith("*") else part in words


def _floating(flow: DataFlow) -> set[str]:
    """Values that are floating-point data."""
    types = {value.name: value.type.tensor_type.elem_type for value in flow.exported.proto.graph.input}
    found = {name for name, kind in types.items() if kind in _FLOAT_TYPES}
    for node in flow.nodes:
        if node.proto.op_type in _NOT_FLOATING or all(flow.is_constant(name) for name in node.outputs if name):
            continue
        to = next((a.i for a in node.proto.attribute if a.name == "to"), None)
        if node.proto.op_type == "Cast":
            # Positions that are cast are no data of the model; those that meet weights are, after the product.
            made = to in _FLOAT_TYPES and node.inputs[0] in found
        elif node.proto.op_type == "Gather":
            table = node.inputs[0]
            value = flow.value(table) if flow.is_constant(table) and not flow.is_large(table) else None
            made = table in found or flow.is_large(table) or (value is not None and value.dtype.kind in "fV")
        else:
            made = node.proto.op_type in _FLOATING or any(name in found for name in (*node.inputs, *node.captured))
        found.update(name for name in node.outputs if name and made)
    return found


def _cut_rows(flow: DataFlow, floating: set[str]) -> Iterator[Finding]:
    """Slices of the first axis of data, which is the batch, at a row that few batches have."""
    for node in flow.nodes:
        if node.proto.op_type != "Slice" or node.inputs[0] not in floating:
            continue
        starts, ends, axes = (
            flow.value(name) if name and flow.is_constant(name) else None for name in (*node.inputs, "", "")[1:4]
        )
        first = [0] if axes is None else [i for i, axis in enumerate(axes.reshape(-1)) if axis == 0]
        for given in (starts, ends):
            rows = [abs(int(given.reshape(-1)[i])) for i in first if given is not None and i < given.size]
            if any(_FEW_ROWS < row < 2**31 - 1 for row in rows):
                what = f"the {node} cuts a batch at row {rows[0]}, which PyTorch does not"
                yield Finding("operators", what, code=FindingCode.SIZES_DECIDE)


def _compared_sizes(flow: DataFlow) -> Iterator[Finding]:
    """Comparisons of sizes that decide about data."""
    sizes: set[str] = set()
    decided: dict[str, FlowNode] = {}
    for node in flow.nodes:
        given = [name for name in node.inputs if name and not flow.is_constant(name)]
        if not given:
            continue
        kind = node.proto.op_type
        by_size = all(name in sizes or name in decided for name in given)
        cause = next((decided[name] for name in given if name in decided), None)
        if kind in ("Shape", "Size"):
            sizes.update(node.outputs)
        elif by_size and kind not in _SPREADING:
            if cause is None and (kind in (*_COMPARING, *_STEPPING) or _divides(flow, node)):
                cause = node
            if cause is None:
                sizes.update(node.outputs)
            else:
                decided.update(dict.fromkeys(node.outputs, cause))
        elif cause is not None:
            shapes = SHAPE_INPUTS.get(kind, ()) if kind != "Slice" else ()
            if any(name in decided and position not in shapes for position, name in enumerate(node.inputs)):
                what = f"the {cause} compares or divides sizes, and the {node} takes the result with data"
                yield Finding("operators", f"{what}; PyTorch does not", code=FindingCode.SIZES_DECIDE)


def _divides(flow: DataFlow, node: FlowNode) -> bool:
    """Whether a node divides by a number. Exporters divide sizes by each other."""
    if node.proto.op_type != "Div" or not flow.is_constant(node.inputs[1]):
        return False
    divisor = flow.value(node.inputs[1])
    return divisor is None or bool((divisor != 1).any())
