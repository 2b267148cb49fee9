"""The operator as one ONNX node, and what the node means in standard operators.

A model that uses the node carries the function of each op type that it uses, so a runtime that
knows model-local functions runs the file as it is, and one with a fused kernel registered under
the same name runs that instead.

Why the bodies look as they do (each line was found by running it):
  * Cast first, CastLike last: half-precision bodies otherwise lack CPU kernels (`Tanh` has none in
    bfloat16) and lose accuracy in TensorRT.
  * Centre first, S too, and end in `LayerNormalization`: every runtime has a fused kernel for it,
    but may compute E[x^2] - mean^2, which at a mean of 100 standard deviations costs 2e-6.
  * L divides by the rounded argument of its own logarithm (`q - 1`), which cancels the rounding
    of 1 + r: relative error below 2e-7 from 1e-6 to 1e30, where Log(1 + r) loses everything.
  * All inputs connected, all attributes on the node: TensorRT's parser and the onnx reference
    evaluator both need it.
"""

from __future__ import annotations

from typing import Final

import onnx
import onnx.helper
import onnx.parser

from ibnorm_export.errors import SpecError
from ibnorm_export.spec import DOMAIN, OP_VERSION, Compression, IBNormSpec

__all__ = ["OPSETS", "function", "functions", "node", "opset_imports", "skip_function", "skip_node"]

#: Opsets of the default domain that the function bodies are valid in. 18 brought reductions with
#: axes as an input; ONNX Runtime 1.31 and onnx 1.23 know the last.
OPSETS: Final = range(18, 27)

# t -> c, in float32. `smallest` is 1 + 2^-23, the least float32 above 1, so q - 1 is never 0.
_COMPRESS: Final = {
    Compression.LINEAR: """
        c = Identity(t)""",
    Compression.LOGARITHMIC: """
        one = Constant <value_float = 1.0> ()
        smallest = Constant <value_float = 1.00000011920928955078125> ()
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
        axes = Constant <value_ints = [-1]> ()
        mean = ReduceMean <keepdims = 1> (x, axes)
        d = Sub(x, mean)
        lambd = Constant <value_float: float = @lambd> ()
        t = Div(d, lambd){compress}
        y = LayerNormalization <axis = -1, epsilon: float = @epsilon, stash_type = 1> (c, scale_f, bias_f)"""

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


def _parse(text: str, op_type: str, compression: Compression, opset: int) -> onnx.FunctionProto:
    if opset not in OPSETS:
        raise SpecError(f"opset is {opset}; IBNorm's function is defined for {OPSETS.start} to {OPSETS.stop - 1}")
    compress = _COMPRESS[compression]
    norm = _NORM.format(compress=compress)
    if compression is Compression.LINEAR:  # no node where g is the identity
        norm = norm.replace(compress, "").replace("(c, scale_f", "(t, scale_f")
    return onnx.parser.parse_function(text.format(domain=DOMAIN, opset=opset, op_type=op_type, norm=norm))


def function(compression: Compression, opset: int) -> onnx.FunctionProto:
    """The meaning of `IBNorm{S,L,T}` (X, scale, bias) -> Y in standard operators.

    Args:
        compression: g.
        opset: version of the default domain; must equal that of the model.

    Raises:
        SpecError: the opset is outside `OPSETS`.
    """
    return _parse(_IBNORM, compression.op_type, compression, opset)


def skip_function(compression: Compression, opset: int) -> onnx.FunctionProto:
    """The meaning of `SkipIBNorm{S,L,T}` (X, skip, scale, bias) -> (Y, sum): see `function`."""
    return _parse(_SKIP_IBNORM, compression.skip_op_type, compression, opset)


def functions(opset: int) -> dict[str, onnx.FunctionProto]:
    """All six functions by op type."""
    bodies = [make(compression, opset) for make in (function, skip_function) for compression in Compression]
    return {body.name: body for body in bodies}


def _make_node(op_type: str, inputs: list[str], outputs: list[str], spec: IBNormSpec, name: str) -> onnx.NodeProto:
    made = onnx.helper.make_node(op_type, inputs, outputs, name=name, domain=DOMAIN)
    made.attribute.extend(onnx.helper.make_attribute(key, value) for key, value in spec.attributes().items())
    return made


def node(
    x: str,  # (..., n)
    scale: str,  # (n,)
    bias: str,  # (n,)
    y: str,  # (..., n)
    spec: IBNormSpec,
    name: str = "",
) -> onnx.NodeProto:
    """The IBNorm node between the named values, every attribute spelled out."""
    return _make_node(spec.op_type, [x, scale, bias], [y], spec, name)


def skip_node(
    x: str,  # (..., n)
    skip: str,  # (..., n)
    scale: str,  # (n,)
    bias: str,  # (n,)
    y: str,  # (..., n)
    total: str,  # (..., n)
    spec: IBNormSpec,
    name: str = "",
) -> onnx.NodeProto:
    """The SkipIBNorm node: `total` = x + skip rounded to its type, `y` = IBNorm of `total`."""
    return _make_node(spec.compression.skip_op_type, [x, skip, scale, bias], [y, total], spec, name)


def opset_imports(opset: int) -> list[onnx.OperatorSetIdProto]:
    """What a model that uses the node imports."""
    return [onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid(DOMAIN, OP_VERSION)]
