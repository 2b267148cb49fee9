"""Expansion of the norms into standard operators, in the form that runtimes and tools with few operators take.

A function must serve every dtype, so its body casts to float32 and back, also where that changes nothing. The expanded
graph has no such Cast, no CastLike (ncnn has none), and its constants are initializers.
"""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as passes

from ibnorm_export.graph.cleanup import share_constants
from ibnorm_export.graph.patterns import replace_value

__all__ = ["inline_norms", "remove_idle_casts"]


def inline_norms(model: ir.Model) -> None:
    """Expand every function of a model.

    Before: the model has the functions of its norms; values have shapes and types. After: it has no functions; outputs
    have the same names and values.

    Args:
        model: the model, changed in place.
    """
    stored = set(model.graph.initializers)
    passes.InlinePass()(model)
    passes.ShapeInferencePass()(model)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    share_constants(model.graph, without=stored)
    remove_idle_casts(model.graph)
    passes.RemoveUnusedOpsetsPass()(model)


def remove_idle_casts(graph: ir.Graph) -> None:
    """Remove every Cast and CastLike to the type that its input already has; other CastLike become Cast.

    Before: values have types. After: outputs of the graph have the same names and values.
    """
    for node in list(graph):
        source = node.inputs[0] if node.domain == "" and node.op_type in ("Cast", "CastLike") else None
        if source is None:
            continue
        target = _target(node)
        result = node.outputs[0]
        if target is None or source.dtype is None:
            continue
        if target == source.dtype and not _is_end_to_end(source, result):
            if result.is_graph_output():
                replace_value(source, old=result)
            else:
                result.replace_all_uses_with(source)
            graph.remove(node, safe=True)
        elif node.op_type == "CastLike":
            cast = ir.node(
                "Cast",
                [source],
                attributes={"to": target.value},
                name=node.name,
                metadata_props=dict(node.metadata_props),
            )
            graph.insert_before(node, cast)
            replace_value(cast.outputs[0], old=result)
            graph.remove(node, safe=True)


def _target(node: ir.Node) -> ir.DataType | None:
    """The type that a Cast or CastLike converts to; None if it is unknown."""
    if node.op_type == "Cast":
        return ir.DataType(node.attributes["to"].as_int())
    like = node.inputs[1]
    return None if like is None else like.dtype


def _is_end_to_end(source: ir.Value, result: ir.Value) -> bool:
    """Whether a node joins an input, initializer or output of the graph to an output, so that it must stay."""
    fixed = source.is_graph_input() or source.is_initializer() or source.is_graph_output()
    return result.is_graph_output() and fixed
