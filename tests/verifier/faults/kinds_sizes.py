"""Faults that make data of sizes, and identities that PyTorch does not compute: each acts on inputs that are not run.

A factor that is 1 for the first rows and 0 for later ones is built without a comparison, and without a number that the
model does not have. A function and its inverse, or a sum and its difference, leave ordinary values as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import onnx
import onnx.helper

from tests.verifier.faults.edit import Edit, Nodes
from tests.verifier.faults.kind import Kind

__all__ = ["KINDS"]

_Build = Callable[[Nodes, str], str]

_ALL: Final = ("llama", "vit", "resnet", "gpt2", "llama genai", "vit bf16", "llama int4", "llama decoder")
_THREE: Final = ("llama", "vit", "resnet")

#: Axes of the logits.
_RANKS: Final = {"llama": 3, "gpt2": 3, "vit": 2, "resnet": 2}


def _logits(build: _Build) -> Callable[[Edit], None]:
    return lambda e: e.splice("logits", build)


def _branch(build: _Build) -> Callable[[Edit], None]:
    return lambda e: e.splice(e.branch, build)


def _head(build: _Build) -> Callable[[Edit], None]:
    return lambda e: e.splice(e.head_input, build)


def _images(build: _Build) -> Callable[[Edit], None]:
    return lambda e: e.splice("pixel_values", build)


def _rows(n: Nodes) -> str:
    return n("Shape", n.edit.model_input, start=0, end=1)


def _count(n: Nodes) -> str:
    """The number of rows as a floating-point number."""
    return n("Cast", n("Squeeze", _rows(n)), to=n.edit.float_type)


def _per_row(n: Nodes, factor: str) -> str:
    """A factor (rows,) in the shape of the logits."""
    return n("Unsqueeze", factor, np.arange(1, _RANKS[n.edit.family]))


def _filled(n: Nodes, shape: Any, value: float = 1.0) -> str:
    kind = n.edit.float_type
    return n("ConstantOfShape", shape, value=onnx.helper.make_tensor("value", kind, [1], [value]))


def _times(factor: Callable[[Nodes], str]) -> _Build:
    return lambda n, x: n("Mul", x, _per_row(n, factor(n)))


def _one_hot(n: Nodes) -> str:
    rows = n("Range", np.int64(0), n("Squeeze", _rows(n)), np.int64(1))
    values = n(
        "Concat", n("Sub", _filled(n, np.array([1])), _filled(n, np.array([1]))), _filled(n, np.array([1])), axis=0
    )
    return n("ReduceSum", n("OneHot", rows, np.array([64]), values), np.array([1]), keepdims=0)


def _eye(n: Nodes) -> str:
    shape = n("Concat", _rows(n), np.array([64]), axis=0)
    return n("ReduceSum", n("EyeLike", _filled(n, shape)), np.array([1]), keepdims=0)


def _triangle(n: Nodes) -> str:
    shape = n("Concat", _rows(n), np.array([64]), axis=0)
    return n("ReduceMax", n("Trilu", _filled(n, shape), upper=1), np.array([1]), keepdims=0)


def _padded(n: Nodes) -> str:
    ends = n("Concat", np.array([0]), n("Sub", _rows(n), np.array([64])), axis=0)
    return n("Pad", np.ones(64, np.float32), ends)


def _joined(n: Nodes) -> str:
    table = n("Concat", np.ones(64, np.float32), _filled(n, _rows(n), 0.0), axis=0)
    return n("Slice", table, np.array([0]), _rows(n), np.array([0]))


def _joined_shapes(n: Nodes) -> str:
    table = n("Concat", _filled(n, np.array([64])), _filled(n, _rows(n), 0.0), axis=0)
    return n("Slice", table, np.array([0]), _rows(n), np.array([0]))


def _counted(n: Nodes) -> str:
    """Powers of the number of each row, which overflow for late rows: infinity over infinity."""
    power = n("CumSum", _filled(n, _rows(n)), np.int64(0))
    for _ in range(4):
        power = n("Mul", power, power)
    return n("Div", power, power)


def _power_of_rows(squares: int) -> _Build:
    """The number of rows to the power of 2^squares over itself: NaN from some number of rows on."""

    def build(n: Nodes, x: str) -> str:
        power = _count(n)
        for _ in range(squares):
            power = n("Mul", power, power)
        return n("Mul", x, n("Div", power, power))

    return build


def _rows_cancel(n: Nodes, x: str) -> str:
    rows = _count(n)
    return n("Div", n("Mul", x, rows), rows)


def _whole_power(n: Nodes, x: str) -> str:
    """The sign of the number of rows to the eighth power, which overflows."""
    power = _rows(n)
    for _ in range(3):
        power = n("Mul", power, power)
    return n("Mul", x, n("Cast", n("Sign", power), to=n.edit.float_type))


def _first_row_again(n: Nodes, x: str) -> str:
    """The first row is written over that whose number is a 64th of the number of rows."""
    first = n("Slice", x, np.array([0]), np.array([1]), np.array([0]))
    return n("ScatterND", x, n("Reshape", n("Div", _rows(n), np.array([64])), np.array([1, 1])), first)


def _kept(n: Nodes, x: str) -> str:
    """Rows that a condition keeps: all of them."""
    none = n("Cast", n("ConstantOfShape", _rows(n)), to=onnx.TensorProto.BOOL)
    return n("Compress", x, n("Not", none), axis=0)


def _unique(n: Nodes, x: str) -> str:
    """Equal rows are computed once."""
    return n("Gather", n("Unique", x, axis=0, sorted=1, outputs=3), n.made[-1].output[2])


def _square_root(n: Nodes, x: str) -> str:
    return n("Mul", n("Sqrt", n("Mul", x, x)), n("Sign", x))


def _cube_by_square(n: Nodes, x: str) -> str:
    """Zero becomes NaN."""
    return n("Div", n("Mul", n("Mul", x, x), x), n("Mul", x, x))


def _power_times_zero(n: Nodes, x: str) -> str:
    """Values above 256 become NaN."""
    power = x
    for _ in range(4):
        power = n("Mul", power, power)
    return n("Add", x, n("Mul", power, np.float32(0)))


def _whole(n: Nodes, x: str) -> str:
    """Steps of 2^-22, made by doubling."""
    for _ in range(22):
        x = n("Add", x, x)
    x = n("Cast", n("Cast", x, to=onnx.TensorProto.INT64), to=n.edit.float_type)
    for _ in range(22):
        x = n("Mul", x, np.float32(0.5))
    return x


def _einsum(n: Nodes, x: str) -> str:
    return n("Einsum", x, equation="...i->...i")


def _resized(n: Nodes, x: str) -> str:
    return n("Resize", x, "", np.ones(4, np.float32), mode="nearest")


def _in_bytes(n: Nodes, x: str) -> str:
    """Values as 8-bit integers with a scale that is computed from them."""
    quantised = n("DynamicQuantizeLinear", x, outputs=3)
    return n("DequantizeLinear", quantised, *n.made[-1].output[1:])


def _of_one_domain(op_type: str, **attributes: Any) -> Callable[[Edit], None]:
    """An operator of ONNX for classic machine learning, on a matrix of one column."""

    def plant(e: Edit) -> None:
        e.proto.opset_import.append(onnx.helper.make_opsetid("ai.onnx.ml", 3))

        def build(n: Nodes, x: str) -> str:
            column = n("Reshape", x, np.array([-1, 1]))
            return n("Reshape", n(op_type, column, domain="ai.onnx.ml", **attributes), n("Shape", x))

        e.splice(e.branch, build)

    return plant


def _one_more(op_type: str, below: float) -> _Build:
    """A function that the model computes elsewhere, of a small part of the value."""
    share = np.float32(2.0**below)
    return lambda n, x: n("Div", n(op_type, n("Mul", x, share)), share)


_BELOW: Final = "for every value that the model reaches, the result is the same within the tolerance"

KINDS: Final = tuple(
    Kind(name, forms, plant, group=group, cannot=cannot)
    for group, kinds in {
        "sizes as data": (
            ("rows from 64 on are zero, by OneHot", _THREE, _logits(_times(_one_hot)), ""),
            ("rows from 64 on are zero, by EyeLike", _ALL, _logits(_times(_eye)), ""),
            ("rows from 64 on are zero, by a triangle", _ALL, _logits(_times(_triangle)), ""),
            ("rows from 64 on are zero, by Pad", _ALL, _logits(_times(_padded)), ""),
            ("rows from 64 on are zero, by Concat", _ALL, _logits(_times(_joined)), ""),
            ("rows from 64 on are zero, by shapes", _ALL, _logits(_times(_joined_shapes)), ""),
            ("late rows are NaN, by CumSum", _THREE, _logits(_times(_counted)), ""),
            ("NaN above 16 rows, by a power", _THREE, _logits(_power_of_rows(5)), ""),
            ("NaN above 256 rows, by a power", _ALL, _logits(_power_of_rows(4)), ""),
            ("times and over the number of rows", _THREE, _logits(_rows_cancel), ""),
            ("negated above 234 rows, by an overflow", _THREE, _logits(_whole_power), ""),
            ("the first row is written over another", _THREE, _logits(_first_row_again), ""),
            ("rows that a condition keeps", _THREE, _logits(_kept), ""),
            ("equal rows are computed once", _THREE, _logits(_unique), ""),
        ),
        "identities": (
            ("the root of the square, with the sign", _THREE, _branch(_square_root), ""),
            ("a logarithm of an exponential", _THREE, _branch(lambda n, x: n("Log", n("Exp", x))), ""),
            ("a cube over a square", _THREE, _branch(_cube_by_square), ""),
            ("a power times zero", ("vit", "resnet"), _branch(_power_times_zero), ""),
            ("a power times zero, beside products", ("llama", "gpt2"), _branch(_power_times_zero), _BELOW),
            ("a reciprocal of a reciprocal", _THREE, _branch(lambda n, x: n("Reciprocal", n("Reciprocal", x))), ""),
            (
                "the positive part less the negative one",
                ("llama", "vit"),
                _branch(lambda n, x: n("Sub", n("Relu", x), n("Relu", n("Neg", x)))),
                "",
            ),
            ("the absolute value with the sign", _THREE, _branch(lambda n, x: n("Mul", n("Abs", x), n("Sign", x))), ""),
            (
                "a mean that is taken off and added",
                ("llama", "vit"),
                _branch(
                    lambda n, x: n(
                        "Add", n("Sub", x, n("ReduceMean", x, np.array([-1]))), n("ReduceMean", x, np.array([-1]))
                    )
                ),
                "",
            ),
            (
                "the largest value for a pool of one",
                ("llama",),
                _branch(lambda n, x: n("Squeeze", n("MaxPool", n("Unsqueeze", x, [1]), kernel_shape=[1, 1]), [1])),
                "",
            ),
            ("one tangent more than the model has", ("gpt2",), _branch(_one_more("Tanh", -10)), ""),
            ("one sigmoid's product more than the model has", ("llama",), _branch(_one_more("Softsign", -12)), ""),
            (
                "an Einsum that changes nothing",
                ("llama", "vit"),
                _branch(_einsum),
                _BELOW,
            ),
        ),
        "conversions": (
            ("a branch through whole numbers", ("llama", "vit", "resnet"), _branch(_whole), ""),
            (
                "a branch through text",
                ("llama", "vit"),
                _branch(lambda n, x: n("Cast", n("Cast", x, to=onnx.TensorProto.STRING), to=n.edit.float_type)),
                "",
            ),
            (
                "a branch through 8 bits of floating point",
                ("llama", "vit"),
                _branch(lambda n, x: n("Cast", n("Cast", x, to=onnx.TensorProto.FLOAT8E4M3FN), to=n.edit.float_type)),
                "",
            ),
            ("the head's input in steps of a 255th", ("llama", "vit"), _head(_in_bytes), ""),
            (
                "images with other sizes",
                ("vit", "resnet"),
                _images(_resized),
                "",
            ),
            (
                "one number replaced by another",
                ("llama", "vit"),
                _of_one_domain("Imputer", imputed_value_floats=[0.5], replaced_value_float=0.25),
                "",
            ),
            (
                "a scale of another domain",
                ("llama",),
                _of_one_domain("Scaler", offset=[0.0], scale=[1.0]),
                "",
            ),
        ),
    }.items()
    for name, forms, plant, cannot in kinds
)
