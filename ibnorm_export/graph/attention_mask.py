"""Attention masks without a lookup by index.

The exporter looks padding up by the indices of every pair of row and key, which takes as long as a norm, although the
mask that it reads has exactly these rows and keys. The mask of GPT-2 goes through a Reshape first and stays as it is.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from ibnorm_export.artifacts.axes import PAST, SEQUENCE, axis_name
from ibnorm_export.graph.cleanup import constant
from ibnorm_export.graph.patterns import constant_integer, producer_of_type, replace_node

__all__ = ["use_mask_directly"]


class _Counter(NamedTuple):
    """Indices 0, 1, ... along one axis.

    Args:
        limit: their number, as a value of the graph.
        size: their number, as a size in a shape.
    """

    limit: ir.Value
    size: ir.SymbolicDim | int


def _counter(index: ir.Value | None, axis: int, *, rank: int) -> _Counter | None:
    """Read `index` (..., 1) as a counter, if it counts from 0 along `axis` and is constant along the others."""
    part = producer_of_type(index, "Unsqueeze")
    spread = None if part is None or constant_integer(part.inputs[1]) not in (-1, rank) else part.inputs[0]
    while (node := producer_of_type(spread, "Expand")) is not None:
        spread = node.inputs[0]
    shape = None if spread is None else spread.shape
    if spread is None or shape is None or len(shape) != rank:
        return None
    numbers: ir.Value | None = spread
    while (node := producer_of_type(numbers, "Unsqueeze")) is not None:
        numbers = node.inputs[0]
    count = producer_of_type(numbers, "Range")
    limit = None if count is None else count.inputs[1]
    if count is None or limit is None:
        return None
    if (constant_integer(count.inputs[0]), constant_integer(count.inputs[2])) != (0, 1):
        return None
    if any(size != 1 for other, size in enumerate(shape) if other != axis):
        return None
    return _Counter(limit, shape[axis])


def _equal(a: ir.SymbolicDim | int, b: ir.SymbolicDim | int) -> bool:
    """Whether two sizes are known to be equal; an unnamed size equals no other."""
    return a == b and not (isinstance(b, ir.SymbolicDim) and b.value is None)


def _covers_all_keys(columns: ir.SymbolicDim | int, mask: ir.Value) -> bool:
    """Whether `mask` is the input attention_mask (batch, total) of a model with a cache, and `columns` its total."""
    cast = producer_of_type(mask, "Cast")
    source = mask if cast is None else cast.inputs[0]
    if source is None or not source.is_graph_input() or source.name != "attention_mask":
        return False
    parts = (
        {axis_name(part) for part in str(columns.value).split(" + ")} if isinstance(columns, ir.SymbolicDim) else set()
    )
    return parts == {PAST, SEQUENCE}


def _columns_of_whole_mask(lookup: ir.Node) -> _Counter | None:
    """The columns that a GatherND reads from a mask (rows, columns), if it reads every row and every column."""
    mask, pairs, shape = lookup.inputs[0], producer_of_type(lookup.inputs[1], "Concat"), lookup.outputs[0].shape
    batch_dims = lookup.attributes.get("batch_dims")
    if mask is None or mask.shape is None or len(mask.shape) != 2 or pairs is None or shape is None:
        return None
    rank = len(shape)
    if rank < 3 or len(pairs.inputs) != 2 or (batch_dims is not None and batch_dims.as_int() != 0):
        return None
    rows, columns = _counter(pairs.inputs[0], 0, rank=rank), _counter(pairs.inputs[1], rank - 1, rank=rank)
    if rows is None or columns is None or any(size != 1 for size in shape[1:-1]):
        return None
    if not _equal(rows.size, mask.shape[0]):
        return None
    return columns if _equal(columns.size, mask.shape[1]) or _covers_all_keys(columns.size, mask) else None


def _has_constant_indices(lookup: ir.Node) -> bool:
    indices = lookup.inputs[1]
    return indices is not None and ir.convenience.get_const_tensor(indices) is not None


def _reshape_whole_mask(graph: ir.Graph, lookup: ir.Node) -> None:
    """Replace a GatherND by constant indices, in a file of fixed sizes, if it reads the whole mask in its order."""
    mask, indices = lookup.inputs[:2]
    tensor = None if indices is None else ir.convenience.get_const_tensor(indices)
    if mask is None or mask.shape is None or tensor is None or not mask.shape.is_static() or len(mask.shape) != 2:
        return
    batch_dims = lookup.attributes.get("batch_dims")
    if batch_dims is not None and batch_dims.as_int() != 0:
        return
    pairs = tensor.numpy()
    every = np.argwhere(np.ones(mask.shape.numpy(), dtype=np.bool_))  # in the order of the mask
    if pairs.shape[-1] != 2 or not np.array_equal(pairs.reshape(-1, 2), every):
        return
    sizes = constant(graph, f"{lookup.outputs[0].name}/sizes", array=np.array(pairs.shape[:-1]))
    reshape = ir.node("Reshape", [mask, sizes], metadata_props=dict(lookup.metadata_props))
    replace_node(graph, lookup, new=reshape, shape=ir.Shape(pairs.shape[:-1]))


def use_mask_directly(graph: ir.Graph) -> None:
    """Replace a GatherND that reads every row and column of a mask with a Reshape of the mask.

    The Reshape states the number of columns, so that a mask of another size is still an error at run time.

    Before: values have shapes. After: outputs have the same names and values.
    """
    for node in list(graph):
        if node.domain != "" or node.op_type != "GatherND":
            continue
        if _has_constant_indices(node):
            _reshape_whole_mask(graph, node)
            continue
        columns, shape = _columns_of_whole_mask(node), node.outputs[0].shape
        if columns is None or shape is None:
            continue
        name, rank = node.outputs[0].name, len(shape)
        rows = constant(graph, f"{name}/rows", array=np.array([0] + [1] * (rank - 2)))  # 0 keeps the mask's own size
        last = ir.node("Unsqueeze", [columns.limit, constant(graph, f"{name}/axis", array=np.array([0]))])
        sizes = ir.node("Concat", [rows, last.outputs[0]], attributes={"axis": 0})
        for added, length in ((last, 1), (sizes, rank)):
            added.outputs[0].dtype, added.outputs[0].shape = ir.DataType.INT64, ir.Shape([length])
        graph.insert_before(node, [last, sizes])
        reshape = ir.node("Reshape", [node.inputs[0], sizes.outputs[0]], metadata_props=dict(node.metadata_props))
        replace_node(graph, node, new=reshape, shape=shape)
