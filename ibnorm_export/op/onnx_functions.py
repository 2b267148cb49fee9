"""The operator as one ONNX node, and its definition as a function of standard operators.

A model has a function for each op type that it uses. A runtime that supports model-local functions runs the file as it
is; a runtime with a kernel of the same name runs the kernel instead.

Why the function bodies have this form:
  * They begin with Cast and end with CastLike. Otherwise half-precision bodies lack CPU kernels (`Tanh` has none in
    bfloat16) and lose accuracy in TensorRT.
  * They centre first, even for S, and end with `LayerNormalization`, for which every runtime has a fused kernel. The
    kernel may compute E[x^2] - mean^2, whose error is 2e-6 at a mean of 100 standard deviations.
  * Norms wider than `NARROW` values compute means of blocks, and then the mean of those. ONNX Runtime adds one value
    after another, in both LayerNormalization and ReduceMean: the error is 6e-6 over 802,816 values, and 1e-7 in blocks.
  * L divides by the rounded argument of its logarithm (`q - 1`), which cancels the rounding of 1 + r. The relative
    error stays below 2e-7 from 1e-6 to 1e30, where Log(1 + r) loses all digits.
  * All inputs are connected and all attributes are on the node, as TensorRT's parser and onnx's reference evaluator
    require.
  * A constant is a tensor (`value`), because onnx2tf, TVM, onnxslim and the quantisers of ONNX Runtime read no other
    form. Only lambda and epsilon, which are attributes of the function, cannot be tensors; `graph.inlining` makes them
    tensors where it expands a function.
  * Nodes have names, without which pnnx fails.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Final

import onnx
import onnx.helper
import onnx.parser

from ibnorm_export.errors import SpecError
from ibnorm_export.op.spec import DOMAIN, OP_VERSION, Compression, IBNormSpec

__all__ = ["NARROW", "OPSETS", "function", "functions", "node", "opset_imports", "skip_function", "skip_node"]

#: Opsets of the default domain in which the function bodies are valid. 18 is the first with axes as an input of
#: reductions; the last is the newest that ONNX Runtime 1.31 and onnx 1.23 support.
OPSETS: Final = range(18, 27)

#: The widest norm whose function ends with LayerNormalization, in values.
NARROW: Final = 65536

#: The most values that a wider norm adds up in one block.
_BLOCK: Final = 1024

# t -> c, in float32. `smallest` is 1 + 2^-23, the smallest float32 above 1, so q - 1 is never 0.
_COMPRESS: Final = {
    Compression.LINEAR: "",  # g is the identity, so c is t
    Compression.LOGARITHMIC: """
        one = Constant <value = float {1.0}> ()
        smallest = Constant <value = float {1.00000011920928955078125}> ()
        r = Abs(t)
        one_r = Add(one, r)
        q = Max(one_r, smallest)
        log_q = Log(q)
        q_1 = Sub(q, one)
        numerator = Mul(t, log_q)
        c = Div(numerator, q_1)""",
    Compression.TANH: """
        c = Tanh(t)""",
}

# x (float32) -> y (float32)
_NORM: Final = """
        scale_f = Cast <to = 1> (scale)
        bias_f = Cast <to = 1> (bias)
        axes = Constant <value = int64[1] {{-1}}> ()
        mean = ReduceMean <keepdims = 1> (x, axes)
        d = Sub(x, mean)
        lambd = Constant <value_float: float = @lambd> ()
        t = Div(d, lambd){compress}
        y = LayerNormalization <axis = -1, epsilon: float = @epsilon, stash_type = 1> ({c}, scale_f, bias_f)"""

# The same in blocks (..., n / block, block), for a norm that is wider than `NARROW`.
_WIDE_NORM: Final = """
        scale_f = Cast <to = 1> (scale)
        bias_f = Cast <to = 1> (bias)
        rows = Shape <start = 0, end = -1> (x)
        n = Shape <start = -1> (x)
        block = Constant <value = int64[1] {{{block}}}> ()
        blocks = Div(n, block)
        shape = Concat <axis = 0> (rows, blocks, block)
        x_blocks = Reshape(x, shape)
        inner = Constant <value = int64[1] {{-1}}> ()
        outer = Constant <value = int64[1] {{-2}}> ()
        means = ReduceMean <keepdims = 1> (x_blocks, inner)
        mean = ReduceMean <keepdims = 1> (means, outer)
        d = Sub(x_blocks, mean)
        lambd = Constant <value_float: float = @lambd> ()
        t = Div(d, lambd){compress}
        means_c = ReduceMean <keepdims = 1> ({c}, inner)
        mean_c = ReduceMean <keepdims = 1> (means_c, outer)
        centred = Sub({c}, mean_c)
        square = Mul(centred, centred)
        variances = ReduceMean <keepdims = 1> (square, inner)
        variance = ReduceMean <keepdims = 1> (variances, outer)
        epsilon_f = Constant <value_float: float = @epsilon> ()
        shifted = Add(variance, epsilon_f)
        deviation = Sqrt(shifted)
        normal_blocks = Div(centred, deviation)
        whole = Concat <axis = 0> (rows, n)
        normal = Reshape(normal_blocks, whole)
        scaled = Mul(normal, scale_f)
        y = Add(scaled, bias_f)"""

_IBNORM: Final = """
    <domain: "{domain}", opset_import: ["" : {opset}]>
    {op_type} <lambd, epsilon, axis, plugin_namespace> (X, scale, bias) => (Y) {{
        x = Cast <to = 1> (X){norm}
        Y = CastLike(y, X)
    }}"""

_SKIP_IBNORM: Final = """
    <domain: "{domain}", opset_import: ["" : {opset}]>
    {op_type} <lambd, epsilon, axis, plugin_namespace> (X, skip, scale, bias) => (Y, sum) {{
        x_f = Cast <to = 1> (X)
        skip_f = Cast <to = 1> (skip)
        sum_f = Add(x_f, skip_f)
        sum = CastLike(sum_f, X)
        x = Cast <to = 1> (sum){norm}
        Y = CastLike(y, X)
    }}"""


def _block(widths: Collection[int]) -> int:
    """The largest divisor of all widths that is at most `_BLOCK`."""
    common = math.gcd(*widths)
    return next(size for size in range(min(_BLOCK, common), 0, -1) if common % size == 0)


def _parse(
    text: str, op_type: str, *, compression: Compression, opset: int, widths: Collection[int]
) -> onnx.FunctionProto:
    if opset not in OPSETS:
        raise SpecError(f"opset is {opset}; IBNorm's function is defined for {OPSETS.start} to {OPSETS.stop - 1}")
    compress = _COMPRESS[compression]
    c = "c" if compress else "t"
    if max(widths, default=1) <= NARROW:
        norm = _NORM.format(compress=compress, c=c)
    else:
        norm = _WIDE_NORM.format(compress=compress, c=c, block=_block(widths))
    parsed = onnx.parser.parse_function(text.format(domain=DOMAIN, opset=opset, op_type=op_type, norm=norm))
    for node in parsed.node:
        node.name = node.output[0]
    return parsed


def function(compression: Compression, opset: int, *, widths: Collection[int] = ()) -> onnx.FunctionProto:
    """Return the function `IBNorm{S,L,T}` (X, scale, bias) -> Y in standard operators.

    Args:
        compression: g.
        opset: version of the default domain; it must be that of the model.
        widths: width of every norm of this op type in the model, which share the function. If empty, norms are at
            most `NARROW` values wide.

    Raises:
        SpecError: the opset is outside `OPSETS`.
    """
    return _parse(_IBNORM, compression.op_type, compression=compression, opset=opset, widths=widths)


def skip_function(compression: Compression, opset: int, *, widths: Collection[int] = ()) -> onnx.FunctionProto:
    """Return the function `SkipIBNorm{S,L,T}` (X, skip, scale, bias) -> (Y, sum); see `function`."""
    return _parse(_SKIP_IBNORM, compression.skip_op_type, compression=compression, opset=opset, widths=widths)


def functions(opset: int, norms: Collection[tuple[str, int]] = ()) -> dict[str, onnx.FunctionProto]:
    """Return all six functions by op type.

    Args:
        opset: version of the default domain; it must be that of the model.
        norms: op type and width of every norm in the model.
    """
    bodies = {}
    for make in (function, skip_function):
        for compression in Compression:
            op_type = compression.op_type if make is function else compression.skip_op_type
            bodies[op_type] = make(compression, opset, widths={width for name, width in norms if name == op_type})
    return bodies


def _make_node(op_type: str, inputs: list[str], *, outputs: list[str], spec: IBNormSpec, name: str) -> onnx.NodeProto:
    proto = onnx.helper.make_node(op_type, inputs, outputs, name=name, domain=DOMAIN)
    proto.attribute.extend(onnx.helper.make_attribute(key, value) for key, value in spec.attributes().items())
    return proto


def node(
    x: str,  # (..., n)
    scale: str,  # (n,)
    *,
    bias: str,  # (n,)
    y: str,  # (..., n)
    spec: IBNormSpec,
    name: str = "",
) -> onnx.NodeProto:
    """Return an IBNorm node with all attributes. Inputs and outputs are names of values."""
    return _make_node(spec.op_type, [x, scale, bias], outputs=[y], spec=spec, name=name)


def skip_node(
    x: str,  # (..., n)
    skip: str,  # (..., n)
    *,
    scale: str,  # (n,)
    bias: str,  # (n,)
    y: str,  # (..., n)
    total: str,  # (..., n)
    spec: IBNormSpec,
    name: str = "",
) -> onnx.NodeProto:
    """Return a SkipIBNorm node: `total` is x + skip, rounded to their dtype, and `y` is IBNorm of `total`."""
    return _make_node(spec.compression.skip_op_type, [x, skip, scale, bias], outputs=[y, total], spec=spec, name=name)


def opset_imports(opset: int) -> list[onnx.OperatorSetIdProto]:
    """Return the domains that a model with the node imports."""
    return [onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid(DOMAIN, OP_VERSION)]
