"""Attention as the exporter decomposes it, with what it adds taken away again.

Below opset 23 the exporter transposes the keys by way of a Reshape, with the shape computed at run time by eight nodes;
from 23 on it splits and joins the heads around the Attention operator, which takes (batch, sequence, features) as they
are. On two cores ViT-S/16 takes 5% less time without either (benchmarks/results/model_cpu.json).

Precondition: values carry their shapes. Postcondition: names of outputs are what they were.
"""

from __future__ import annotations

from typing import Final

import onnx_ir as ir

__all__ = ["heads_in_attention", "transpose_keys_directly"]

_SPLIT: Final = (0, 2, 1, 3)  # (batch, sequence, heads, features) <-> (batch, heads, sequence, features)


def _made_by(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.domain == "" and node.op_type == op_type else None


def _perm(node: ir.Node) -> tuple[int, ...]:
    perm = node.attributes.get("perm")
    return () if perm is None else tuple(perm.as_ints())


def _integer(value: ir.Value | None) -> int | None:
    """The element of a constant of one."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return int(tensor.numpy().reshape(())) if tensor is not None and tensor.size == 1 else None


def _dims(value: ir.Value | None, of: ir.Value) -> tuple[int, int] | None:
    """First and behind the last axis, where `value` is a slice of the shape of `of`, which has four axes."""
    part = _made_by(value, "Slice")
    shape = None if part is None else _made_by(part.inputs[0], "Shape")
    if part is None or shape is None or shape.inputs[0] is not of or len(part.inputs) != 3:
        return None
    start, end = (_integer(v) for v in part.inputs[1:3])
    if start is None or end is None:
        return None
    first, behind, _ = slice(start, end).indices(4)
    return first, behind


def transpose_keys_directly(graph: ir.Graph) -> None:
    """Reshape(Transpose(Reshape(k))) that swaps the last two axes of four becomes one Transpose."""
    for last in list(graph):
        swap = _made_by(last.inputs[0], "Transpose") if last.domain == "" and last.op_type == "Reshape" else None
        if swap is None or _perm(swap) != (0, 2, 1):
            continue
        first = _made_by(swap.inputs[0], "Reshape")
        k = None if first is None else first.inputs[0]
        if first is None or k is None or k.shape is None or len(k.shape) != 4:
            continue
        flat, whole = _made_by(first.inputs[1], "Concat"), _made_by(last.inputs[1], "Concat")
        if flat is None or whole is None or len(flat.inputs) != 3 or _integer(flat.inputs[0]) != -1:
            continue
        others, sequence, features = (0, 2), (2, 3), (3, 4)
        if [_dims(v, k) for v in flat.inputs[1:]] != [sequence, features]:
            continue
        if [_dims(v, k) for v in whole.inputs] != [others, features, sequence]:
            continue
        split = _made_by(k, "Transpose")
        source, perm = (k, (0, 1, 3, 2)) if split is None or _perm(split) != _SPLIT else (split.inputs[0], (0, 2, 3, 1))
        direct = ir.node("Transpose", [source], attributes={"perm": perm}, metadata_props=dict(swap.metadata_props))
        _replace(graph, last, direct, ir.Shape([k.shape[0], k.shape[1], k.shape[3], k.shape[2]]))


def _replace(graph: ir.Graph, old: ir.Node, new: ir.Node, shape: ir.Shape | None) -> None:
    """Put `new` in the place of `old`, whose output's name it takes."""
    was, now = old.outputs[0], new.outputs[0]
    now.name, now.type, now.shape = was.name, was.type, shape
    graph.insert_before(old, new)
    was.replace_all_uses_with(now, replace_graph_outputs=True)
    graph.remove(old, safe=True)


def _joined(value: ir.Value | None) -> tuple[ir.Value, int] | None:
    """(batch, sequence, heads * features) that `value` (batch, heads, sequence, features) was split from, and heads."""
    split = _made_by(value, "Transpose")
    reshape = None if split is None or _perm(split) != _SPLIT else _made_by(split.inputs[0], "Reshape")
    source = None if reshape is None else reshape.inputs[0]
    if value is None or value.shape is None or source is None or source.shape is None or len(source.shape) != 3:
        return None
    heads, size = value.shape[1], value.shape[3]
    known = isinstance(heads, int) and isinstance(size, int) and source.shape[2] == heads * size
    return (source, heads) if known and isinstance(heads, int) else None


def _only_user(value: ir.Value, op_type: str) -> ir.Node | None:
    users = [use.node for use in value.uses()]
    if len(users) != 1 or value.is_graph_output() or users[0].domain != "" or users[0].op_type != op_type:
        return None
    return users[0]


def heads_in_attention(graph: ir.Graph) -> None:
    """Attention without a cache takes its inputs before the heads are split and gives them joined."""
    for node in list(graph):
        if node.domain != "" or node.op_type != "Attention" or len(node.outputs) != 1:
            continue
        if len(node.inputs) < 3 or any(value is not None for value in node.inputs[4:]):
            continue
        sources = [_joined(value) for value in node.inputs[:3]]
        back = _only_user(node.outputs[0], "Transpose")
        join = None if back is None or _perm(back) != _SPLIT else _only_user(back.outputs[0], "Reshape")
        (q, k, v), shape = sources, None if join is None else join.outputs[0].shape
        if q is None or k is None or v is None or join is None or back is None or shape is None or len(shape) != 3:
            continue
        y = node.outputs[0].shape
        if k[1] != v[1] or y is None or not isinstance(y[3], int) or shape[2] != q[1] * y[3]:
            continue
        whole = ir.node(
            "Attention",
            [q[0], k[0], v[0], *node.inputs[3:]],
            attributes={**node.attributes, "q_num_heads": q[1], "kv_num_heads": k[1]},
            metadata_props=dict(node.metadata_props),
        )
        _replace(graph, join, whole, shape)
        graph.remove([back, node], safe=True)
