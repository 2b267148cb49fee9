"""Remove the detours that the exporter takes around the heads of Attention.

Below opset 23 the exporter transposes the keys through a Reshape whose shape eight nodes compute at run time. From 23
on it splits and joins the heads around the operators RotaryEmbedding and Attention, although both take (batch,
sequence, features). ViT-S/16 takes 5% less time on two cores without either (benchmarks/results/model_cpu.json).

Source: ONNX, operators Attention-23 and RotaryEmbedding-23.
"""

from __future__ import annotations

from typing import NamedTuple

import onnx_ir as ir

from ibnorm_export.graph.patterns import (
    SPLIT_HEADS,
    constant_integer,
    only_user,
    permutation,
    producer_of_type,
    replace_node,
    replace_value,
)

__all__ = ["keep_heads_joined", "transpose_keys_directly"]


def _sliced_axes(value: ir.Value | None, source: ir.Value) -> tuple[int, int] | None:
    """First and last axis (exclusive) of `source`, of rank 4, if `value` is a slice of its shape."""
    part = producer_of_type(value, "Slice")
    shape = None if part is None else producer_of_type(part.inputs[0], "Shape")
    if part is None or shape is None or shape.inputs[0] is not source or len(part.inputs) != 3:
        return None
    start, end = (constant_integer(v) for v in part.inputs[1:3])
    if start is None or end is None:
        return None
    first, last, _ = slice(start, end).indices(4)
    return first, last


def transpose_keys_directly(graph: ir.Graph) -> None:
    """Replace Reshape(Transpose(Reshape(k))) that swaps the last two of four axes with one Transpose.

    Before: values have shapes. After: outputs have the same names and values.
    """
    for last in list(graph):
        swap = (
            producer_of_type(last.inputs[0], "Transpose") if last.domain == "" and last.op_type == "Reshape" else None
        )
        if swap is None or permutation(swap) != (0, 2, 1):
            continue
        first = producer_of_type(swap.inputs[0], "Reshape")
        k = None if first is None else first.inputs[0]
        if first is None or k is None or k.shape is None or len(k.shape) != 4:
            continue
        flat, whole = producer_of_type(first.inputs[1], "Concat"), producer_of_type(last.inputs[1], "Concat")
        if flat is None or whole is None or len(flat.inputs) != 3 or constant_integer(flat.inputs[0]) != -1:
            continue
        others, sequence, features = (0, 2), (2, 3), (3, 4)
        if [_sliced_axes(v, k) for v in flat.inputs[1:]] != [sequence, features]:
            continue
        if [_sliced_axes(v, k) for v in whole.inputs] != [others, features, sequence]:
            continue
        split = producer_of_type(k, "Transpose")
        fuses = split is not None and permutation(split) == SPLIT_HEADS
        source, perm = (split.inputs[0], (0, 2, 3, 1)) if split is not None and fuses else (k, (0, 1, 3, 2))
        direct = ir.node("Transpose", [source], attributes={"perm": perm}, metadata_props=dict(swap.metadata_props))
        shape = ir.Shape([k.shape[0], k.shape[1], k.shape[3], k.shape[2]])
        replace_node(graph, last, new=direct, shape=shape)


class _JoinedHeads(NamedTuple):
    """Heads before they are split.

    Args:
        source: (batch, sequence, heads * features).
        heads: number of heads.
        rotary: the RotaryEmbedding that follows the split, if there is one.
    """

    source: ir.Value
    heads: int
    rotary: ir.Node | None

    def rotated(self, graph: ir.Graph) -> ir.Value:
        """Return `source`, followed by a new rotary embedding if `rotary` is given."""
        if self.rotary is None:
            return self.source
        attributes = {**self.rotary.attributes, "num_heads": ir.AttrInt64("num_heads", self.heads)}
        inputs = [self.source, *self.rotary.inputs[1:]]
        node = ir.node(
            "RotaryEmbedding", inputs, attributes=attributes, metadata_props=dict(self.rotary.metadata_props)
        )
        node.outputs[0].type, node.outputs[0].shape = self.source.type, self.source.shape
        graph.insert_before(self.rotary, node)
        return node.outputs[0]


def _joined_heads(value: ir.Value | None) -> _JoinedHeads | None:
    """Find what `value` (batch, heads, sequence, features) was split from."""
    rotary = producer_of_type(value, "RotaryEmbedding")
    split = producer_of_type(value if rotary is None else rotary.inputs[0], "Transpose")
    splits = split is not None and permutation(split) == SPLIT_HEADS
    reshape = producer_of_type(split.inputs[0], "Reshape") if split is not None and splits else None
    source = None if reshape is None else reshape.inputs[0]
    if value is None or value.shape is None or source is None or source.shape is None or len(source.shape) != 3:
        return None
    heads, size = value.shape[1], value.shape[3]
    known = isinstance(heads, int) and isinstance(size, int) and source.shape[2] == heads * size
    return _JoinedHeads(source, heads, rotary) if known and isinstance(heads, int) else None


def keep_heads_joined(graph: ir.Graph) -> None:
    """Let Attention take its inputs before the heads are split and return its output with the heads joined.

    Rotary embeddings move along. Nodes whose heads are not split by Reshape and Transpose are left as they are.

    Before: values have shapes; attention is the standard operator (opset 23 or later). After: outputs have the same
    names and values.
    """
    for node in list(graph):
        if node.domain != "" or node.op_type != "Attention" or len(node.inputs) < 3:
            continue
        if any(value is not None for value in node.inputs[6:]):
            continue
        q, k, v = (_joined_heads(value) for value in node.inputs[:3])
        split_back = only_user(node.outputs[0], "Transpose")
        joins = split_back is not None and permutation(split_back) == SPLIT_HEADS
        join = only_user(split_back.outputs[0], "Reshape") if split_back is not None and joins else None
        shape = None if join is None else join.outputs[0].shape
        if q is None or k is None or v is None or join is None or split_back is None or shape is None:
            continue
        y = node.outputs[0].shape
        if k.heads != v.heads or y is None or not isinstance(y[3], int):
            continue
        if len(shape) != 3 or shape[2] != q.heads * y[3]:
            continue
        whole = ir.node(
            "Attention",
            [q.rotated(graph), k.rotated(graph), v.rotated(graph), *node.inputs[3:]],
            attributes={**node.attributes, "q_num_heads": q.heads, "kv_num_heads": k.heads},
            num_outputs=len(node.outputs),
            metadata_props=dict(node.metadata_props),
        )
        replace_node(graph, join, new=whole, shape=shape)
        for old, new in zip(node.outputs[1:], whole.outputs[1:], strict=True):
            replace_value(new, old=old)
        graph.remove([split_back, node], safe=True)
