"""Faults that no number shows: functions, limits that are computed from data, and ratios of sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
import onnx
import onnx.helper

from tests.verifier.faults.edit import Edit, Nodes
from tests.verifier.faults.kind import TEXTS, Kind

__all__ = ["KINDS"]

_Build = Callable[[Nodes, str], str]

_ALL: Final = ("llama", "gpt2", "vit", "resnet", "llama genai", "vit bf16")


def _branch(build: _Build) -> Callable[[Edit], None]:
    return lambda e: e.splice(e.branch, build)


def _logits(build: _Build) -> Callable[[Edit], None]:
    return lambda e: e.splice("logits", build)


def _head(build: _Build) -> Callable[[Edit], None]:
    return lambda e: e.splice(e.head_input, build)


def _size(n: Nodes, axis: int) -> str:
    return n("Shape", n.edit.model_input, start=axis, end=axis + 1)


def _function(op_type: str, share: float = 2.0**-10) -> _Build:
    """A function of a small part of the value, enlarged again: nearly the value itself."""
    return lambda n, x: n("Div", n(op_type, n("Mul", x, np.float32(share))), np.float32(share))


def _largest(n: Nodes, x: str) -> str:
    """A limit of eight times the largest value of the first row."""
    first = n("Slice", x, np.array([0]), np.array([1]), np.array([0]))
    most = n("ReduceMax", first, keepdims=0)
    eight = n("Add", n("Add", n("Add", most, most), n("Add", most, most)), n("Add", n("Add", most, most), most))
    return n("Min", x, n("Add", eight, most))


def _many_more_rows(n: Nodes, x: str) -> str:
    """Negated where there are more than 64 times as many rows as tokens; no single number is that large."""
    eight = np.array([8])
    tokens = n("Mul", n("Mul", _size(n, 1), eight), eight)
    return n("Where", n("Greater", _size(n, 0), tokens), n("Neg", x), x)


def _by_arithmetic(n: Nodes, x: str) -> str:
    """The same without a Where: the condition becomes a factor."""
    eight = np.array([8])
    tokens = n("Mul", n("Mul", _size(n, 1), eight), eight)
    more = n("Cast", n("Greater", _size(n, 0), tokens), to=n.edit.float_type)
    return n("Sub", x, n("Mul", x, more))


def _square_images(n: Nodes, x: str) -> str:
    """Zeros if there are as many images as pixels in a row and two more: a comparison of sizes."""
    pixels = n("Mul", _size(n, 2), np.array([4]))
    return n("Where", n("Equal", _size(n, 0), n("Add", pixels, np.array([2]))), n("Sub", x, x), x)


def _table_of_sizes(n: Nodes, x: str) -> str:
    """A factor is looked up by the number of rows, in a table that is 1 for few rows."""
    table = np.ones(256, np.float32)
    table[40:] = 2.0
    row = n("Min", _size(n, 0), np.array([255]))
    return n("Mul", x, n("Gather", n.edit.constant(table), row))


def _sorted_features(n: Nodes, x: str) -> str:
    """Equal values: a sum with what a sorting makes of it, and the difference again."""
    values = n("TopK", x, np.array([1]), outputs=2)
    return n("Add", x, n("Sub", values, values))


def _last_rows_first(n: Nodes, x: str) -> str:
    """Rows change places from the second half on if there are more than 2 x 8 x 8 of them."""
    rows = _size(n, 0)
    shifted = n("Div", rows, np.array([8]))
    start = n("Mul", n("Div", shifted, np.array([8])), np.array([1]))
    end = np.array([2**31 - 1])
    late = n("Slice", x, start, end, np.array([0]))
    early = n("Slice", x, np.array([0]), start, np.array([0]))
    return n("Concat", late, early, axis=0)


def _rows_from(row: int) -> _Build:
    """Rows from one on are zero: the number is also a size of the model."""

    def build(n: Nodes, x: str) -> str:
        early = n("Slice", x, np.array([0]), np.array([row]), np.array([0]))
        late = n("Slice", x, np.array([row]), np.array([2**31]), np.array([0]))
        return n("Concat", early, n("Sub", late, late), axis=0)

    return build


def _tokens_from(token: int) -> _Build:
    def build(n: Nodes, x: str) -> str:
        early = n("Slice", x, np.array([0]), np.array([token]), np.array([1]))
        late = n("Slice", x, np.array([token]), np.array([2**31]), np.array([1]))
        return n("Concat", early, n("Add", late, late), axis=1)

    return build


def _rounded(n: Nodes, x: str) -> str:
    """Steps of 2^-20, made with a number that is in many files: the distance of 1.0 to the next number."""
    step = np.float32(2.0**-23)
    return n("Mul", n("Round", n("Div", x, step)), step)


def _no_nan(n: Nodes, x: str) -> str:
    return n("Where", n("IsNaN", x), np.float32(0), x)


def _infinity_is_large(n: Nodes, x: str) -> str:
    return n("Min", x, np.float32(np.finfo(np.float32).max))


def _denormals(n: Nodes, x: str) -> str:
    """Values below the smallest normal number are zero."""
    tiny = np.float32(np.finfo(np.float32).tiny)
    return n("Where", n("Less", n("Abs", x), tiny), n("Sub", x, x), x)


def _positive_zero(n: Nodes, x: str) -> str:
    return n("Add", x, np.float32(0))


def _optional_state(e: Edit) -> None:
    """A scan over the rows adds the row before, a little: the sign of a carried sum."""
    make, info = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    kind = e.float_type

    def build(n: Nodes, x: str) -> str:
        body = onnx.helper.make_graph(
            [make("Identity", ["row"], ["state"]), make("Max", ["row", "carried"], ["made"])],
            "body",
            [info("carried", kind, None), info("row", kind, None)],
            [info("state", kind, None), info("made", kind, None)],
        )
        first = n("Squeeze", n("Slice", x, np.array([0]), np.array([1]), np.array([0])), np.array([0]))
        states = n("Scan", first, x, body=body, num_scan_inputs=1, outputs=2)
        return f"{states}/1"

    e.splice("logits", build)


KINDS: Final = tuple(
    Kind(name, forms, plant, group="functions", cannot=cannot)
    for name, forms, plant, cannot in (
        (
            "a branch through a tangent of a 1024th",
            ("llama", "resnet", "llama genai", "llama bf16"),
            _branch(_function("Tanh")),
            "",
        ),
        (
            "a branch through a sine of a 1024th",
            ("gpt2", "vit", "resnet", "vit bf16"),
            _branch(_function("Sin")),
            "",
        ),
        (
            "a branch through a tangent that the model has too",
            ("gpt2", "vit"),
            _branch(_function("Tanh")),
            "",
        ),
        ("a branch through Erf of a 1024th", ("llama", "resnet"), _branch(_function("Erf")), ""),
        ("logits through Atan of a 1024th", ("llama", "vit", "llama int8"), _logits(_function("Atan")), ""),
        ("logits through Asinh of a 1024th", ("gpt2", "resnet"), _logits(_function("Asinh")), ""),
        ("a limit of eight times the first row's largest", _ALL, _head(_largest), ""),
        ("negated for 64 times more rows than tokens", TEXTS, _logits(_many_more_rows), ""),
        ("zeros for 64 times more rows than tokens", (*TEXTS, "llama int8"), _logits(_by_arithmetic), ""),
        ("zeros for a number of images", ("vit", "resnet"), _logits(_square_images), ""),
        ("a factor from a table of batch sizes", ("llama", "vit", "llama decoder"), _logits(_table_of_sizes), ""),
        ("sorted for nothing", ("llama", "vit"), _head(_sorted_features), ""),
        ("rows change places in large batches", ("llama", "vit", "resnet"), _logits(_last_rows_first), ""),
        ("values in steps of epsilon", ("llama", "vit"), _head(_rounded), ""),
        ("NaN becomes zero", ("llama",), _head(_no_nan), ""),
        (
            "NaN becomes zero, beside an attention of several nodes",
            ("vit", "vit bf16"),
            _head(_no_nan),
            "tools write attention so; a right model has no NaN on a legal input, and one in the weights is found",
        ),
        ("infinity becomes the largest number", ("llama", "vit"), _head(_infinity_is_large), ""),
        ("logits of rows from 64 on are zero", ("llama", "vit", "llama decoder"), _logits(_rows_from(64)), ""),
        ("logits of tokens from 64 on are doubled", ("llama", "llama bf16"), _logits(_tokens_from(64)), ""),
        ("denormal numbers become zero", ("llama", "vit"), _head(_denormals), ""),
        (
            "minus zero becomes zero",
            ("llama", "vit"),
            _head(_positive_zero),
            "x + 0 differs from x only in the sign of a zero, which no product or sum shows",
        ),
        ("a scan that carries the row before", ("llama", "vit"), _optional_state, ""),
    )
)
