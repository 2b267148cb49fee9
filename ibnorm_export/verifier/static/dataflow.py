"""What the outputs of a file depend on: nodes and constants that are reached from them, through subgraphs too.

A value that depends on no input is constant, whether it is stored or computed by nodes. Only the last constant before
the data counts: a weight that goes through a Transpose, Cast or Mul is judged by what comes out. So a file is judged
alike before and after a tool has folded its constants.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
import onnx
import onnx.checker
import onnx.defs
import onnx.helper
import onnx.inliner
import onnx.numpy_helper
import onnx.reference
import onnx.shape_inference
from numpy.typing import NDArray

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.onnx_file import read_tensor
from ibnorm_export.errors import ModelFileError, quoted
from ibnorm_export.op.spec import DOMAIN

__all__ = ["FLOAT_TYPES", "RANDOM_OPERATORS", "WHOLE_TYPES", "ConstantUse", "DataFlow", "FlowNode", "light_model"]

#: Element types of floating-point data, and of numbers such as ids and positions.
FLOAT_TYPES: Final = (
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.FLOAT16,
    onnx.TensorProto.BFLOAT16,
    onnx.TensorProto.DOUBLE,
)
WHOLE_TYPES: Final = (
    *(onnx.TensorProto.INT8, onnx.TensorProto.INT16, onnx.TensorProto.INT32, onnx.TensorProto.INT64),
    *(onnx.TensorProto.UINT8, onnx.TensorProto.UINT16, onnx.TensorProto.UINT32, onnx.TensorProto.UINT64),
)

#: Operators whose result differs from run to run.
RANDOM_OPERATORS: Final = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial"}
)


#: Most values of a sparse initializer that are written out.
_LARGEST_SPARSE: Final = 1 << 28

#: Initializers up to this size can be shapes or axes, whose values decide types and shapes; others keep only theirs.
_SMALL_BYTES: Final = 4096

#: Number of values from which a constant is taken for a weight without a look at it.
_LARGE: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class FlowNode:
    """One node. Names of values are unique in the file: those of subgraphs are qualified.

    Args:
        proto: the node.
        inputs: names of its inputs; "" for one that is left out.
        outputs: names of its outputs.
        captured: names of the results of its subgraphs.
    """

    proto: onnx.NodeProto
    inputs: tuple[str, ...]
    _: KW_ONLY
    outputs: tuple[str, ...]
    captured: tuple[str, ...]

    @property
    def module(self) -> str:
        """Path of the PyTorch module that it came from; empty if the file does not record it."""
        return next((p.value for p in self.proto.metadata_props if p.key == "module"), "")

    def __str__(self) -> str:
        return f"{self.proto.op_type} node {self.proto.name or self.outputs[0]!r}"


@dataclass(frozen=True, slots=True)
class ConstantUse:
    """A constant that a node combines with data; or that is an output of the file, without a node."""

    name: str
    node: FlowNode | None
    position: int


class DataFlow:
    """The data flow of one file.

    Args:
        exported: the file.

    Raises:
        ModelFileError: a node lacks an input that its operator needs.
    """

    def __init__(self, exported: ExportedModel) -> None:
        self.exported = exported
        self._graph = _inlined(exported.proto).graph
        _check_nodes(self._graph, exported)
        self._stored: dict[str, onnx.TensorProto] = {}
        self._data: set[str] = set()
        self._producers: dict[str, FlowNode] = {}
        self._values: dict[str, NDArray[Any] | None] = {}
        self._all: list[FlowNode] = []
        names = self._read(self._graph, {}, level="")
        self._outputs = [names[output.name] for output in self._graph.output if output.name in names]

    def _read(self, graph: onnx.GraphProto, outer: dict[str, str], *, level: str) -> dict[str, str]:
        """Register the values of a graph and return their unique names, with those of the graphs around it."""
        names = dict(outer)

        def unique(name: str) -> str:
            names[name] = f"{name}{level}"
            return names[name]

        for tensor in graph.initializer:
            self._stored[unique(tensor.name)] = tensor
        for sparse in graph.sparse_initializer:
            self._stored[unique(sparse.values.name)] = self._dense(sparse)
        for value in graph.input:
            if names.get(value.name) not in self._stored:
                self._data.add(unique(value.name))
        for index, node in enumerate(graph.node):
            captured: list[str] = []
            for number, body in enumerate(_subgraphs(node)):
                inner = self._read(body, names, level=f"{level}@{index}.{number}")
                captured += [inner[output.name] for output in body.output if output.name in inner]
            inputs = tuple(names.get(name, name) for name in node.input)
            outputs = tuple(unique(name) if name else "" for name in node.output)
            made = FlowNode(node, inputs, outputs=outputs, captured=tuple(captured))
            self._all.append(made)
            self._producers.update((name, made) for name in outputs if name)
        return names

    def _dense(self, sparse: onnx.SparseTensorProto) -> onnx.TensorProto:
        """A sparse initializer as runtimes load it."""
        values, indices = (read_tensor(tensor, self.exported.path) for tensor in (sparse.values, sparse.indices))
        try:
            if math.prod(sparse.dims) > _LARGEST_SPARSE:
                raise ValueError
            array = np.zeros(tuple(sparse.dims), dtype=values.dtype)
            array.reshape(-1)[indices if indices.ndim == 1 else np.ravel_multi_index(indices.T, array.shape)] = values
        except (ValueError, IndexError, MemoryError) as error:
            raise ModelFileError(
                f"{self.exported.path}: the sparse initializer {quoted(sparse.values.name)} is damaged"
            ) from error
        return onnx.numpy_helper.from_array(array, sparse.values.name)

    @cached_property
    def reached(self) -> frozenset[str]:
        """Names of all values that an output depends on."""
        seen: set[str] = set()
        waiting = list(self._outputs)
        while waiting:
            name = waiting.pop()
            if name and name not in seen:
                seen.add(name)
                node = self._producers.get(name)
                waiting += () if node is None else (*node.inputs, *node.captured)
        return frozenset(seen)

    @cached_property
    def nodes(self) -> tuple[FlowNode, ...]:
        """Nodes that an output depends on, in the order of the file; those of subgraphs come before their node."""
        return tuple(node for node in self._all if any(name in self.reached for name in node.outputs))

    @cached_property
    def _inferred(self) -> tuple[onnx.ValueInfoProto, ...]:
        """Types and shapes of the values of the main graph as ONNX infers them."""
        light = light_model(self.exported.proto)
        del light.graph.value_info[:]  # what the file declares is not known to be right
        for output in light.graph.output:
            output.type.tensor_type.ClearField("shape")
        try:
            known = onnx.shape_inference.infer_shapes(light, data_prop=True).graph
        except (RuntimeError, ValueError, onnx.checker.ValidationError, onnx.shape_inference.InferenceError):
            # `check_types` reports what is wrong
            return ()
        return (*known.input, *known.value_info, *known.output)

    @cached_property
    def _types(self) -> Mapping[str, int]:
        return {value.name: value.type.tensor_type.elem_type for value in self._inferred}

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int | str | None, ...]]:
        """Sizes of the values of the main graph as ONNX infers them: a number, the name of an axis, or None."""
        return {
            value.name: tuple(
                d.dim_value if d.HasField("dim_value") else d.dim_param or None
                for d in value.type.tensor_type.shape.dim
            )
            for value in self._inferred
            if value.type.tensor_type.HasField("shape")
        }

    @property
    def unreached(self) -> tuple[FlowNode, ...]:
        """Nodes that no output depends on."""
        return tuple(node for node in self._all if not any(name in self.reached for name in node.outputs))

    @cached_property
    def _constant(self) -> frozenset[str]:
        known = set(self._stored)
        for node in self._all:
            proto = node.proto
            fixed = all(name in known for name in node.inputs if name) and proto.op_type not in RANDOM_OPERATORS
            if fixed and proto.domain in ("", "ai.onnx") and not any(_subgraphs(proto)):
                known.update(name for name in node.outputs if name)
        return frozenset(known)

    @cached_property
    def constant_uses(self) -> tuple[ConstantUse, ...]:
        """Every place where a constant meets data, and every output that is constant."""
        met = [
            ConstantUse(name, node, position)
            for node in self.nodes
            if not all(name in self._constant for name in node.outputs if name)
            for position, name in enumerate(node.inputs)
            if name in self._constant
        ]
        return (*met, *(ConstantUse(name, None, 0) for name in self._outputs if name in self._constant))

    def is_stored(self, name: str) -> bool:
        """Whether the constant is an initializer, not computed by nodes."""
        return name in self._stored

    def producer(self, name: str) -> FlowNode | None:
        """The node that computes a value; None for an input or an initializer."""
        return self._producers.get(name)

    def sources(self, name: str) -> tuple[str, ...]:
        """Names of the stored constants that nodes compute a constant from."""
        waiting, seen = [name], {name}
        while waiting:
            node = self._producers.get(waiting.pop())
            new = [n for n in (node.inputs if node is not None else ()) if n and n not in seen]
            seen.update(new)
            waiting += new
        return tuple(n for n in seen if n in self._stored and n != name)

    def is_constant(self, name: str) -> bool:
        """Whether the value depends on no input."""
        return name in self._constant

    def size(self, name: str) -> int | None:
        """Number of values of a stored constant; None for one that nodes compute."""
        return math.prod(self._stored[name].dims) if name in self._stored else None

    def is_large(self, name: str) -> bool:
        """Whether a constant is stored and too large to be a number that a computation uses many times."""
        return (self.size(name) or 0) > _LARGE

    def value(self, name: str) -> NDArray[Any] | None:
        """The value of a constant; None if it cannot be computed here.

        Raises:
            ModelFileError: a tensor is damaged.
        """
        if name not in self._values:
            if name in self._stored:
                return read_tensor(self._stored[name], self.exported.path)  # mapped, so not kept
            self._values.update(zip(self._producers[name].outputs, self._compute(name), strict=True))
        return self._values[name]

    def _compute(self, name: str) -> Sequence[NDArray[Any] | None]:
        node = self._producers[name]
        if node.proto.op_type == "Constant" and [a.name for a in node.proto.attribute] == ["value"]:
            return [read_tensor(node.proto.attribute[0].t, self.exported.path)]
        inputs = {n: self.value(n) for n in node.inputs if n}
        if any(value is None for value in inputs.values()):
            return [None] * len(node.outputs)
        try:
            return _run_node(node, inputs, opset=self.exported.opset)
        except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError, NotImplementedError):
            return [None] * len(node.outputs)  # the reference lacks the operator; the caller reports the constant

    def converts_to(self, node: FlowNode) -> int:
        """The element type that a Cast or a CastLike converts to; 0 for another node, and where it is not known."""
        if node.proto.op_type == "Cast":
            return next((int(a.i) for a in node.proto.attribute if a.name == "to"), 0)
        return self.element_type(node.inputs[1]) if node.proto.op_type == "CastLike" else 0

    def element_type(self, name: str) -> int:
        """The element type of a value; 0 where it is not known."""
        stored = self._stored.get(name)
        return self._types.get(name, 0) if stored is None else int(stored.data_type)

    def renumbers(self, node: FlowNode) -> bool:
        """Whether a node looks up whole numbers or truth values in a table of such: other ids, positions or masks."""
        table = node.inputs[0] if node.proto.op_type == "Gather" else ""
        return self.is_constant(table) and self.element_type(table) in (*WHOLE_TYPES, onnx.TensorProto.BOOL)

    def norms_before(self) -> dict[str, frozenset[str]]:
        """For the first output of each reached norm node, the first outputs of the norm nodes that it depends on."""
        known: dict[str, frozenset[str]] = {}
        found: dict[str, frozenset[str]] = {}
        for node in self.nodes:
            sources = (known.get(name, frozenset()) for name in (*node.inputs, *node.captured))
            before: frozenset[str] = frozenset().union(*sources)
            if node.proto.domain == DOMAIN:
                found[node.outputs[0]] = before
                before |= {node.outputs[0]}
            known.update(dict.fromkeys(node.outputs, before))
        return found


def _subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def _inlined(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model with every local function expanded, except those of norms."""
    others = sorted({(f.domain, f.name) for f in proto.functions if f.domain != DOMAIN})
    if not others:
        return proto
    try:
        expanded: onnx.ModelProto = onnx.inliner.inline_selected_functions(proto, others)
    except (RuntimeError, onnx.checker.ValidationError) as error:
        raise ModelFileError(f"a function of the file cannot be expanded: {error}") from error
    return expanded


def _run_node(node: FlowNode, inputs: dict[str, Any], *, opset: int) -> list[NDArray[Any]]:
    proto = onnx.NodeProto()
    proto.CopyFrom(node.proto)
    del proto.input[:], proto.output[:]
    proto.input.extend(node.inputs)
    names = [name or f"unused.{index}" for index, name in enumerate(node.outputs)]
    proto.output.extend(names)
    given = [_described(name, array) for name, array in inputs.items()]
    results = [onnx.helper.make_value_info(name, onnx.TypeProto()) for name in names]
    graph = onnx.helper.make_graph([proto], "constant", given, results)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    return [np.asarray(value) for value in onnx.reference.ReferenceEvaluator(model).run(None, inputs)]


def _described(name: str, array: NDArray[Any]) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(
        name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), list(array.shape)
    )


def light_model(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose large initializers have only types and shapes."""
    light = onnx.ModelProto()
    light.ir_version = proto.ir_version
    light.opset_import.extend(proto.opset_import)
    light.functions.extend(proto.functions)
    graph = light.graph
    graph.name = proto.graph.name
    graph.node.extend(proto.graph.node)
    graph.input.extend(proto.graph.input)
    graph.output.extend(proto.graph.output)
    graph.value_info.extend(proto.graph.value_info)
    for tensor in proto.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL and tensor.ByteSize() <= _SMALL_BYTES:
            graph.initializer.append(tensor)
        else:
            graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    return light


def _check_nodes(graph: onnx.GraphProto, exported: ExportedModel) -> None:
    """Check that every node of a standard operator has as many inputs and outputs, and the attributes, that it needs.

    Raises:
        ModelFileError: a node lacks one, or an attribute has the wrong type.
    """
    nodes = tuple(_with_subgraphs(graph))
    kinds = {node.op_type for node in nodes if node.domain in ("", "ai.onnx") and onnx.defs.has(node.op_type)}
    schemas = {kind: _schema(kind, exported.opset) for kind in kinds}
    for node in nodes:
        schema = schemas.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        if schema is None:
            continue
        for what, has, least in (
            ("inputs", len(node.input), schema.min_input),
            ("outputs", len(node.output), schema.min_output),
        ):
            if has < least:
                raise ModelFileError(
                    f"{exported.path}: the {node.op_type} node {quoted(node.name)} has {has} {what}; it needs {least}: "
                    "the file is damaged"
                )
        for attribute in node.attribute:
            known: Any = schema.attributes.get(attribute.name)  # onnx's stubs lack the members of its types
            if known is not None and attribute.type != int(known.type.value):
                raise ModelFileError(
                    f"{exported.path}: the attribute {quoted(attribute.name)} of the {node.op_type} node "
                    f"{quoted(node.name)} must have type {known.type.name}: the file is damaged"
                )


def _with_subgraphs(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for body in _subgraphs(node):
            yield from _with_subgraphs(body)


def _schema(kind: str, opset: int) -> onnx.defs.OpSchema | None:
    """The definition of an operator; None if it is newer than the opset, which a runtime reports more clearly."""
    try:
        return onnx.defs.get_schema(kind, opset)
    except onnx.defs.SchemaError:
        return None
