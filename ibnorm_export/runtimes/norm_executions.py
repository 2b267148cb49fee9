"""Where the norms of an optimised graph stand: which of them a runtime has put a copy between host and device beside.

ONNX Runtime inserts `MemcpyFromHost` and `MemcpyToHost` where neighbours run on different devices. Such a
copy costs more than the norm itself, so a fused kernel beside one has not proved anything.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import onnx

__all__ = ["COPY_OPS", "copies_beside"]

#: Op types of the nodes that ONNX Runtime copies tensors between host and device with.
COPY_OPS = frozenset({"MemcpyFromHost", "MemcpyToHost"})


def copies_beside(graph: onnx.GraphProto, nodes: frozenset[tuple[str, str]]) -> Mapping[tuple[str, str], int]:
    """How many copies touch each of `nodes`, directly at an input or an output.

    Args:
        graph: as the runtime optimised it.
        nodes: (name, op type) of those to look at; one that the graph lacks counts 0.

    Returns:
        The number of copy nodes by (name, op type): each counts once for a node, however many edges join them.
    """
    producers = {name: index for index, node in enumerate(graph.node) for name in node.output if name}
    consumers: dict[str, set[int]] = {}
    for index, node in enumerate(graph.node):
        for name in node.input:
            if name:
                consumers.setdefault(name, set()).add(index)
    found: Counter[tuple[str, str]] = Counter()
    for node in graph.node:
        key = (node.name, node.op_type)
        if key not in nodes:
            continue
        neighbours = {producers[name] for name in node.input if name in producers}
        neighbours.update(*(consumers.get(name, set()) for name in node.output))
        found[key] += sum(graph.node[index].op_type in COPY_OPS for index in neighbours)
    return found
