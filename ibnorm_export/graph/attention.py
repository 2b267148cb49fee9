"""Attention as the exporter decomposes it, with what it adds taken away again.

Below opset 23 the exporter transposes the keys by way of a Reshape, with the shape computed at run time by eight nodes;
from 23 on it splits and joins the heads around the operators RotaryEmbedding and Attention, which take (batch,
sequence, features) as they are. On two cores ViT-S/16 takes 5% less time without either
(benchmarks/results/model_cpu.json).

It grows a cache by Concat and repeats grouped heads by copying, where Attention takes the past and gives the present,
reads a head while it is still near, and repeats by reading again. TensorRT's parser takes an Attention of one output
alone: `past_by_concat` is the way back.

Padding it looks up by the indices of every row and key, one pair after the other, which takes as long as a norm; the
mask that it looks them up in has these very rows and keys. (GPT-2's mask goes through a Reshape first and stays.)

Precondition: values carry their shapes. Postcondition: names of outputs are what they were.
Source: ONNX, operators Attention-23 and RotaryEmbedding-23.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import onnx_ir as ir

from ibnorm_export.graph.cleanup import constant

__all__ = [
    "heads_in_attention",
    "mask_without_indices",
    "past_by_concat",
    "past_in_attention",
    "transpose_keys_directly",
    "without_repeats",
]

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
        _replace(graph, last, new=direct, shape=ir.Shape([k.shape[0], k.shape[1], k.shape[3], k.shape[2]]))


def _take_place(graph: ir.Graph, new: ir.Value, *, was: ir.Value) -> None:
    """Let `new` be used, named and given wherever `was` is."""
    new.name, new.type, new.shape = was.name, was.type, was.shape
    was.name = None
    was.replace_all_uses_with(new, replace_graph_outputs=True)


def _replace(graph: ir.Graph, old: ir.Node, *, new: ir.Node, shape: ir.Shape | None) -> None:
    """Put `new` in the place of `old`, whose output's name it takes."""
    was, now = old.outputs[0], new.outputs[0]
    now.name, now.type, now.shape = was.name, was.type, shape
    graph.insert_before(old, new)
    was.replace_all_uses_with(now, replace_graph_outputs=True)
    graph.remove(old, safe=True)


class _Counted(NamedTuple):
    """Indices from 0: the number of them as a value, and as a size."""

    limit: ir.Value
    size: ir.SymbolicDim | int


def _counted(index: ir.Value | None, axis: int, *, rank: int) -> _Counted | None:
    """Where `index` (..., 1) counts from 0 along `axis` and is the same along the others."""
    part = _made_by(index, "Unsqueeze")
    spread = None if part is None or _integer(part.inputs[1]) not in (-1, rank) else part.inputs[0]
    while (node := _made_by(spread, "Expand")) is not None:
        spread = node.inputs[0]
    shape = None if spread is None else spread.shape
    if spread is None or shape is None or len(shape) != rank:
        return None
    numbers: ir.Value | None = spread
    while (node := _made_by(numbers, "Unsqueeze")) is not None:
        numbers = node.inputs[0]
    counted = _made_by(numbers, "Range")
    limit = None if counted is None else counted.inputs[1]
    if counted is None or limit is None or (_integer(counted.inputs[0]), _integer(counted.inputs[2])) != (0, 1):
        return None
    if any(size != 1 for other, size in enumerate(shape) if other != axis):
        return None
    return _Counted(limit, shape[axis])


def _equal(a: ir.SymbolicDim | int, b: ir.SymbolicDim | int) -> bool:
    """Whether two sizes are the same; one without a name is like no other."""
    return a == b and not (isinstance(b, ir.SymbolicDim) and b.value is None)


def _are_all_keys(columns: ir.SymbolicDim | int, mask: ir.Value) -> bool:
    """Whether `mask` is attention_mask (batch, total) of a model with a cache, `columns` its past and new tokens."""
    cast = _made_by(mask, "Cast")
    source = mask if cast is None else cast.inputs[0]
    if source is None or not source.is_graph_input() or source.name != "attention_mask":
        return False
    return isinstance(columns, ir.SymbolicDim) and sorted(str(columns.value).split(" + ")) == ["past", "sequence"]


def mask_without_indices(graph: ir.Graph) -> None:
    """Whatever is looked up for every row and every column of a mask (rows, columns) is the mask itself.

    A Reshape holds it to that many columns when it runs.
    """
    for node in list(graph):
        if node.domain != "" or node.op_type != "GatherND":
            continue
        mask, pairs, shape = node.inputs[0], _made_by(node.inputs[1], "Concat"), node.outputs[0].shape
        batch_dims = node.attributes.get("batch_dims")
        if mask is None or mask.shape is None or len(mask.shape) != 2 or pairs is None or shape is None:
            continue
        rank = len(shape)
        if rank < 3 or len(pairs.inputs) != 2 or (batch_dims is not None and batch_dims.as_int() != 0):
            continue
        rows, columns = _counted(pairs.inputs[0], 0, rank=rank), _counted(pairs.inputs[1], rank - 1, rank=rank)
        if rows is None or columns is None or any(size != 1 for size in shape[1:-1]):
            continue
        if not _equal(rows.size, mask.shape[0]):
            continue
        if not _equal(columns.size, mask.shape[1]) and not _are_all_keys(columns.size, mask):
            continue
        name = node.outputs[0].name
        first = constant(graph, f"{name}/rows", array=np.array([0] + [1] * (rank - 2)))  # 0: as many as there are
        last = ir.node("Unsqueeze", [columns.limit, constant(graph, f"{name}/axis", array=np.array([0]))])
        sizes = ir.node("Concat", [first, last.outputs[0]], attributes={"axis": 0})
        for made, length in ((last, 1), (sizes, rank)):
            made.outputs[0].dtype, made.outputs[0].shape = ir.DataType.INT64, ir.Shape([length])
        graph.insert_before(node, [last, sizes])
        whole = ir.node("Reshape", [mask, sizes.outputs[0]], metadata_props=dict(node.metadata_props))
        _replace(graph, node, new=whole, shape=shape)


class _Joined(NamedTuple):
    """Heads before they are split: (batch, sequence, heads * features), how many, and what rotates them behind."""

    source: ir.Value
    heads: int
    rotary: ir.Node | None

    def rotated(self, graph: ir.Graph) -> ir.Value:
        """`source`, rotated as it is."""
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


def _joined(value: ir.Value | None) -> _Joined | None:
    """What `value` (batch, heads, sequence, features) was split from."""
    rotary = _made_by(value, "RotaryEmbedding")
    split = _made_by(value if rotary is None else rotary.inputs[0], "Transpose")
    reshape = None if split is None or _perm(split) != _SPLIT else _made_by(split.inputs[0], "Reshape")
    source = None if reshape is None else reshape.inputs[0]
    if value is None or value.shape is None or source is None or source.shape is None or len(source.shape) != 3:
        return None
    heads, size = value.shape[1], value.shape[3]
    known = isinstance(heads, int) and isinstance(size, int) and source.shape[2] == heads * size
    return _Joined(source, heads, rotary) if known and isinstance(heads, int) else None


def _only_user(value: ir.Value, op_type: str) -> ir.Node | None:
    users = [use.node for use in value.uses()]
    if len(users) != 1 or value.is_graph_output() or users[0].domain != "" or users[0].op_type != op_type:
        return None
    return users[0]


def heads_in_attention(graph: ir.Graph) -> None:
    """Attention takes its inputs before the heads are split, rotated or not, and gives them joined."""
    for node in list(graph):
        if node.domain != "" or node.op_type != "Attention" or len(node.inputs) < 3:
            continue
        if any(value is not None for value in node.inputs[6:]):
            continue
        sources = [_joined(value) for value in node.inputs[:3]]
        back = _only_user(node.outputs[0], "Transpose")
        join = None if back is None or _perm(back) != _SPLIT else _only_user(back.outputs[0], "Reshape")
        (q, k, v), shape = sources, None if join is None else join.outputs[0].shape
        if q is None or k is None or v is None or join is None or back is None or shape is None or len(shape) != 3:
            continue
        y = node.outputs[0].shape
        if k.heads != v.heads or y is None or not isinstance(y[3], int) or shape[2] != q.heads * y[3]:
            continue
        whole = ir.node(
            "Attention",
            [q.rotated(graph), k.rotated(graph), v.rotated(graph), *node.inputs[3:]],
            attributes={**node.attributes, "q_num_heads": q.heads, "kv_num_heads": k.heads},
            num_outputs=len(node.outputs),
            metadata_props=dict(node.metadata_props),
        )
        _replace(graph, join, new=whole, shape=shape)
        for was, now in zip(node.outputs[1:], whole.outputs[1:], strict=True):
            _take_place(graph, now, was=was)
        graph.remove([back, node], safe=True)


def without_repeats(value: ir.Value | None) -> ir.Value | None:
    """What is repeated for grouped heads by Unsqueeze, Expand and Reshape: Attention repeats it itself, uncopied."""
    source = value
    for op_type in ("Reshape", "Expand", "Unsqueeze"):
        node = _made_by(source, op_type)
        if node is None:
            return value
        source = node.inputs[0]
    return source


def _grown(value: ir.Value | None) -> ir.Node | None:
    """The Concat that makes a cache of a past, which is an input, and the new tokens, for this value alone."""
    cache = without_repeats(value)
    concat = _made_by(cache, "Concat")
    if cache is None or concat is None or len(concat.inputs) != 2 or concat.attributes["axis"].as_int() not in (-2, 2):
        return None
    past, new = concat.inputs
    if past is None or new is None or not past.is_graph_input() or past.shape is None or len(past.shape) != 4:
        return None
    return concat if len(cache.uses()) == 1 else None


def _is_causal(node: ir.Node) -> bool:
    """Whether the operator makes the mask: it begins at the first key, but behind the past where it is given one."""
    attribute = node.attributes.get("is_causal")
    return attribute is not None and attribute.as_int() != 0


def _has_past(node: ir.Node) -> bool:
    given = len(node.inputs) == 6 and None not in (*node.inputs[:3], *node.inputs[4:])
    return node.domain == "" and node.op_type == "Attention" and len(node.outputs) == 3 and given


def past_in_attention(graph: ir.Graph) -> None:
    """Attention takes the past and gives the present, where a Concat grows a cache for it."""
    for node in list(graph):
        if node.domain != "" or node.op_type != "Attention" or len(node.outputs) != 1 or len(node.inputs) < 3:
            continue
        if any(value is not None for value in node.inputs[4:]) or _is_causal(node):
            continue
        key, value = _grown(node.inputs[1]), _grown(node.inputs[2])
        if key is None or value is None or key is value:
            continue
        mask = node.inputs[3] if len(node.inputs) > 3 else None
        inputs = [node.inputs[0], key.inputs[1], value.inputs[1], mask, key.inputs[0], value.inputs[0]]
        whole = ir.node(
            "Attention",
            inputs,
            attributes=node.attributes,
            num_outputs=3,
            metadata_props=dict(node.metadata_props),
        )
        _replace(graph, node, new=whole, shape=node.outputs[0].shape)
        for was, now in ((key, whole.outputs[1]), (value, whole.outputs[2])):
            _take_place(graph, now, was=was.outputs[0])


def _reshape(graph: ir.Graph, before: ir.Node, value: ir.Value, *shape: int) -> ir.Value:
    sizes = ir.node("Constant", [], attributes={"value_ints": shape})
    node = ir.node("Reshape", [value, sizes.outputs[0]])
    graph.insert_before(before, [sizes, node])
    return node.outputs[0]


def _swap(graph: ir.Graph, before: ir.Node, *, value: ir.Value) -> ir.Value:
    node = ir.node("Transpose", [value], attributes={"perm": _SPLIT})
    graph.insert_before(before, node)
    return node.outputs[0]


def _size(past: ir.Value | None) -> int:
    """Features of a head."""
    assert past is not None and past.shape is not None
    size = past.shape[3]
    assert isinstance(size, int)
    return size


def _split(graph: ir.Graph, before: ir.Node, *, value: ir.Value | None, heads: int, past: ir.Value | None) -> ir.Value:
    """(batch, sequence, heads * features) -> (batch, heads, sequence, features), as in `past`."""
    assert value is not None
    return _swap(graph, before, value=_reshape(graph, before, value, 0, 0, heads, _size(past)))


def past_by_concat(graph: ir.Graph) -> bool:
    """Undo `past_in_attention` and `heads_in_attention` where Attention has a past; whether there was any.

    Attention is given split heads and a cache that Concat grows: the same numbers from an operator of one output.
    """
    nodes = [node for node in graph if _has_past(node) and not _is_causal(node)]
    for node in nodes:
        q, k, v, mask, past_key, past_value = node.inputs[:6]
        attributes = dict(node.attributes)
        heads = [attributes.pop(name).as_int() for name in ("q_num_heads", "kv_num_heads") if name in attributes]
        if heads:
            q = _split(graph, node, value=q, heads=heads[0], past=past_key)
            k = _split(graph, node, value=k, heads=heads[1], past=past_key)
            v = _split(graph, node, value=v, heads=heads[1], past=past_value)
        keys, values = (ir.node("Concat", pair, attributes={"axis": 2}) for pair in ((past_key, k), (past_value, v)))
        plain = ir.node(
            "Attention",
            [q, keys.outputs[0], values.outputs[0], mask],
            attributes=attributes,
            name=node.name,
            metadata_props=dict(node.metadata_props),
        )
        graph.insert_before(node, [keys, values, plain])
        y = plain.outputs[0]
        if heads:
            y = _reshape(graph, node, _swap(graph, node, value=y), 0, 0, heads[0] * _size(past_value))
        for was, now in zip(node.outputs, (y, keys.outputs[0], values.outputs[0]), strict=True):
            _take_place(graph, now, was=was)
        graph.remove(node, safe=True)
    return bool(nodes)
