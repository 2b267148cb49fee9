"""Float32 copies of a half-precision model: one rounds the output of every node to the half type, one rounds nothing.

On a CPU, ONNX Runtime computes float16 graphs in float32 without rounding between nodes, so a product of 153600 does
not overflow, and it cannot run bfloat16 graphs. The copy computes in float32 and rounds with explicit Casts after every
node, as GPU kernels do. Casts survive the runtime's optimisation.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Final

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes
from numpy.typing import NDArray

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.errors import ModelFileError, quoted
from ibnorm_export.graph.stored_graph import read_graph

__all__ = ["exact_copy", "rounding_copy"]

_HALF: Final = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)

#: Op types whose output type is an attribute and does not follow from the inputs; they keep it.
_TYPED_SOURCES: Final = frozenset(
    {
        "Cast",
        "Constant",
        "ConstantOfShape",
        "EyeLike",
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
        "Bernoulli",
        "Multinomial",
        "BlackmanWindow",
        "HannWindow",
        "HammingWindow",
    }
)

#: Attributes that hold an element type.
_TYPE_ATTRIBUTES: Final = frozenset({"to", "dtype", "output_datatype"})


def _cast(source: ir.Value, to: ir.DataType, *, name: str) -> ir.Node:
    node = ir.node("Cast", [source], attributes={"to": to.value}, name=f"{name}/cast")
    node.outputs[0].name = name
    node.outputs[0].type = ir.TensorType(to)
    node.outputs[0].shape = source.shape
    return node


def rounding_copy(model: ExportedModel) -> ir.Model:
    """Return the copy. Its inputs are float32 and are rounded; its outputs are float32 and hold half-precision values.

    Raises:
        ModelFileError: the type of a value is unknown, or the model has subgraphs.
    """
    copy = read_graph(model)
    nodes = list(copy.graph)
    _infer_types(copy, nodes)
    for node in nodes:
        _check_node(node, model)
    _read_through_casts(copy.graph, nodes[0], rounds=True)
    for node in nodes:
        for value in node.outputs:
            if value.dtype in _HALF:
                _round_output(copy.graph, node, value)
    return copy


def _infer_types(copy: ir.Model, nodes: list[ir.Node]) -> None:
    """Add the types of values where the file does not state them, as in a file that ONNX Runtime has optimised."""
    if all(value.dtype is not None for node in nodes for value in node.outputs):
        return
    for node in nodes:  # the builder of onnxruntime-genai declares the shapes of some wrongly, which stops inference
        stored = node.attributes.get("value")
        if node.op_type == "Constant" and stored is not None and stored.type == ir.AttributeType.TENSOR:
            node.outputs[0].shape = ir.Shape(stored.value.shape)
    passes.ShapeInferencePass()(copy)
    for node in nodes:
        if node.domain in ("", "ai.onnx"):
            continue
        # ONNX knows no types of other domains. What optimisers fuse there keeps the type of its data.
        floating = [
            v.dtype for v in node.inputs if v is not None and v.dtype is not None and v.dtype.is_floating_point()
        ]
        for value in node.outputs:
            if value.dtype is None and floating:
                value.type = ir.TensorType(floating[0])
                passes.ShapeInferencePass()(copy)


def exact_copy(
    model: ExportedModel,
    constants: Collection[float],
    *,
    tables: Mapping[str, NDArray[np.float32]] = MappingProxyType({}),
) -> ir.Model:
    """Return a copy that computes in float32 and rounds nothing; its weights are those of the file.

    Rounding hides arithmetic that is wrong by less than it. In this copy, such an error stands out.

    Args:
        model: the file.
        constants: numbers in PyTorch's code. Where the file holds one of them rounded, the copy holds it exactly.
        tables: values that replace those of initializers, by name.
    """
    copy = read_graph(model)
    bodies = [node for function in copy.functions.values() for node in function]
    for node in [*copy.graph.all_nodes(), *bodies]:
        if node.op_type in _TYPED_SOURCES:
            _widen_attributes(node, constants)
        for value in node.outputs:
            if value.dtype in _HALF:
                value.type = ir.TensorType(ir.DataType.FLOAT)
    for value in copy.graph.initializers.values():
        if (table := tables.get(value.name or "")) is not None:
            value.const_value = ir.tensor(table)
            value.type = ir.TensorType(ir.DataType.FLOAT)
        elif value.dtype in _HALF and value.const_value is not None and value.const_value.size == 1:
            value.const_value = _widened(value.const_value, constants)
            value.type = ir.TensorType(ir.DataType.FLOAT)
    _read_through_casts(copy.graph, next(iter(copy.graph)), rounds=False)
    return copy


def _widened(tensor: ir.TensorProtocol, constants: Collection[float]) -> ir.TensorProtocol:
    """A half-precision tensor in float32; a single value that is one of `constants` rounded becomes that constant."""
    values = tensor.numpy()
    wide = values.astype(np.float32)
    if values.size == 1:
        with np.errstate(over="ignore"):  # a constant may exceed the type
            exact = [c for c in constants if np.asarray(c).astype(values.dtype) == values.reshape(())]
        wide = np.full(
            values.shape, min(exact, key=lambda c: abs(c - float(wide.reshape(()))), default=wide), np.float32
        )
    return ir.tensor(wide)


def _widen_attributes(node: ir.Node, constants: Collection[float]) -> None:
    """Replace a half type in the attributes of a node whose output type they give."""
    for name, attribute in list(node.attributes.items()):
        if attribute.type == ir.AttributeType.INT and name in _TYPE_ATTRIBUTES and attribute.value in _HALF:
            node.attributes[name] = ir.AttrInt64(name, ir.DataType.FLOAT.value)
        elif attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype in _HALF:
            node.attributes[name] = ir.AttrTensor(name, _widened(attribute.value, constants))


def _check_node(node: ir.Node, model: ExportedModel) -> None:
    if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
        raise ModelFileError(
            f"{model.path}: node {quoted(node.name)} ({node.op_type}) has a subgraph, whose nodes cannot be rounded"
        )
    for value in node.outputs:
        if value.dtype is None and value.uses():
            raise ModelFileError(f"{model.path}: the type of {quoted(value.name)} is unknown")


def _read_through_casts(graph: ir.Graph, first: ir.Node, *, rounds: bool) -> None:
    """Cast initializers in half precision to float32; inputs become float32 and, if requested, are rounded first."""
    for value in [*graph.inputs, *graph.initializers.values()]:
        half = value.dtype
        if half not in _HALF:
            continue
        users = tuple(value.uses())
        casts: list[ir.Node] = []
        if value.is_graph_input():  # NumPy has no bfloat16, so callers give float32
            value.type = ir.TensorType(ir.DataType.FLOAT)
            if not rounds:
                continue
            casts.append(_cast(value, half, name=f"{value.name}/rounded"))
        casts.append(_cast(casts[0].outputs[0] if casts else value, ir.DataType.FLOAT, name=f"{value.name}/float"))
        graph.insert_before(first, casts)
        for user, index in users:
            user.replace_input_with(index, casts[-1].outputs[0])


def _round_output(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    """Compute an output in float32, round it to its half type, and give the nodes that use it the rounded value."""
    half = value.dtype
    assert half is not None
    users = tuple(value.uses())
    after: list[ir.Node] = []
    rounded = value
    if node.domain != "" or node.op_type not in _TYPED_SOURCES:
        value.type = ir.TensorType(ir.DataType.FLOAT)
        after.append(_cast(value, half, name=f"{value.name}/rounded"))
        rounded = after[0].outputs[0]
    after.append(_cast(rounded, ir.DataType.FLOAT, name=f"{value.name}/float"))
    wide = after[-1].outputs[0]
    graph.insert_after(node, after)
    for user, index in users:
        user.replace_input_with(index, wide)
    for position, output in enumerate(graph.outputs):
        if output is value:
            name, value.name = value.name, f"{value.name}/exact"
            wide.name = name
            graph.outputs[position] = wide
