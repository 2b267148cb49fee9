"""Check that a file computes with the numbers that PyTorch computes with: limits, factors, epsilons, branches.

Random inputs do not show a number that acts only beyond some length, batch or value. But one run of the checkpoint in
PyTorch uses all its numbers. A file has the same, or what an exporter derives: a reciprocal, a square root, a power.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, Final

import numpy as np
import onnx
import onnx.defs
import onnx.helper
import torch
from numpy.typing import NDArray

from ibnorm_export.artifacts.loaded_model import LoadedModel, torch_dtype
from ibnorm_export.artifacts.tensors import DType
from ibnorm_export.findings.code import FindingCode
from ibnorm_export.op.spec import DOMAIN
from ibnorm_export.verifier.checkpoint.coverage import Coverage
from ibnorm_export.verifier.report import Finding
from ibnorm_export.verifier.static.constants import SHAPE_INPUTS
from ibnorm_export.verifier.static.dataflow import RANDOM_OPERATORS, DataFlow, FlowNode

__all__ = ["BRANCHES", "check_numbers_used"]

#: Operators that compare a value with a number, limit it, or choose.
_LIMITS: Final = frozenset(
    {"Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Equal", "Clip", "Min", "Max", "Mod", "Where", "Shrink"}
)

#: Operators that change single bits of integers, and so limit them.
_BITS: Final = frozenset({"BitwiseAnd", "BitwiseOr", "BitwiseXor", "BitShift"})

#: Operators that compute with a floating-point number.
_ARITHMETIC: Final = frozenset({"Add", "Sub", "Mul", "Div", "Pow", "Sum", "Mean", "PRelu"})

#: Positions of inputs that select, shift or place values along an axis, by op type.
_PLACES: Final = {
    "Slice": (1, 2),
    "Gather": (1,),
    "GatherElements": (1,),
    "GatherND": (1,),
    "ScatterElements": (1,),
    "ScatterND": (1,),
    "Trilu": (1,),
    "Range": (0, 1, 2),
    "SequenceAt": (1,),
    "Pad": (1,),
    "Add": (0, 1),
    "Sub": (0, 1),
    "Mul": (0, 1),
    "Div": (0, 1),
}

#: Places up to this one are in every sample, so a wrong one shows; and axes are among them.
_NEAR: Final = 8

#: Operators that branch or loop.
BRANCHES: Final = frozenset({"If", "Loop", "Scan", "SequenceMap"})

#: Operators that limit a value on one side or both, whatever it is.
_BOUNDS: Final = frozenset({"Clip", "Min", "Max"})

#: PyTorch's operators that become a branch or a loop in a file.
_BRANCHING: Final = frozenset({"cond", "while_loop", "scan", "map", "associative_scan"})

#: Numbers of the definitions of activations, which PyTorch computes inside one operator: GELU (0.5, 1, sqrt(2),
#: sqrt(2/pi), 0.044715, 3; 1.702 in its sigmoid form), HardSwish (3, 6, 1/6), Mish, Softplus (20), SELU, and squares.
_DEFINITIONS: Final = (
    *(0.0, 0.5, 1.0, 2.0, 3.0, 6.0, 20.0, math.pi, math.e, 1.702, 0.044715, math.sqrt(2), math.sqrt(2 / math.pi)),
    *(1.6732632423543772, 1.0507009873554805, 1.0 + 2.0**-23, 0.01, 0.2),
)

#: Numbers that bound no value or every value: signs, empty and unlimited ranges.
_ANY_BOUND: Final = (0.0, 1.0, math.inf, float(2**63 - 1), float(2**31 - 1))

#: Numbers that a comparison may have in any file; and those of its own type, which masks consist of.
_ANY_LIMIT: Final = (
    *_ANY_BOUND,
    1.0 + 2.0**-23,
)

#: The longest side of a patch or kernel of an image, whose square is a number of values.
_LARGEST_PATCH: Final = 64

#: Attributes that are numbers without an effect on the result.
_IDLE: Final = frozenset({"momentum", "seed", "ratio"})


def check_numbers_used(
    flow: DataFlow, model: LoadedModel, *, coverage: Coverage, block_sizes: frozenset[int] = frozenset()
) -> Iterator[Finding]:
    """Find numbers and branches of the file that the checkpoint does not have.

    Args:
        flow: the data flow of the file.
        model: the checkpoint.
        coverage: the numbers and operators of one run of it.
        block_sizes: how many values the wide norms of the file add up at a time.
    """
    numbers = _Numbers(flow.exported.dtype, model, coverage)
    # An exporter may write out an operator of any code with its own numbers, e.g. n - 1 in a standard deviation.
    # They act on every value, so a wrong one shows in the results.
    skips_arithmetic = model.original is not None or model.family == "timm"
    for node in flow.nodes:
        if node.proto.domain == DOMAIN or all(flow.is_constant(name) for name in node.outputs if name):
            continue
        yield from _behaviour_problems(flow, node, coverage=coverage)
        inputs = () if skips_arithmetic and node.proto.op_type in _ARITHMETIC else _input_numbers(flow, node)
        yield from _number_problems(node, inputs, numbers=numbers)
        for what, place in _places(flow, node):
            if place not in block_sizes and not numbers.explains_place(place):
                yield Finding(
                    f"position {place}",
                    f"{what} of the {node}; PyTorch has no such position or size",
                    code=FindingCode.POSITION_UNKNOWN,
                )


def _behaviour_problems(flow: DataFlow, node: FlowNode, *, coverage: Coverage) -> Iterator[Finding]:
    """A node that branches, draws random numbers or trains, if PyTorch does not."""
    operator, where = node.proto.op_type, str(node)
    if operator in BRANCHES and not _BRANCHING & coverage.operators:
        what = "the file branches or loops, which PyTorch does not for this checkpoint"
        yield Finding(where, what, code=FindingCode.BRANCHES)
    if _drops(flow, node):
        what = "the file drops values at random, which PyTorch does not for this checkpoint"
        yield Finding(where, what, code=FindingCode.DROPOUT)
    if operator in RANDOM_OPERATORS and not any("rand" in name for name in coverage.operators):
        what = "the file draws random numbers, which PyTorch does not for this checkpoint"
        yield Finding(where, what, code=FindingCode.RANDOM_NUMBERS)
    if _trains(node):
        what = "takes statistics of the batch, as in training, which PyTorch does not for this checkpoint"
        yield Finding(where, what, code=FindingCode.OPERATOR_UNKNOWN)


def _number_problems(node: FlowNode, inputs: Iterable[tuple[str, float]], *, numbers: _Numbers) -> Iterator[Finding]:
    """Numbers among the attributes of a node, and its inputs that are one number, that PyTorch does not have."""
    limited = [("attribute activation_params", number) for number in _activation_limits(node)]
    unknown = [(what, n) for what, n in (*_attribute_numbers(node), *inputs) if not numbers.explains(node, n)]
    unknown += [(what, n) for what, n in limited if not numbers.limits(n)]
    for what, number in unknown:
        yield Finding(
            f"number {number:.6g}",
            f"{what} of the {node}; PyTorch has no such number",
            code=FindingCode.NUMBER_UNKNOWN,
        )
    window = next((a.i for a in node.proto.attribute if a.name == "local_window_size"), -1)
    if window >= 0 and not numbers.explains_window(window):
        yield Finding(
            f"window {window}",
            f"attention of the {node} is limited to it; PyTorch's is not",
            code=FindingCode.WINDOW_UNKNOWN,
        )


class _Numbers:
    """The numbers that a right file may have."""

    def __init__(self, dtype: DType, model: LoadedModel, coverage: Coverage) -> None:
        kind = torch.finfo(torch_dtype(dtype))
        # A number was rounded to the file's dtype: by half a step at most, which is half of epsilon near a power of 2.
        self._tolerance = max(2e-6, 0.55 * kind.eps if dtype is not DType.FP32 else 0.0)
        specs = list(model.norms.values())
        used = {*coverage.numbers, *(s.lambd for s in specs), *(s.epsilon for s in specs), *_sizes(model)}
        used |= {spec.lambd**2 * spec.epsilon for spec in specs}
        if model.replaced_norms or {"var", "var_mean", "std", "std_mean"} & coverage.operators:
            used |= {size / (size - 1) for size in _sizes(model) if size > 1}  # the factor of an unbiased variance
            used |= {size - 1 for size in _sizes(model)}  # its divisor
        wide = (torch_dtype(dtype), torch.float32, torch.float64)
        own = {float(number) for k in map(torch.finfo, wide) for number in (k.max, k.tiny, k.eps)}
        limits = {3.0, 6.0} if {"hardswish", "hardsigmoid", "relu6"} & coverage.operators else set()
        known = {*limits, *coverage.limits, *(s.lambd for s in specs)}
        self._limits = _sorted({*_ANY_LIMIT, *own, *known})
        self._equals = _sorted({*_ANY_LIMIT, *own, *known, *coverage.equals})
        self._bounds = _sorted({*_ANY_BOUND, kind.max, kind.tiny, kind.eps, *known})
        # A number may have been derived from others after these were rounded.
        rounded = {float(torch.tensor(n, dtype=torch_dtype(dtype))) for n in (*used, *_DEFINITIONS)}
        self._factors = _sorted({*_ANY_LIMIT, *own, *_DEFINITIONS, *_derived({*used, *rounded})})

        places = {
            int(number) for number in (*used, *coverage.places) if math.isfinite(number) and number == int(number)
        }
        self._windows = {*coverage.numbers, getattr(getattr(model.module, "config", None), "sliding_window", None)}
        places |= _integers(getattr(model.module, "config", None))
        self._places = {abs(shifted) for place in places for shifted in (place - 1, place, place + 1, place // 2)}
        self._places |= {size * size for size in places if size <= _LARGEST_PATCH}

    def explains_window(self, window: int) -> bool:
        """Whether PyTorch limits attention to this number of tokens."""
        return window in self._windows

    def explains_place(self, place: int) -> bool:
        """Whether an index, offset or size is one of PyTorch's, or is without a limit."""
        return abs(place) <= _NEAR or abs(place) >= 2**31 - 1 or abs(place) in self._places

    def explains(self, node: FlowNode, number: float) -> bool:
        """Whether a number is one of PyTorch's, whatever its sign."""
        kind = node.proto.op_type
        if kind == "Equal":
            known = self._equals
        else:
            known = self._bounds if kind in _BOUNDS else self._limits if kind in _LIMITS | _BITS else self._factors
        return self._is_among(number, known)

    def limits(self, number: float) -> bool:
        """Whether PyTorch limits values to a number, whatever its sign."""
        return self._is_among(number, self._bounds)

    def _is_among(self, number: float, known: NDArray[np.float64]) -> bool:
        size = abs(number)
        if math.isnan(size) or size in (0.0, math.inf):
            return True
        position = int(np.searchsorted(known, size))
        near = known[max(0, position - 1) : position + 1]
        return bool((np.abs(near - size) <= self._tolerance * size).any())


def _integers(config: Any) -> set[int]:
    """All integers of a configuration."""
    waiting, found = [config.to_dict() if hasattr(config, "to_dict") else {}], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, (list, tuple)):
            waiting += value
        elif isinstance(value, int) and not isinstance(value, bool):
            found.add(value)
    return found


def _sorted(numbers: Iterable[float]) -> NDArray[np.float64]:
    return np.unique(np.abs([number for number in numbers if math.isfinite(number)]))


def _derived(numbers: Iterable[float]) -> Iterator[float]:
    """Numbers, and what decompositions of operators make of them; a scale may be split between two factors."""
    for number in {abs(number) for number in numbers if number and math.isfinite(number)}:
        yield from (number, 1 / number, number * number, math.sqrt(number))
        yield from (1 / math.sqrt(number), number**0.25, number**-0.25, 1 / (number * number))


def _sizes(model: LoadedModel) -> set[float]:
    """Sizes of weights, from which means and the scale of attention follow; and those of a head."""
    sizes = {float(size) for tensor in model.module.state_dict().values() for size in tensor.shape}
    config: Any = getattr(model.module, "config", None)
    heads = getattr(config, "num_attention_heads", None)
    hidden = getattr(config, "hidden_size", None)
    head = getattr(config, "head_dim", None)
    if isinstance(head, int):
        sizes.add(float(head))
    if isinstance(heads, int) and isinstance(hidden, int) and heads:
        sizes.add(hidden / heads)
    return sizes


def _attribute_numbers(node: FlowNode) -> Iterator[tuple[str, float]]:
    """Floating-point attributes that differ from the operator's default."""
    if node.proto.op_type in ("Constant", "ConstantOfShape"):
        return
    defaults = {}
    if node.proto.domain in ("", "ai.onnx") and onnx.defs.has(node.proto.op_type):
        schema = onnx.defs.get_schema(node.proto.op_type)
        defaults = {name: a.default_value.f for name, a in schema.attributes.items()}
    for attribute in node.proto.attribute:
        name = attribute.name
        if attribute.type == onnx.AttributeProto.FLOAT and name not in _IDLE and attribute.f != defaults.get(name):
            yield f"attribute {name}", attribute.f


def _activation_limits(node: FlowNode) -> Iterator[float]:
    """What a fused operator of ONNX Runtime limits its result to."""
    activation = next((a.s for a in node.proto.attribute if a.name == "activation"), b"")
    if activation == b"Clip":
        yield from (n for a in node.proto.attribute if a.name == "activation_params" for n in a.floats)


def _trains(node: FlowNode) -> bool:
    return any(a.name == "training_mode" and a.i for a in node.proto.attribute)


def _input_numbers(flow: DataFlow, node: FlowNode) -> Iterator[tuple[str, float]]:
    """Inputs that are one number, or many times one number."""
    kind = node.proto.op_type
    if node.proto.domain not in ("", "ai.onnx"):
        return
    for position, name in enumerate(node.inputs):
        array = flow.value(name) if name and flow.is_constant(name) and not flow.is_large(name) else None
        if array is None or not array.size or array.dtype == np.bool_ or position in SHAPE_INPUTS.get(kind, ()):
            continue
        floating = not np.issubdtype(array.dtype, np.integer)
        values = np.unique(np.asarray(array, dtype=np.float64))
        if len(values) == 1 and (floating or kind in _LIMITS | _BITS):
            yield f"input {position}", float(values[0])


def _drops(flow: DataFlow, node: FlowNode) -> bool:
    """Whether a Dropout may be active."""
    if node.proto.op_type != "Dropout" or len(node.inputs) < 3 or not node.inputs[2]:
        return False
    active = flow.value(node.inputs[2]) if flow.is_constant(node.inputs[2]) else None
    return active is None or bool(active.any())


def _places(flow: DataFlow, node: FlowNode) -> Iterator[tuple[str, int]]:
    """Integers that select, shift or place values along an axis."""
    if node.proto.domain not in ("", "ai.onnx"):
        return
    for position in _PLACES.get(node.proto.op_type, ()):
        name = node.inputs[position] if position < len(node.inputs) else ""
        array = flow.value(name) if name and flow.is_constant(name) and not flow.is_large(name) else None
        if array is not None and np.issubdtype(array.dtype, np.integer) and array.size <= _NEAR:
            yield from ((f"input {position}", int(place)) for place in array.reshape(-1))
