"""Positions are chosen before a norm, not after it: the others need no norm.

A vision transformer normalises every token and classifies by one. The norm is over the last axis alone, so
the same numbers come out of the chosen rows by themselves: at 197 tokens a 197th of the work, and one kernel
less in TensorRT-RTX 1.7.1, which splits a norm where a selection follows it.

Precondition: norms carry their rows' shape. Postcondition: names of outputs and of norms are what they were.
"""

from __future__ import annotations

import onnx_ir as ir

from ibnorm_export.spec import DOMAIN, OP_TYPES

__all__ = ["select_before_norm"]


def _axis(gather: ir.Node) -> int:
    attribute = gather.attributes.get("axis")
    return 0 if attribute is None else attribute.as_int()


def select_before_norm(graph: ir.Graph) -> None:
    """Gather(IBNorm(x)) becomes IBNorm(Gather(x)) where nothing else uses the norm and its axis stays whole."""
    for gather in list(graph):
        if gather.domain != "" or gather.op_type != "Gather":
            continue
        y, indices = gather.inputs
        norm = None if y is None else y.producer()
        if y is None or norm is None or norm.domain != DOMAIN or norm.op_type not in OP_TYPES:
            continue
        x, chosen = norm.inputs[0], gather.outputs[0]
        if x is None or x.shape is None or len(y.uses()) != 1 or y.is_graph_output():
            continue
        if _axis(gather) in (-1, len(x.shape) - 1):
            continue
        rows = ir.node(
            "Gather", [x, indices], attributes=gather.attributes, metadata_props=dict(norm.metadata_props)
        )  # fmt: skip
        rows.outputs[0].shape, rows.outputs[0].type = chosen.shape, chosen.type
        name, y.name = y.name, f"{y.name}/every_row"
        rows.outputs[0].name = f"{name}/input"
        graph.insert_before(norm, rows)
        norm.replace_input_with(0, rows.outputs[0])
        y.shape, y.type = chosen.shape, chosen.type
        chosen.replace_all_uses_with(y, replace_graph_outputs=True)
        graph.remove(gather, safe=True)
        y.name = name if not y.is_graph_output() else chosen.name
