"""Check that a file applies only functions that PyTorch applies, and decides nothing by comparing sizes.

A function that is nearly linear where inputs are drawn, a limit that is computed from other data, and a branch on a
ratio of sizes show in no number of the file, and may act on no input that is run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from typing import Any, Final

import onnx

from ibnorm_export.errors import quoted
from ibnorm_export.findings.code import FindingCode
from ibnorm_export.op import onnx_functions
from ibnorm_export.op.spec import DOMAIN
from ibnorm_export.text_report import counted
from ibnorm_export.verifier.checkpoint.coverage import Coverage
from ibnorm_export.verifier.checkpoint.operator_names import is_among, operator_words
from ibnorm_export.verifier.report import Finding
from ibnorm_export.verifier.static.dataflow import FLOAT_TYPES, RANDOM_OPERATORS, WHOLE_TYPES, DataFlow, FlowNode
from ibnorm_export.verifier.static.factors import check_factors
from ibnorm_export.verifier.static.sizes import COMPARING, check_sizes
from ibnorm_export.verifier.weights.tool_layouts import BLOCKED_DOMAIN

__all__ = ["FUNCTIONS", "check_operators"]

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

#: What computes sums of data inside.
_PARTS: Final = ("norm", "linalg*", "std*", "var*", "dist*", "cdist")

#: What a file computes with floating-point data, and words in the names of PyTorch's operators that become it.
FUNCTIONS: Final = {
    **dict.fromkeys(("Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal"), _CHOOSING),
    **dict.fromkeys(("Where", "IsNaN"), (*_CHOOSING, "attention", "softmax", "log*")),
    "IsInf": _CHOOSING,
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
    "Exp": ("exp*", "logsumexp", "softplus", "mish", "elu", "celu", "selu", *_SIGMOIDS),
    "Log": ("log*", "softplus", "mish"),
    "Abs": ("abs", "softsign", "norm", "linalg*"),
    "Sign": ("sign", "sgn", "copysign", *_ROUNDING),
    "Sqrt": ("sqrt", "rsqrt", "norm", "linalg*", "std*", "var*", "pow"),
    "Reciprocal": ("reciprocal", "rsqrt", "div", "pow", "norm"),
    "Pow": ("pow", "square", "norm", "linalg*", "rsqrt", "gelu", "var*", "std*"),
    "MaxPool": ("pool",),
    **dict.fromkeys(("LpPool", "GlobalLpPool"), ("pow", *_PARTS)),
    **dict.fromkeys(("AveragePool", "GlobalAveragePool"), ("pool", "mean")),
    "GlobalMaxPool": ("pool", "max", "amax"),
    **dict.fromkeys(("ReduceMax", "ReduceMin"), ("max", "amax", "min", "amin", "aminmax", *_PARTS)),
    "ReduceProd": ("prod",),
    **dict.fromkeys(("ReduceL1", "ReduceL2", "ReduceSumSquare"), ("pow", "square", "sum", "mean", "abs", *_PARTS)),
    **dict.fromkeys(("ReduceLogSum", "ReduceLogSumExp"), ("log*",)),
    **dict.fromkeys(("Swish", "SwiGLU"), ("silu", "swish", "glu", "sigmoid")),
    "RMSNormalization": ("norm", "rsqrt", "sqrt", "pow"),
    "CumProd": ("cumprod",),
    "ReduceMean": ("mean", "pool", *_PARTS),
    "ReduceSum": ("sum", "mean", "pool", *_PARTS),
}

#: The same for arithmetic of data with data, as opposed to a constant.
_OF_DATA: Final = {
    "Div": ("div*", "true*", "reciprocal", "rsqrt", "rdiv", "norm", "linalg*", "std*", "var*", "softsign"),
    "Mul": (
        *("mul*", "addcmul", "pow", "square", "silu", "gelu", "glu", "swish", "hard*", "mish", "sigmoid", "copysign"),
        *_PARTS,
    ),
    "Sub": ("sub*", "rsub", "neg", "lerp", "addcmul", *_PARTS),
}

#: The same for operators that choose, place or resize whatever they are given.
_STRUCTURE: Final = {
    "EyeLike": ("eye*", "diag*"),
    "OneHot": ("hot", "scatter*", "eq"),
    "Trilu": ("tril", "triu", "diag*", "attention"),
    "CumSum": ("cum*",),
    "Compress": ("masked*", "index", "nonzero"),
    "NonZero": ("nonzero", "argwhere"),
    "Unique": ("unique*",),
    **dict.fromkeys(
        ("Scatter", "ScatterElements", "ScatterND"), ("scatter*", "put*", "index*", "copy*", "fill*", "masked*")
    ),
    **dict.fromkeys(("Resize", "Upsample"), ("upsample*", "interpolate*", "resize*", "adaptive*")),
    **dict.fromkeys(("GridSample", "AffineGrid"), ("grid*", "affine*")),
    **dict.fromkeys(("RoiAlign", "MaxRoiPool", "NonMaxSuppression"), ("roi*", "nms")),
    **dict.fromkeys(("DFT", "STFT", "MelWeightMatrix"), ("fft*", "stft")),
    **dict.fromkeys(("RNN", "GRU", "LSTM"), ("rnn", "gru", "lstm")),
    "DeformConv": ("deform*",),
    "MaxUnpool": ("unpool*",),
    **dict.fromkeys(("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"), ("quant*", "fake*")),
    **dict.fromkeys(("MatMulInteger", "ConvInteger", "QLinearMatMul", "QLinearConv"), ("quant*", "fake*")),
    "SplitToSequence": ("split*", "chunk", "unbind", "tensor*"),
    **dict.fromkeys(("SequenceInsert", "SequenceErase", "SequenceConstruct", "SequenceEmpty"), ("insert",)),
    **dict.fromkeys(("Det", "CenterCropPad", "TfIdfVectorizer", "ImageDecoder"), ("linalg*",)),
}

#: Functions that a file has as often as PyTorch computes them, or less often where a tool has fused them.
_COUNTED: Final = frozenset(
    {
        *("Tanh", "Erf", "Sigmoid", "Softsign", "Softplus", "LeakyRelu", "PRelu", "Elu", "Celu", "Selu", "Mish"),
        *("ThresholdedRelu", "HardSigmoid", "HardSwish", "Relu", "Gelu", "FastGelu", "BiasGelu", "QuickGelu"),
        *("Softmax", "LogSoftmax", "Exp", "Log", "Abs", "Sign", "Floor", "Ceil", "Round", "Sin", "Cos", "Tan"),
        *("Swish", "SwiGLU"),
    }
)

#: Domains of the operators of a file: ONNX's, norms, and those that ONNX Runtime writes into optimised files.
_DOMAINS: Final = ("", "ai.onnx", DOMAIN, "com.microsoft", BLOCKED_DOMAIN, "com.ms.internal.nhwc")

#: Operators of ONNX Runtime's own domain that its optimiser, the builder of onnxruntime-genai or an export writes.
_OF_ONNXRUNTIME: Final = frozenset(
    {
        *("FusedConv", "FusedMatMul", "FusedGemm", "NhwcConv", "NhwcFusedConv", "NhwcMaxPool", "BiasSoftmax"),
        *("Gelu", "BiasGelu", "FastGelu", "QuickGelu", "ReorderInput", "ReorderOutput", "EmbedLayerNormalization"),
        *("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "SimplifiedLayerNormalization"),
        *("Attention", "MultiHeadAttention", "GroupQueryAttention", "RotaryEmbedding"),
        *("MatMulNBits", "GatherBlockQuantized"),
    }
)

#: Operators that are one node for a whole attention or activation, by the word in the names of PyTorch's.
_FUSED: Final = {
    "attention": frozenset({"Attention", "GroupQueryAttention", "MultiHeadAttention"}),
    "gelu": frozenset({"Gelu", "FastGelu", "BiasGelu", "QuickGelu"}),
}

#: Operators whose result is floating-point data, whatever their inputs are.
_FLOATING: Final = frozenset(
    {"MatMul", "Gemm", "Conv", "Attention", "MatMulNBits", "GroupQueryAttention", "LayerNormalization"}
)

#: Operators that give an integer, a size or a truth value.
_NOT_FLOATING: Final = frozenset(
    {"Shape", "Size", "ArgMax", "ArgMin", "NonZero", "IsNaN", "IsInf", "Not", "And", "Or", *COMPARING}
)

#: Operators that compute truth values of truth values, or move them.
_OF_TRUTH: Final = frozenset(
    {"Not", "And", "Or", "Xor", "Cast", "Identity", "Reshape", "Expand", "Unsqueeze", "Squeeze", "Transpose"}
)

#: Further standard operators that take floating-point data. What they compute shows in the results of ordinary inputs:
#: sums and products with weights, and values in another order or shape.
_PLAIN: Final = frozenset(
    {
        *("Add", "Sum", "Mean", "Neg", "MatMul", "Gemm", "Einsum", "Conv", "ConvTranspose", "Col2Im", "Attention"),
        *("LinearAttention", "CausalConvWithState", "RotaryEmbedding", "TensorScatter", "BatchNormalization"),
        *("LayerNormalization", "Dropout", "Cast", "CastLike", "Identity", "Reshape", "Expand", "Unsqueeze", "Squeeze"),
        *("Flatten", "Transpose", "Concat", "Gather", "GatherElements", "GatherND", "Slice", "Split", "Pad", "Tile"),
        *("DepthToSpace", "SpaceToDepth", "Shape", "Size", "SequenceAt", "SequenceLength", "ConcatFromSequence"),
        *("Optional", "OptionalGetElement", "OptionalHasElement", "Range", "If", "Loop", "Scan", "SequenceMap"),
        *RANDOM_OPERATORS,
    }
)

_RULED: Final = frozenset({*FUNCTIONS, *_OF_DATA, *_STRUCTURE, *_PLAIN})


def check_operators(
    flow: DataFlow,
    coverage: Coverage,
    *,
    norm_values: AbstractSet[str] = frozenset(),
    wide_norms: bool = False,
    lost_norms: bool = False,
) -> Iterator[Finding]:
    """Find functions of floating-point data that PyTorch does not compute, and decisions by sizes.

    Args:
        flow: the data flow of the file.
        coverage: the operators of one run of the checkpoint.
        norm_values: names of the values of norms that are written out, which have the functions of their definition.
        wide_norms: whether norms are written out that are so wide that they are computed in blocks.
        lost_norms: whether a norm was not recognised, which is a finding of its own: its operators are not another one.
    """
    words = {word for name in coverage.operators for word in operator_words(name)}
    bodies = onnx_functions.functions(flow.exported.opset).values() if lost_norms else ()
    parts_of_norms = {node.op_type for body in bodies for node in body.node}
    floating = _floating(flow)
    on_data = {word for name in coverage.float_operators for word in operator_words(name)}
    chooses = any(is_among(part, on_data) for part in _CHOOSING)
    functions: dict[str, list[FlowNode]] = {}
    for node in flow.nodes:
        kind = node.proto.op_type
        if node.proto.domain == "com.microsoft" and kind not in _OF_ONNXRUNTIME:
            what = f"the {node} is an operator of ONNX Runtime that neither an export nor its optimiser writes"
            yield Finding("operators", what, code=FindingCode.OPERATOR_UNKNOWN)
        elif node.proto.domain not in _DOMAINS:
            what = f"the {node} is of domain {quoted(node.proto.domain)}, of which an export has no operator"
            yield Finding("operators", what, code=FindingCode.OPERATOR_UNKNOWN)
        elif kind in _STRUCTURE and not flow.is_constant(node.outputs[0]):
            if not any(is_among(part, words) for part in _STRUCTURE[kind]):
                what = "chooses or places values as PyTorch does not for this checkpoint"
                yield Finding("operators", f"the {node} {what}", code=FindingCode.OPERATOR_UNKNOWN)
        elif kind in ("Cast", "CastLike") and node.inputs[0] in floating:
            yield from _unknown_conversion(flow, node, coverage=coverage)
        elif _is_function(node, floating):
            if kind not in parts_of_norms and node.outputs[0] not in norm_values:
                functions.setdefault(kind, []).append(node)
        elif kind not in _RULED and node.proto.domain in ("", "ai.onnx") and any(n in floating for n in node.inputs):
            what = f"the {node} is an operator that no export has"
            yield Finding("operators", what, code=FindingCode.OPERATOR_UNKNOWN)
        if kind == "Where" and not chooses and _is_data(flow, node, floating):
            what = "chooses by floating-point data, which PyTorch does not for this checkpoint"
            yield Finding("operators", f"the {node} {what}", code=FindingCode.OPERATOR_UNKNOWN)
        for activation in _activations(node):
            functions.setdefault(activation, []).append(node)
    unfused = _unfused(coverage.float_operators, flow)
    for kind, nodes in functions.items():
        whole = any(kind in kinds for kinds in _FUSED.values())
        yield from _unknown_functions(kind, nodes, calls=coverage.float_operators if whole else unfused)
    yield from _more_attention(flow, coverage.float_operators)
    yield from check_factors(flow, floating, words=on_data, squares=wide_norms)
    yield from check_sizes(flow, floating, operators=coverage.operators)


def _more_attention(flow: DataFlow, calls: Mapping[str, int]) -> Iterator[Finding]:
    """Nodes that are a whole attention, more of them than PyTorch computes; it may compute one in several operators."""
    nodes = [node for node in flow.nodes if node.proto.op_type in _FUSED["attention"]]
    known = sum(count for name, count in calls.items() if {"attention", "softmax"} & set(operator_words(name)))
    if len(nodes) > known:
        what = f"the file has {counted(len(nodes), 'attention node')}, and PyTorch computes {known} for this checkpoint"
        yield Finding("operators", what, code=FindingCode.OPERATOR_UNKNOWN)


def _is_data(flow: DataFlow, where: FlowNode, floating: set[str]) -> bool:
    """Whether a Where chooses by floating-point data; that a value which it chooses is NaN does not count."""
    waiting = [where.inputs[0]]
    while waiting:
        node = flow.producer(waiting.pop())
        if node is None:
            continue
        if any(name in floating for name in node.inputs):
            if node.proto.op_type != "IsNaN" or node.inputs[0] not in where.inputs[1:]:
                return True
        elif node.proto.op_type in _OF_TRUTH:
            waiting += [name for name in node.inputs if name]
    return False


def _unfused(calls: Mapping[str, int], flow: DataFlow) -> Mapping[str, int]:
    """Calls of PyTorch's operators that become several nodes: attention that is one node adds no softmax."""
    for word, kinds in _FUSED.items():
        nodes = sum(node.proto.op_type in kinds for node in flow.nodes)
        if nodes >= sum(count for name, count in calls.items() if word in name):
            calls = {name: count for name, count in calls.items() if word not in name}
    return calls


def _is_function(node: FlowNode, floating: set[str]) -> bool:
    """Whether a node computes with floating-point data what PyTorch must compute too."""
    data = [name in floating for name in node.inputs]
    return all(data) if node.proto.op_type in _OF_DATA else node.proto.op_type in FUNCTIONS and any(data)


def _activations(node: FlowNode) -> Iterator[str]:
    """Functions that a fused operator of ONNX Runtime applies to its result."""
    for attribute in node.proto.attribute:
        if attribute.name == "activation" and attribute.s.decode(errors="replace") in FUNCTIONS:
            yield attribute.s.decode()


def _unknown_functions(kind: str, nodes: list[FlowNode], *, calls: Mapping[str, int]) -> Iterator[Finding]:
    """Functions of one type that PyTorch does not compute, or not as often."""
    parts = _OF_DATA.get(kind) or FUNCTIONS[kind]
    known = sum(n for name, n in calls.items() if any(is_among(part, set(operator_words(name))) for part in parts))
    if not known:
        for node in nodes:
            what = "computes with floating-point data what PyTorch does not compute for this checkpoint"
            yield Finding("operators", f"the {node} {what}", code=FindingCode.OPERATOR_UNKNOWN)
    elif kind in _COUNTED and len(nodes) > known:
        what = f"the file has {counted(len(nodes), f'{kind} node')}, and PyTorch computes {known} of such functions"
        yield Finding("operators", f"{what} for this checkpoint", code=FindingCode.OPERATOR_UNKNOWN)


def _unknown_conversion(flow: DataFlow, node: FlowNode, *, coverage: Coverage) -> Iterator[Finding]:
    """A conversion of floating-point data to what PyTorch does not convert it to; `check_inputs` has half types."""
    to: Any = flow.converts_to(node)
    whole = to in (*WHOLE_TYPES, onnx.TensorProto.BOOL) and coverage.truncates
    if to and to not in FLOAT_TYPES and not whole:
        what = f"the {node} converts floating-point data to {onnx.TensorProto.DataType.Name(to)}"
        yield Finding("types", f"{what}, which PyTorch does not", code=FindingCode.CONVERSION)


def _floating(flow: DataFlow) -> set[str]:
    """Values that are floating-point data."""
    types = {value.name: value.type.tensor_type.elem_type for value in flow.exported.proto.graph.input}
    found = {name for name, kind in types.items() if kind in FLOAT_TYPES and not flow.is_constant(name)}
    for node in flow.nodes:
        if node.proto.op_type in _NOT_FLOATING or all(flow.is_constant(name) for name in node.outputs if name):
            continue
        to = next((a.i for a in node.proto.attribute if a.name == "to"), None)
        if node.proto.op_type == "Cast":
            # Positions that are cast are not data of the model; those that meet weights are, after the product.
            made = to in FLOAT_TYPES and node.inputs[0] in found
        elif node.proto.op_type == "Gather":
            table = node.inputs[0]
            value = flow.value(table) if flow.is_constant(table) and not flow.is_large(table) else None
            made = table in found or flow.is_large(table) or (value is not None and value.dtype.kind in "fV")
        else:
            made = node.proto.op_type in _FLOATING or any(name in found for name in (*node.inputs, *node.captured))
        found.update(name for name in node.outputs if name and made)
    return found
