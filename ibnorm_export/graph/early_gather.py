"""Positions are chosen as early as they can be, so that the others are never computed.

A vision transformer classifies by one token. What comes after its last attention works on each row alone, so the same
numbers come out of the chosen rows by themselves: at 197 tokens a 197th of the last block's MLP and of the last norm,
which is 6% of ViT-S/16's arithmetic, and one kernel less in TensorRT-RTX 1.7.1, which splits a norm where a selection
follows it.

Precondition: values carry their shapes. Postcondition: names are what they were; a node that computes chosen rows alone
says which, as JSON, in its metadata property "rows".
"""

from __future__ import annotations

import json
from typing import Final, NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ibnorm_export.op.spec import DOMAIN, OP_TYPES

__all__ = ["Rows", "gather_early", "selected_rows"]

_UNARY: Final = frozenset({"Cast", "Gelu", "Identity", "Relu", "Sigmoid", "Tanh"})
_BINARY: Final = frozenset({"Add", "Div", "Mul", "Sub"})


class Rows(NamedTuple):
    """What a Gather chooses from an axis that is not the last: constant indices, () or (n,), and the axis."""

    indices: NDArray[np.int64]
    axis: int

    def of(self, value: NDArray[np.generic]) -> NDArray[np.generic]:
        """The chosen part of a whole value."""
        return np.take(value, self.indices, axis=self.axis)


def selected_rows(node: ir.Node) -> Rows | None:
    """What a node of an exported file computes of its whole value; None is all of it."""
    text = node.metadata_props.get("rows")
    if text is None:
        return None
    found = json.loads(text)
    return Rows(np.asarray(found["indices"], np.int64), int(found["axis"]))


def _choice(node: ir.Node) -> Rows | None:
    """What a Gather chooses, if it is fewer rows than there are."""
    if node.domain != "" or node.op_type != "Gather" or node.inputs[0] is None or node.inputs[1] is None:
        return None
    shape, indices = node.inputs[0].shape, ir.convenience.get_const_tensor(node.inputs[1])
    if shape is None or indices is None or len(indices.shape) > 1:
        return None
    attribute = node.attributes.get("axis")
    axis = (0 if attribute is None else attribute.as_int()) % len(shape)
    size = shape[axis]
    if axis == len(shape) - 1 or (indices.size > 1 and not (isinstance(size, int) and indices.size < size)):
        return None
    return Rows(indices.numpy().astype(np.int64), axis)


def _whole_inputs(node: ir.Node, axis: int) -> list[int] | None:
    """Positions of the inputs whose rows along `axis` make the same rows of the output; None where it is not so."""
    whole, x = node.outputs[0].shape, node.inputs[0]
    if whole is None or x is None or x.shape is None or len(node.outputs) != 1:
        return None
    if (node.domain, node.op_type) in {(DOMAIN, op_type) for op_type in OP_TYPES}:
        return [0]
    if node.domain != "":
        return None
    if node.op_type in _UNARY:
        return [0]
    if node.op_type == "MatMul":
        matrix = node.inputs[1]
        flat = matrix is not None and matrix.shape is not None and len(matrix.shape) == 2
        return [0] if flat and len(x.shape) == len(whole) else None
    if node.op_type in _BINARY:
        chosen = []
        for position, value in enumerate(node.inputs):
            if value is None or value.shape is None:
                return None
            if value.shape == whole:
                chosen.append(position)
            elif len(value.shape) >= len(whole) - axis:  # it may broadcast along the axis: left alone
                return None
        return chosen
    return None


def _selected(shape: ir.Shape, rows: Rows) -> ir.Shape:
    kept = list(shape)
    kept[rows.axis : rows.axis + 1] = list(rows.indices.shape)
    return ir.Shape(kept)


def _same(gathers: list[ir.Node]) -> bool:
    first = gathers[0]
    return all(
        g.op_type == "Gather" and g.domain == "" and g.inputs[1] is first.inputs[1] and g.attributes == first.attributes
        for g in gathers
    )


def _push(graph: ir.Graph, gather: ir.Node, *, rows: Rows) -> bool:
    """Let the producer of what `gather` chooses from compute those rows alone, if nothing else needs the others."""
    y = gather.inputs[0]
    producer = None if y is None else y.producer()
    if y is None or y.shape is None or producer is None or y.is_graph_output():
        return False
    gathers = [use.node for use in y.uses()]
    positions = _whole_inputs(producer, rows.axis)
    if positions is None or any(use.idx != 0 for use in y.uses()) or not _same(gathers):
        return False
    for x in {id(producer.inputs[p]): producer.inputs[p] for p in positions}.values():
        assert x is not None and x.shape is not None
        earlier = ir.node(
            "Gather", [x, gather.inputs[1]], attributes=gather.attributes, metadata_props=dict(producer.metadata_props)
        )
        chosen = earlier.outputs[0]
        chosen.name, chosen.shape, chosen.type = f"{x.name}/rows", _selected(x.shape, rows), x.type
        graph.insert_before(producer, earlier)
        for position in positions:
            if producer.inputs[position] is x:
                producer.replace_input_with(position, chosen)
    y.shape = _selected(y.shape, rows)
    producer.metadata_props["rows"] = json.dumps({"axis": rows.axis, "indices": rows.indices.tolist()})
    for node in gathers:
        name = node.outputs[0].name
        is_output = node.outputs[0].is_graph_output()
        node.outputs[0].replace_all_uses_with(y, replace_graph_outputs=True)
        graph.remove(node, safe=True)
        if is_output:
            y.name = name
    return True


def gather_early(graph: ir.Graph) -> None:
    """Move every Gather of constant rows up as far as it gives the same numbers for less work."""
    moved = True
    while moved:
        moved = False
        for node in reversed(list(graph)):
            rows = _choice(node) if node.graph is graph else None
            moved = (rows is not None and _push(graph, node, rows=rows)) or moved
