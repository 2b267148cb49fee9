"""Check that a file multiplies data only by factors that have an effect, and never adds a value to itself.

A factor with its inverse, or a product with zero, changes nothing until a value overflows, which no ordinary input
shows. An exporter writes neither, because PyTorch computes neither.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from ibnorm_export.findings.code import FindingCode
from ibnorm_export.verifier.checkpoint.operator_names import is_among
from ibnorm_export.verifier.report import Finding
from ibnorm_export.verifier.static.dataflow import DataFlow, FlowNode

__all__ = ["check_factors"]

#: Operators that leave each value as it is, at its place.
_SAME: Final = frozenset({"Identity", "Cast", "CastLike"})

#: Operators that put values in another shape or order.
_MOVING: Final = frozenset({"Reshape", "Unsqueeze", "Squeeze", "Flatten", "Transpose", "Expand"})

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
    known: dict[str, _Multiple] = {}
    squares = squares or any(is_among(part, words) for part in _SQUARING)
    multiples = any(is_among(part, words) for part in _OWN_MULTIPLES)
    for node in flow.nodes:
        kind, data = node.proto.op_type, [name for name in node.inputs if name in floating]
        if node.proto.domain not in ("", "ai.onnx") or not data:
            continue
        sources = [known.get(name, _Multiple(name)) for name in data]
        problem = ""
        if kind in _SAME:
            known[node.outputs[0]] = sources[0]
        elif kind in _MOVING:
            known[node.outputs[0]] = replace(sources[0], source=node.outputs[0])
        elif kind == "Neg":
            known[node.outputs[0]] = _Multiple(sources[0].source, -sources[0].factor, sources[0].length)
        elif len(data) == 1 and kind in ("Mul", "Div") and (number := _number(flow, node)) is not None:
            made = _times(sources[0], number)
            known[node.outputs[0]] = made
            problem = _factor_problem(number, made)
        elif len(data) > 1 and len({source.source for source in sources}) == 1:
            if kind in _ADDING and not multiples:
                problem = "adds a value to itself, or to a multiple of itself"
            elif kind == "Mul" and not squares:
                problem = "multiplies a value by itself, or by a multiple of itself"
        if problem:
            what = f"the {node} {problem}, which PyTorch does not for this checkpoint"
            yield Finding("operators", what, code=FindingCode.OPERATOR_UNKNOWN)


def _number(flow: DataFlow, node: FlowNode) -> float | None:
    """What a Mul or a Div multiplies data by, if that is one number; a weight is not."""
    position = next((i for i, name in enumerate(node.inputs) if flow.is_constant(name)), None)
    if position is None or (node.proto.op_type == "Div" and position == 0) or flow.is_large(node.inputs[position]):
        return None
    array = flow.value(node.inputs[position])
    if array is None or array.size != 1:
        return None
    number = float(np.asarray(array, np.float64).reshape(()))
    return number if node.proto.op_type == "Mul" else 1.0 / number if number else np.inf


def _times(value: _Multiple, number: float) -> _Multiple:
    """A multiple of a multiple; a factor of 1 or -1 does not count."""
    return _Multiple(value.source, value.factor * number, value.length + (abs(number) != 1.0))


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
