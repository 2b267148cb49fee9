"""A cache of fixed capacity: TensorScatter writes new keys and values in place, where Concat would copy all of them.

Inputs and outputs keep their names. past_key_values.N.* and present.N.* are buffers of `capacity` tokens; the caller
may bind both to the same memory. attention_mask (batch, total) covers all tokens so far, and a call writes the last
`sequence` of them. Attention ignores the buffer after `total`, but its values must be finite.

Source: ONNX, operators TensorScatter-24 and Attention-24.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import onnx_ir as ir

from ibnorm_export.artifacts.axes import CAPACITY
from ibnorm_export.errors import ExportError
from ibnorm_export.graph.attention_cache import without_repeats
from ibnorm_export.graph.cleanup import constant

__all__ = ["STATIC_OPSET", "keep_cache_in_place"]

#: The first opset with TensorScatter and with `nonpad_kv_seqlen` of Attention.
STATIC_OPSET: Final = 24

_PAST: Final = "past_key_values."


class _Lengths:
    """Lengths that nodes at the start of the graph compute from the shapes of inputs: int64, (1,) or (batch,)."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._last: ir.Node | None = None  # nodes of the graph may be removed before `free` is called
        self._inputs = {value.name: value for value in graph.inputs}
        self.total = self._size("attention_mask", 1, label="cache/total")
        sequence = self._size("input_ids", 1, label="cache/sequence")
        batch = self._size("input_ids", 0, label="cache/batch")
        self.past = self._make("Sub", [self.total, sequence], name="cache/past")
        self.starts = self._make("Expand", [self.past, batch], name="cache/starts")
        self.totals = self._make("Expand", [self.total, batch], name="cache/totals")

    def free(self, cache: str) -> ir.Value:
        """Number of tokens that the buffer can still take after `total`."""
        return self._make("Sub", [self._size(cache, 2, label="cache/capacity"), self.total], name="cache/free")

    def _make(self, op_type: str, inputs: list[ir.Value], *, name: str, **attributes: int) -> ir.Value:
        node = ir.node(op_type, inputs, attributes=attributes, name=name)
        node.outputs[0].name = name
        node.outputs[0].dtype = ir.DataType.INT64
        if self._last is None:
            self._graph.insert_before(self._graph[0], node)
        else:
            self._graph.insert_after(self._last, node)
        self._last = node
        return node.outputs[0]

    def _size(self, name: str, axis: int, *, label: str) -> ir.Value:
        return self._make("Shape", [self._inputs[name]], name=label, start=axis, end=axis + 1)


def _with_capacity(value: ir.Value) -> None:
    assert value.shape is not None
    value.shape = ir.Shape([CAPACITY if axis == 2 else size for axis, size in enumerate(value.shape)])


def _write_in_place(graph: ir.Graph, past: ir.Value, *, lengths: _Lengths) -> ir.Value:
    """Replace the Concat that grows `past` with a TensorScatter and return its output."""
    written = None
    for node, _ in list(past.uses()):
        if node.op_type == "Shape":
            if node.attributes["start"].as_int() == 2:
                node.outputs[0].replace_all_uses_with(lengths.past)
                graph.remove(node, safe=True)
        elif node.op_type == "Concat" and len(node.inputs) == 2 and node.inputs[0] is past:
            scatter = ir.node(
                "TensorScatter",
                [past, node.inputs[1], lengths.starts],
                attributes={"axis": -2, "mode": "linear"},
                metadata_props=dict(node.metadata_props),
            )
            old, written = node.outputs[0], scatter.outputs[0]
            written.shape, written.type, name = old.shape, old.type, old.name
            graph.insert_before(node, scatter)
            old.name = f"{name}/grown"
            written.name = name
            old.replace_all_uses_with(written, replace_graph_outputs=True)
            graph.remove(node, safe=True)
    if written is None:
        raise ExportError(f"--cache static: no Concat grows {past.name}; export with --cache dynamic")
    _with_capacity(past)
    _with_capacity(written)
    return written


def _pad_mask(graph: ir.Graph, before: ir.Node, *, mask: ir.Value, pads: list[ir.Value], fill: ir.Value) -> ir.Value:
    """Extend a mask (..., total) to the capacity of the cache, with the parts of `pads` joined."""
    ends = ir.node("Concat", pads, attributes={"axis": 0}, name="cache/pads")
    wide = ir.node("Pad", [mask, ends.outputs[0], fill], name="cache/mask")
    ends.outputs[0].name, wide.outputs[0].name = "cache/pads", "cache/mask"
    ends.outputs[0].dtype = ir.DataType.INT64
    assert mask.shape is not None
    wide.outputs[0].shape = ir.Shape([*list(mask.shape)[:3], CAPACITY])
    wide.outputs[0].dtype = ir.DataType.BOOL
    graph.insert_before(before, [ends, wide])
    return wide.outputs[0]


def keep_cache_in_place(graph: ir.Graph) -> None:
    """Write the cache in place, and let Attention read it.

    Before: the graph has the task "text-generation" and opset 24 or later; its attention is the standard operator with
    a boolean mask. After: inputs and outputs have the same names; the cache has the dynamic axis `capacity`.

    Raises:
        ExportError: the cache or the attention has an unsupported form.
    """
    lengths = _Lengths(graph)
    caches = [value for value in graph.inputs if (value.name or "").startswith(_PAST)]
    written = {_write_in_place(graph, value, lengths=lengths) for value in caches}
    free = lengths.free(str(caches[0].name))
    zeros = constant(graph, "cache/zeros", array=np.zeros(7, dtype=np.int64))
    no = constant(graph, "cache/no", array=np.array(False))
    padded: dict[ir.Value, ir.Value] = {}
    for node in list(graph):
        if node.op_type != "Attention" or node.domain != "":
            continue
        key, value = (without_repeats(repeated) for repeated in node.inputs[1:3])
        if key not in written or value not in written:
            continue
        mask = node.inputs[3] if len(node.inputs) > 3 else None
        if mask is None or mask.dtype != ir.DataType.BOOL or len(node.inputs) > 4:
            raise ExportError("--cache static: attention has no boolean mask; export with --cache dynamic")
        if mask not in padded:  # ONNX Runtime 1.31 rejects a mask that is shorter than the buffer
            padded[mask] = _pad_mask(graph, node, mask=mask, pads=[zeros, free], fill=no)
        node.replace_input_with(1, key)
        node.replace_input_with(2, value)
        node.resize_inputs(7)
        node.replace_input_with(3, padded[mask])
        node.replace_input_with(6, lengths.totals)
    if not padded:
        raise ExportError("--cache static: the graph has no Attention over its cache; export with --cache dynamic")
