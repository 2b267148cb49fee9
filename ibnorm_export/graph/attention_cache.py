"""Let Attention take and return the cache of keys and values, and undo that where a runtime cannot read it.

The exporter grows a cache by Concat and copies the keys and values of grouped heads. Attention can do both itself: it
takes the past and returns the present, and reads a shared head again instead of a copy. TensorRT's parser only takes
an Attention with one output, so `grow_cache_by_concat` undoes it.

Source: ONNX, operator Attention-23.
"""

from __future__ import annotations

import onnx_ir as ir

from ibnorm_export.graph.patterns import SPLIT_HEADS, producer_of_type, replace_node, replace_value

__all__ = ["grow_cache_by_concat", "grow_cache_in_attention", "without_repeats"]


def without_repeats(value: ir.Value | None) -> ir.Value | None:
    """The value that Unsqueeze, Expand and Reshape repeat for grouped heads; `value` itself if they do not."""
    source = value
    for op_type in ("Reshape", "Expand", "Unsqueeze"):
        node = producer_of_type(source, op_type)
        if node is None:
            return value
        source = node.inputs[0]
    return source


def _cache_growth(value: ir.Value | None) -> ir.Node | None:
    """The Concat that appends new tokens to a past that is an input, if only `value` uses it."""
    cache = without_repeats(value)
    concat = producer_of_type(cache, "Concat")
    if cache is None or concat is None or len(concat.inputs) != 2 or concat.attributes["axis"].as_int() not in (-2, 2):
        return None
    past, new = concat.inputs
    if past is None or new is None or not past.is_graph_input() or past.shape is None or len(past.shape) != 4:
        return None
    return concat if len(cache.uses()) == 1 else None


def _is_causal(node: ir.Node) -> bool:
    """Whether an Attention computes a causal mask, which starts at the first key, or after the past if there is one."""
    attribute = node.attributes.get("is_causal")
    return attribute is not None and attribute.as_int() != 0


def grow_cache_in_attention(graph: ir.Graph) -> None:
    """Let Attention take the past and return the present where a Concat grows the cache for it.

    Before: values have shapes; attention is the standard operator (opset 23 or later). After: outputs have the same
    names and values.
    """
    for node in list(graph):
        if node.domain != "" or node.op_type != "Attention" or len(node.outputs) != 1 or len(node.inputs) < 3:
            continue
        if any(value is not None for value in node.inputs[4:]) or _is_causal(node):
            continue
        key, value = _cache_growth(node.inputs[1]), _cache_growth(node.inputs[2])
        if key is None or value is None or key is value:
            continue
        mask = node.inputs[3] if len(node.inputs) > 3 else None
        whole = ir.node(
            "Attention",
            [node.inputs[0], key.inputs[1], value.inputs[1], mask, key.inputs[0], value.inputs[0]],
            attributes=node.attributes,
            num_outputs=3,
            metadata_props=dict(node.metadata_props),
        )
        replace_node(graph, node, new=whole, shape=node.outputs[0].shape)
        for concat, present in ((key, whole.outputs[1]), (value, whole.outputs[2])):
            replace_value(present, old=concat.outputs[0])


def _has_past(node: ir.Node) -> bool:
    given = len(node.inputs) == 6 and None not in (*node.inputs[:3], *node.inputs[4:])
    return node.domain == "" and node.op_type == "Attention" and len(node.outputs) == 3 and given


def _reshaped(graph: ir.Graph, before: ir.Node, value: ir.Value, *shape: int) -> ir.Value:
    sizes = ir.node("Constant", [], attributes={"value_ints": shape})
    node = ir.node("Reshape", [value, sizes.outputs[0]])
    graph.insert_before(before, [sizes, node])
    return node.outputs[0]


def _swapped(graph: ir.Graph, before: ir.Node, *, value: ir.Value) -> ir.Value:
    node = ir.node("Transpose", [value], attributes={"perm": SPLIT_HEADS})
    graph.insert_before(before, node)
    return node.outputs[0]


def _head_size(past: ir.Value | None) -> int:
    """Features of one head."""
    assert past is not None and past.shape is not None
    size = past.shape[3]
    assert isinstance(size, int)
    return size


def _split(graph: ir.Graph, before: ir.Node, *, value: ir.Value | None, heads: int, past: ir.Value | None) -> ir.Value:
    """(batch, sequence, heads * features) -> (batch, heads, sequence, features), with as many features as in `past`."""
    assert value is not None
    return _swapped(graph, before, value=_reshaped(graph, before, value, 0, 0, heads, _head_size(past)))


def grow_cache_by_concat(graph: ir.Graph) -> bool:
    """Undo `grow_cache_in_attention`, and `keep_heads_joined` around it, for every Attention that has a past.

    Before: inputs of the past have shapes. After: these Attention nodes take split heads and a cache that Concat grows,
    and have one output; outputs of the graph have the same names and values.

    Returns:
        Whether there was such an Attention.
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
            y = _reshaped(graph, node, _swapped(graph, node, value=y), 0, 0, heads[0] * _head_size(past_value))
        for old, new in zip(node.outputs, (y, keys.outputs[0], values.outputs[0]), strict=True):
            replace_value(new, old=old)
        graph.remove(node, safe=True)
    return bool(nodes)
