"""Match and replace nodes of a graph; the passes of this package share these functions."""

from __future__ import annotations

from typing import Final

import onnx_ir as ir

__all__ = [
    "SPLIT_HEADS",
    "constant_integer",
    "only_user",
    "permutation",
    "producer_of_type",
    "replace_node",
    "replace_value",
]

#: Swaps sequence and heads: (batch, sequence, heads, features) <-> (batch, heads, sequence, features).
SPLIT_HEADS: Final = (0, 2, 1, 3)


def producer_of_type(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node that computes `value`, if it is of this standard op type."""
    node = None if value is None else value.producer()
    return node if node is not None and node.domain == "" and node.op_type == op_type else None


def only_user(value: ir.Value, op_type: str) -> ir.Node | None:
    """The node that uses `value`, if nothing else does and it is of this standard op type."""
    users = [use.node for use in value.uses()]
    if len(users) != 1 or value.is_graph_output() or users[0].domain != "" or users[0].op_type != op_type:
        return None
    return users[0]


def permutation(transpose: ir.Node) -> tuple[int, ...]:
    """The order of axes of a Transpose; empty if it reverses all of them."""
    perm = transpose.attributes.get("perm")
    return () if perm is None else tuple(perm.as_ints())


def constant_integer(value: ir.Value | None) -> int | None:
    """The element of a constant that has exactly one."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return int(tensor.numpy().reshape(())) if tensor is not None and tensor.size == 1 else None


def replace_node(graph: ir.Graph, old: ir.Node, *, new: ir.Node, shape: ir.Shape | None) -> None:
    """Put `new` in the place of `old`; its first output takes the name and type of the old one.

    Args:
        graph: the graph that holds `old`.
        old: a node with one output, or whose other outputs are unused.
        new: a node outside the graph.
        shape: the shape of the new output.
    """
    was, now = old.outputs[0], new.outputs[0]
    now.name, now.type, now.shape = was.name, was.type, shape
    graph.insert_before(old, new)
    was.replace_all_uses_with(now, replace_graph_outputs=True)
    graph.remove(old, safe=True)


def replace_value(new: ir.Value, *, old: ir.Value) -> None:
    """Replace `old` with `new`: its name, type and shape, its uses, and its place among the graph's outputs."""
    new.name, new.type, new.shape = old.name, old.type, old.shape
    old.name = None
    old.replace_all_uses_with(new, replace_graph_outputs=True)
