"""Recognise norms that were expanded into standard operators, by an inlined export or by an optimiser.

The definition of the operator is the pattern. A node matches when its operators, wiring, constants and epsilon are
those of the definition. Conversions between types make no difference, nor does the place of a transposition: ONNX
Runtime moves those of a norm over channels from before the norm into it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import torch
from torch import Tensor

from ibnorm_export.op import onnx_functions
from ibnorm_export.op.spec import IBNormSpec
from ibnorm_export.op.torch_op import IBNorm
from ibnorm_export.verifier.static.dataflow import DataFlow, FlowNode

__all__ = ["InlinedNorms"]

#: Operators that leave the value as it is.
_CONVERSIONS: Final = frozenset({"Cast", "CastLike", "Identity"})

#: The value of a wide norm's definition that says how many values it adds up at a time. Any number computes the same.
_BLOCK: Final = "block"

_COMMUTATIVE: Final = frozenset({"Add", "Mul", "Max"})

#: Operators of the definitions that compute each value by itself, so that a transposition can come before or after.
_ELEMENTWISE: Final = _COMMUTATIVE | {"Sub", "Div", "Abs", "Log", "Tanh"}


@dataclass(frozen=True, slots=True)
class _Value:
    """A value of the file, and the order of axes that makes it a value of the definition; empty is its own order."""

    name: str
    axes: tuple[int, ...] = ()

    def before(self, transpose: FlowNode) -> _Value:
        """The input of the Transpose that computes this value."""
        order = next(tuple(a.ints) for a in transpose.proto.attribute if a.name == "perm")
        axes = tuple(order[axis] for axis in self.axes) if self.axes else order
        return _Value(transpose.inputs[0], () if axes == tuple(range(len(axes))) else axes)


@dataclass(frozen=True, slots=True)
class _Found:
    """One norm that was recognised.

    Args:
        op_type: its compression.
        lambd: its lambda.
        epsilon: its epsilon.
        scale: name of its scale.
        bias: name of its bias.
        block: how many values a wide norm adds up at a time; 0 for others.
        values: names of all values that its definition computes.
    """

    op_type: str
    lambd: float
    _: KW_ONLY
    epsilon: float
    scale: str
    bias: str
    block: int = 0
    values: frozenset[str] = frozenset()


class InlinedNorms:
    """The norms of a file that do not have their own node.

    Args:
        flow: the data flow of the file.
        specs: the specs to look for.
        holds: (name of a constant of the file, tensor) -> whether it has the value of the tensor.
    """

    def __init__(self, flow: DataFlow, specs: set[IBNormSpec], *, holds: Callable[[str, Tensor], bool]) -> None:
        self._flow = flow
        self._specs = specs
        self._holds = holds
        self._taken: set[int] = set()

    @cached_property
    def block_sizes(self) -> frozenset[int]:
        """How many values the wide norms of the file add up at a time."""
        return frozenset(found.block for found in self._found if found.block)

    @cached_property
    def values(self) -> frozenset[str]:
        """Names of all values that norms compute which are written out."""
        return frozenset().union(*(found.values for found in self._found))

    @property
    def recognised(self) -> int:
        """How many norms of the checkpoint were recognised so far."""
        return len(self._taken)

    @cached_property
    def _found(self) -> tuple[_Found, ...]:
        opset = self._flow.exported.opset
        wide = [(s.op_type, 2 * onnx_functions.NARROW) for s in self._specs]
        definitions = (onnx_functions.functions(opset), onnx_functions.functions(opset, wide))
        values = {(s.op_type, s.attributes()["lambd"], s.attributes()["epsilon"]) for s in self._specs}
        patterns = [
            _Pattern(bodies[op_type], self._flow, lambd=lambd, epsilon=epsilon)
            for bodies in definitions
            for op_type, lambd, epsilon in sorted(values)
        ]
        return tuple(found for node in self._flow.nodes for p in patterns if (found := p.match(node)) is not None)

    def take(self, norm: IBNorm, *, count: int) -> bool:
        """Find a norm of the checkpoint that runs `count` times; what is found counts for no other norm."""
        matching = [
            index for index, found in enumerate(self._found) if index not in self._taken and self._is(norm, found)
        ]
        self._taken.update(matching[:count])
        return len(matching) >= count

    def _is(self, norm: IBNorm, found: _Found) -> bool:
        attributes = norm.spec.attributes()
        if (found.op_type, found.lambd, found.epsilon) != (
            norm.spec.op_type,
            attributes["lambd"],
            attributes["epsilon"],
        ):
            return False
        own = ((found.scale, norm.weight, torch.ones), (found.bias, norm.bias, torch.zeros))
        for name, parameter, constant in own:
            if norm.node_has_affine and parameter is not None:
                same = self._holds(name, parameter)
            else:  # over several axes, the node is as wide as they are
                array = self._flow.value(name)
                same = array is not None and self._holds(name, constant(array.size))
            if not same:
                return False
        return True


class _Pattern:
    """The definition of one operator with its numbers filled in."""

    def __init__(self, body: onnx.FunctionProto, flow: DataFlow, *, lambd: Any, epsilon: Any) -> None:
        self._body = body
        self._flow = flow
        self._numbers = {"lambd": float(lambd), "epsilon": float(epsilon)}
        self._producers = {name: node for node in body.node for name in node.output}
        self._last = self._producers[self._skip_conversions(body.output[0])]

    def match(self, node: FlowNode) -> _Found | None:
        """Match the definition with the computation that ends in a node."""
        if (node.proto.op_type, node.proto.domain) != (self._last.op_type, ""):
            return None
        bound = self._match_node(self._last, node, bound={}, axes=())
        if bound is None:
            return None
        numbers = self._numbers
        block = self._flow.value(bound[_BLOCK].name) if _BLOCK in bound else None
        return _Found(
            self._body.name,
            numbers["lambd"],
            epsilon=numbers["epsilon"],
            scale=bound["scale"].name,
            bias=bound["bias"].name,
            block=0 if block is None else int(block.item()),
            values=frozenset(value.name for name, value in bound.items() if name in self._producers),
        )

    def _skip_conversions(self, name: str) -> str:
        while (node := self._producers.get(name)) is not None and node.op_type in _CONVERSIONS:
            name = node.input[0]
        return name

    def _match(self, wanted: str, value: _Value, *, bound: Mapping[str, _Value]) -> dict[str, _Value] | None:
        """Match one value; returns what the inputs of the definition stand for, or None."""
        wanted, value = self._skip_conversions(wanted), _source(self._flow, value)
        if wanted in self._body.input:
            fits = wanted == self._body.input[0] or self._is_along_last(value)
            return {**bound, wanted: value} if fits and bound.get(wanted, value) == value else None
        producer, node = self._producers[wanted], self._flow.producer(value.name)
        if wanted == _BLOCK:
            same = bound.get(wanted, value) == value and self._is_size(value.name)
            return {**bound, wanted: value} if same else None
        if producer.op_type == "Constant":
            return dict(bound) if self._is_constant(producer, value.name) else None
        if node is None or (producer.op_type, producer.domain) != (node.proto.op_type, node.proto.domain):
            return None
        return self._match_node(producer, node, bound=bound, axes=value.axes)

    def _is_along_last(self, value: _Value) -> bool:
        """Whether a scale or a bias varies only along the axis that the definition has last."""
        array = self._flow.value(value.name) if self._flow.is_constant(value.name) else None
        if array is None:
            return False
        rank = len(value.axes) or array.ndim
        last = value.axes[-1] if value.axes else rank - 1
        varied = [axis for axis, size in enumerate(array.shape, rank - array.ndim) if size > 1]
        return varied in ([], [last])

    def _match_node(
        self, wanted: onnx.NodeProto, node: FlowNode, *, bound: Mapping[str, _Value], axes: tuple[int, ...]
    ) -> dict[str, _Value] | None:
        """Match a node whose output is a value of the definition when its axes are put in the order `axes`."""
        inputs = [name for name in node.inputs if name]
        if len(inputs) != len(wanted.input) or not self._same_epsilon(wanted, node.proto):
            return None
        if axes and wanted.op_type == "ReduceMean":
            mean = self._match_mean(wanted, inputs, bound=bound, axes=axes)
            return None if mean is None else {**mean, wanted.output[0]: _Value(node.outputs[0])}
        if axes and wanted.op_type not in _ELEMENTWISE:
            return None
        orders = [inputs, inputs[::-1]] if wanted.op_type in _COMMUTATIVE else [inputs]
        for order in orders:
            found: dict[str, _Value] | None = dict(bound)
            for value, name in zip(wanted.input, order, strict=True):
                found = None if found is None else self._match(value, _Value(name, axes), bound=found)
            if found is not None:
                return {**found, wanted.output[0]: _Value(node.outputs[0])}
        return None

    def _match_mean(
        self, wanted: onnx.NodeProto, inputs: list[str], *, bound: Mapping[str, _Value], axes: tuple[int, ...]
    ) -> dict[str, _Value] | None:
        """Match a mean over the axis that the definition has last."""
        over = self._flow.value(inputs[1]) if self._flow.is_constant(inputs[1]) else None
        if over is None or over.size != 1 or over.item() % len(axes) != axes[-1]:
            return None
        return self._match(wanted.input[0], _Value(inputs[0], axes), bound=bound)

    def _same_epsilon(self, wanted: onnx.NodeProto, node: onnx.NodeProto) -> bool:
        if not any(a.name == "epsilon" for a in wanted.attribute):
            return True
        given = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
        return bool(np.float32(given) == np.float32(self._numbers["epsilon"]))

    def _is_size(self, name: str) -> bool:
        array = self._flow.value(name) if self._flow.is_constant(name) else None
        return array is not None and array.size == 1 and array.item() >= 1

    def _is_constant(self, wanted: onnx.NodeProto, name: str) -> bool:
        array = self._flow.value(name) if self._flow.is_constant(name) else None
        if array is None:
            return False
        (attribute,) = wanted.attribute
        value = self._numbers.get(attribute.ref_attr_name)
        if value is None:
            value = onnx.helper.get_attribute_value(attribute)
        expected = onnx.numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value
        return bool(np.array_equal(np.asarray(array, np.float32).ravel(), np.asarray(expected, np.float32).ravel()))


def _source(flow: DataFlow, value: _Value) -> _Value:
    """The value before conversions between types and transpositions; a constant stays as it is."""
    while (node := flow.producer(value.name)) is not None and not flow.is_constant(value.name):
        if node.proto.domain != "":
            break
        if node.proto.op_type in _CONVERSIONS:
            value = _Value(node.inputs[0], value.axes)
        elif node.proto.op_type == "Transpose" and _is_order(node.proto, len(value.axes)):
            value = value.before(node)
        else:
            break
    return value


def _is_order(transpose: onnx.NodeProto, rank: int) -> bool:
    """Whether a Transpose names each axis of a value of this rank once; 0 is any rank."""
    order = next((list(a.ints) for a in transpose.attribute if a.name == "perm"), [])
    return bool(order) and sorted(order) == list(range(rank or len(order)))
