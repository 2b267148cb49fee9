"""Check that a file multiplies data only by factors that have an effect, and never adds a value to itself.

A factor with its inverse, or a product with zero, changes nothing until a value overflows, which no ordinary input
shows. An exporter writes neither, because PyTorch computes neither.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from ibnorm_export.findings.code import FindingCode
from ibnorm_export.verifier.checkpoint.operator_names import is_among
from ibnorm_export.verifier.report import Finding
from ibnorm_export.verifier.static.dataflow import RANDOM_OPERATORS, DataFlow, FlowNode

__all__ = ["check_factors"]

#: Operators that leave each value as it is, at its place; some of them only where they have one input.
_SAME: Final = frozenset({"Identity", "Cast", "CastLike"})
_SAME_OF_ONE: Final = frozenset({"Sum", "Mean", "Max", "Min", "Concat", "Split"})

#: Operators that put values in another shape, and leave their order.
_RESHAPING: Final = frozenset({"Reshape", "Unsqueeze", "Squeeze", "Flatten"})

#: Operators that repeat values, so that where the shape stays, the values do.
_RESIZING: Final = frozenset({"Expand", "Tile"})

#: Operators that put values at other places.
_MOVING: Final = _RESIZING | {"Transpose", "Slice", "Split", "Gather", "Concat", "Pad"}

#: Operators whose result is about as large whatever factor its input has, or that take weights, which may be any.
_RESETTING: Final = frozenset(
    {
        *("MatMul", "Gemm", "Conv", "Attention", "LayerNormalization", "RMSNormalization", "BatchNormalization"),
        *("Softmax", "LogSoftmax", "Log", "Tanh", "Erf", "Sigmoid", "HardSigmoid", "Sin", "Cos", "Sign"),
    }
)

#: Products with a weight, which take over a factor where they add no bias.
_LINEAR: Final = frozenset({"MatMul", "Gemm", "Conv"})

#: Operators that may multiply data by one number.
_SCALING: Final = frozenset({"Mul", "Div", "Einsum"})

#: Operators whose inputs may be exchanged.
_COMMUTATIVE: Final = frozenset({"Add", "Mul", "Max", "Min", "Sum", "Mean"})

#: Operators that add two values, and words in the names of PyTorch's operators that add a value to its multiple.
_ADDING: Final = frozenset({"Add", "Sub", "Sum"})
_OWN_MULTIPLES: Final = ("sub*", "rsub", "lerp")

#: Words in the names of PyTorch's operators that multiply a value by itself.
_SQUARING: Final = ("pow", "square", "gelu", "norm", "linalg*", "std*", "var*", "dist*", "cdist")

#: The most factors in a row: a scale that is split in two, and one number more.
_MOST_FACTORS: Final = 3

#: A factor of this size, or its reciprocal, makes ordinary values overflow, or vanish.
_EXTREME: Final = 1e30

#: How far the product of factors that cancel may be from 1.
_ROUNDING: Final = 1e-5


@dataclass(frozen=True, slots=True)
class _Multiple:
    """A value as a multiple of an earlier one: its name, the factor, and how many numbers the factor is made of."""

    source: str
    factor: float = 1.0
    length: int = 0


class _Multiples:
    """What each value is a multiple of. Values that are computed in the same way from the same are one.

    Args:
        flow: the data flow of the file.
    """

    def __init__(self, flow: DataFlow) -> None:
        self._flow = flow
        self._known: dict[str, _Multiple] = {}
        self._first: dict[tuple[object, ...], str] = {}

    def of(self, name: str) -> _Multiple:
        """The value as a multiple of another one; of itself if it is none."""
        return self._known.get(name) or _Multiple(name)

    def add(self, node: FlowNode, data: list[str]) -> _Multiple:
        """Take in what a node computes of data."""
        made = self._made(node, [self.of(name) for name in data])
        self._known[node.outputs[0]] = made
        for number, name in enumerate(node.outputs[1:], 1):
            self._known[name] = replace(made, source=f"{made.source} {number}")
        return made

    def _made(self, node: FlowNode, sources: list[_Multiple]) -> _Multiple:
        kind, first = node.proto.op_type, sources[0]
        if node.proto.domain not in ("", "ai.onnx"):
            return _Multiple(self._first_like(node))
        if self._is_same(node):
            return first
        if kind in ("Add", "Sub") and len(sources) == 1 and self._is_zero(node):
            negative = kind == "Sub" and self._flow.is_constant(node.inputs[0])
            return replace(first, factor=-first.factor) if negative else first
        if kind == "Neg":
            return replace(first, factor=-first.factor)
        if len(sources) == 1 and (number := _number(self._flow, node)) is not None:
            return _Multiple(first.source, first.factor * number, first.length + (abs(number) != 1.0))
        length = 0 if kind in _RESETTING else max(source.length for source in sources)
        linear = kind in _LINEAR and len(node.inputs) == 2
        if len(sources) == 1 and linear:  # a factor before a product and its inverse after it
            return replace(first, source=self._first_like(node, scaled=False), length=min(first.length, 1))
        multiplies = kind == "Mul" or (kind in _MOVING and len(sources) == 1)
        factor = math.prod(source.factor for source in sources) if multiplies else 1.0
        return _Multiple(self._first_like(node, scaled=not multiplies), factor, length)

    def _is_same(self, node: FlowNode) -> bool:
        """Whether a node leaves every value as it is, in the same order."""
        kind = node.proto.op_type
        if kind in _SAME_OF_ONE:
            return len(node.inputs) == len(node.outputs) == 1
        if kind in _RESIZING:
            before, after = (self._flow.shapes.get(names[0]) for names in (node.inputs, node.outputs))
            return before is not None and None not in before and before == after
        return kind in _SAME or kind in _RESHAPING

    def _is_zero(self, node: FlowNode) -> bool:
        """Whether a node adds zero to data, or subtracts one from the other."""
        name = next((name for name in node.inputs if self._flow.is_constant(name)), "")
        array = self._flow.value(name) if name and not self._flow.is_large(name) else None
        return array is not None and not np.asarray(array, np.float64).any()

    def _first_like(self, node: FlowNode, *, scaled: bool = True) -> str:
        """The first value that is computed as that of a node is, up to the factors of its inputs if not `scaled`."""
        given: list[object] = [
            (source.source, source.factor if scaled else 1.0) for source in (self.of(name) for name in node.inputs)
        ]
        if node.proto.op_type in _COMMUTATIVE:
            given.sort(key=str)
        attributes = tuple(sorted(attribute.SerializeToString() for attribute in node.proto.attribute))
        key = (node.proto.domain, node.proto.op_type, *given, attributes)
        return self._first.setdefault(key, node.outputs[0])


def check_factors(
    flow: DataFlow, floating: AbstractSet[str], *, words: AbstractSet[str], squares: bool = False
) -> Iterator[Finding]:
    """Find arithmetic of data that changes nothing but what overflows.

    Args:
        flow: the data flow of the file.
        floating: names of the values that are floating-point data.
        words: words in the names of PyTorch's operators that took floating-point data outside of norms.
        squares: whether norms that are written out multiply values by themselves.
    """
    multiples = _Multiples(flow)
    squares = squares or any(is_among(part, words) for part in _SQUARING)
    adds_own = any(is_among(part, words) for part in _OWN_MULTIPLES)
    for node in flow.nodes:
        kind, data = node.proto.op_type, [name for name in node.inputs if name in floating]
        if not data or node.proto.op_type in RANDOM_OPERATORS:
            continue
        sources = [multiples.of(name) for name in data]
        made = multiples.add(node, data)
        number = _number(flow, node) if len(data) == 1 and kind in _SCALING else None
        problem = "" if number is None else _factor_problem(number, made)
        if len(data) > 1 and len({source.source for source in sources}) == 1 and _of_one_shape(flow, data):
            if kind in _ADDING and not adds_own:
                problem = "adds a value to itself, or to a multiple of itself"
            elif kind == "Mul" and not squares:
                problem = "multiplies a value by itself, or by a multiple of itself"
        if problem:
            what = f"the {node} {problem}, which PyTorch does not for this checkpoint"
            yield Finding("operators", what, code=FindingCode.OPERATOR_UNKNOWN)


def _of_one_shape(flow: DataFlow, names: list[str]) -> bool:
    """Whether values may have one shape: a value and its reshaped copy may also be combined in pairs."""
    shapes = {flow.shapes[name] for name in names if name in flow.shapes}
    return len(shapes) < 2


def _number(flow: DataFlow, node: FlowNode) -> float | None:
    """What a node multiplies data by, if that is one number, or many times one; a weight is not."""
    position = next((i for i, name in enumerate(node.inputs) if flow.is_constant(name)), None)
    divides = node.proto.op_type == "Div"
    if position is None or node.proto.op_type not in _SCALING or (divides and position == 0):
        return None
    name = node.inputs[position]
    array = None if flow.is_large(name) else flow.value(name)
    if array is None or not array.size or bool((array != array.reshape(-1)[0]).any()):
        return None
    number = float(np.asarray(array.reshape(-1)[0], np.float64))
    if array.size > 1 and not 1.0 / _EXTREME < abs(number) < _EXTREME:  # a weight may be zero
        return None
    return 1.0 / number if divides and number else np.inf if divides else number


def _factor_problem(number: float, made: _Multiple) -> str:
    """What is wrong with a factor; empty if nothing is."""
    if number == 0.0:
        return "multiplies data by 0"
    if not 1.0 / _EXTREME < abs(number) < _EXTREME:
        return f"multiplies data by {number:.3g}"
    if made.length > 1 and abs(abs(made.factor) - 1.0) <= _ROUNDING:
        return "multiplies data by the inverse of the factors before it"
    if made.length > _MOST_FACTORS:
        return f"multiplies data by {made.length} numbers in turn"
    return ""
