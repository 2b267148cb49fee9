"""onnxscript's standard rewrites, applied in a time that grows with the model and not with its square.

onnxscript tries every rule on every node, and for a rule with several outputs it lists all nodes of the model first.
Here a rule is tried only on nodes of the operator that its pattern ends in; on all others it cannot match.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import onnxscript.rewriter
from onnxscript.rewriter import RewriteRule

__all__ = ["apply_standard_rules"]


class _RuleOfOperator:
    """A rule that is tried only on the nodes that may match."""

    def __init__(self, rule: RewriteRule) -> None:
        self._rule = rule
        ends = rule._target_pattern.output_nodes
        self._operator = ends[0].op_identifier() if ends else None  # None if the pattern takes several

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rule, name)

    def try_rewrite(self, model: ir.Model, graph: ir.Graph | ir.Function, node: ir.Node, **others: Any) -> Any:
        """What onnxscript's rule returns: None if it does not match."""
        if self._operator is not None and self._operator != node.op_identifier():
            return None
        return self._rule.try_rewrite(model, graph, node, **others)


def apply_standard_rules(model: ir.Model) -> None:
    """Do what `onnxscript.rewriter.rewrite(model)` does, with the same result.

    Args:
        model: the model, changed in place.
    """
    rules = onnxscript.rewriter._DEFAULT_REWRITE_RULES
    onnxscript.rewriter.rewrite(model, [_RuleOfOperator(rule) for rule in rules])
