"""Give a model in half precision inputs and outputs in fp32, for programs that have no half-precision numbers."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

__all__ = ["float32_ends"]


def _cast(value: ir.Value, dtype: ir.DataType, *, name: str) -> ir.Node:
    node = ir.node("Cast", [value], {"to": dtype.value}, name=f"{name}/cast")
    output = node.outputs[0]
    output.shape, output.type = value.shape, ir.TensorType(dtype)
    return node


def float32_ends(graph: ir.Graph, *, wanted: Callable[[str], bool]) -> None:
    """Cast floating-point inputs and outputs at the ends of the graph; what is between them does not change.

    Before: inputs and outputs have the type of the weights. After: those that are `wanted` are fp32 and keep their
    names.

    Args:
        graph: the graph of a model in fp16 or bf16.
        wanted: whether the input or output of this name becomes fp32.
    """
    half = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    for value in graph.inputs:
        dtype, name = value.dtype, value.name
        if dtype in half and name is not None and wanted(name):
            node = _cast(value, dtype, name=name)
            node.outputs[0].name = f"{name}/{dtype.name.lower()}"
            value.replace_all_uses_with(node.outputs[0])
            node.replace_input_with(0, value)
            value.type = ir.TensorType(ir.DataType.FLOAT)
            graph.insert_before(graph[0], node)
    for position, value in enumerate(list(graph.outputs)):
        dtype, name = value.dtype, value.name
        if dtype in half and name is not None and wanted(name):
            value.name = f"{name}/{dtype.name.lower()}"
            node = _cast(value, ir.DataType.FLOAT, name=name)
            node.outputs[0].name = name
            graph.append(node)
            graph.outputs[position] = node.outputs[0]
