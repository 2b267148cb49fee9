"""A float32 copy of a half-precision model that rounds every node's output to the half type.

On a CPU, ONNX Runtime computes float16 graphs in float32 without rounding between nodes (a product
of 153600 does not overflow there) and cannot run bfloat16 ones at all. This copy stores what the
model stores, in its type, and does arithmetic in float32, as GPU kernels do: explicit Casts after
every node, which survive optimisation.
"""

from __future__ import annotations

from typing import Final

import onnx_ir as ir

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.errors import ModelFileError

__all__ = ["rounding_copy"]

_HALF: Final = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)

# Their output type is written on the node and does not follow from the inputs: they keep it.
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


def _cast(source: ir.Value, to: ir.DataType, *, name: str) -> ir.Node:
    node = ir.node("Cast", [source], attributes={"to": to.value}, name=f"{name}/cast")
    node.outputs[0].name = name
    node.outputs[0].type = ir.TensorType(to)
    node.outputs[0].shape = source.shape
    return node


def rounding_copy(model: ExportedModel) -> ir.Model:
    """The copy: floating inputs are taken in float32 and rounded, outputs are float32 that hold half values.

    Raises:
        ModelFileError: a value's type cannot be told, or the model has subgraphs.
    """
    copy = ir.load(model.path)
    graph = copy.graph
    nodes = list(graph)
    for node in nodes:
        if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
            raise ModelFileError(
                f"{model.path}: node {node.name!r} ({node.op_type}) has a subgraph; rounding node by node does not "
                "reach into it"
            )
        for value in node.outputs:
            if value.dtype is None and value.uses():
                raise ModelFileError(f"{model.path}: the type of {value.name!r} cannot be told")

    # what is given in half precision is read through Casts
    for value in [*graph.inputs, *graph.initializers.values()]:
        half = value.dtype
        if half not in _HALF:
            continue
        users = tuple(value.uses())
        casts: list[ir.Node] = []
        if value.is_graph_input():  # given as float32: NumPy has no bfloat16 to give
            value.type = ir.TensorType(ir.DataType.FLOAT)
            casts.append(_cast(value, half, name=f"{value.name}/rounded"))
        casts.append(_cast(casts[0].outputs[0] if casts else value, ir.DataType.FLOAT, name=f"{value.name}/float"))
        graph.insert_before(nodes[0], casts)
        for user, index in users:
            user.replace_input_with(index, casts[-1].outputs[0])

    # what is computed in half precision is computed in float32 and rounded
    for node in nodes:
        for value in node.outputs:
            half = value.dtype
            if half not in _HALF:
                continue
            users = tuple(value.uses())
            after: list[ir.Node] = []
            if node.domain == "" and node.op_type in _TYPED_SOURCES:
                rounded = value
            else:
                value.type = ir.TensorType(ir.DataType.FLOAT)
                after.append(_cast(value, half, name=f"{value.name}/rounded"))
                rounded = after[0].outputs[0]
            after.append(_cast(rounded, ir.DataType.FLOAT, name=f"{value.name}/float"))
            wide_value = after[-1].outputs[0]
            graph.insert_after(node, after)
            for user, index in users:
                user.replace_input_with(index, wide_value)
            for position, output in enumerate(graph.outputs):
                if output is value:
                    name, value.name = value.name, f"{value.name}/exact"
                    wide_value.name = name
                    graph.outputs[position] = wide_value
    return copy
