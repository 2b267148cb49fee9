"""Passes that turn the graph of torch.export into one that only holds what the model computes.

Weights have the names of the state dict; a transposed one is called NAME.T. A norm without scale or bias uses ones or
zeros. Nodes record the module that they came from. The exporter's own metadata is removed.
"""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes
import onnxscript.optimizer
from numpy.typing import NDArray
from onnxscript.rewriter import onnx_fusions

from ibnorm_export.errors import ExportError
from ibnorm_export.graph.standard_rules import apply_standard_rules
from ibnorm_export.graph.weight_tensors import WeightTensor
from ibnorm_export.op import onnx_functions as onnx_op
from ibnorm_export.op.spec import DOMAIN

__all__ = [
    "attach_functions",
    "connect_affine",
    "constant",
    "forget_initializer_info",
    "name_nodes",
    "restore_weight_names",
    "share_constants",
    "simplify",
    "transpose_weights",
]


def restore_weight_names(graph: ir.Graph, entry: str) -> None:
    """Give initializers the names of the state dict.

    Args:
        graph: the graph as the exporter returns it.
        entry: prefix that the exporter's names have, for the attribute that holds the model.
    """
    for value in list(graph.initializers.values()):
        if value.name is not None and value.name.startswith(entry):
            del graph.initializers[value.name]
            value.name = value.name.removeprefix(entry)
            assert value.const_value is not None
            value.const_value.name = value.name
            graph.initializers[value.name] = value


def constant(graph: ir.Graph, name: str, *, array: NDArray[Any]) -> ir.Value:
    """Add an initializer to the graph and return it."""
    tensor = ir.Tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def _transposed(matrix: ir.TensorProtocol, name: str) -> ir.TensorProtocol:
    """The transpose of a matrix, which exists only while it is written."""
    if isinstance(matrix, WeightTensor):
        return matrix.transpose(name)
    shape = ir.Shape(reversed(matrix.shape.numpy()))

    def transpose() -> ir.TensorProtocol:
        return ir.Tensor(np.ascontiguousarray(matrix.numpy().T), name=name)

    return ir.LazyTensor(transpose, dtype=matrix.dtype, shape=shape, name=name)


def transpose_weights(graph: ir.Graph, *, tied_once: bool = False) -> None:
    """Store a matrix that a Transpose reads as its transpose, NAME.T, which is computed when the file is written.

    Runtimes would transpose it at every load. Constant folding would too, but would lose the name. A tied matrix, which
    an embedding reads as it is, is stored a second time as its transpose, unless `tied_once`: then the Transpose stays.

    Before: initializers have the names of the state dict. After: no Transpose reads a matrix of weights directly, but
    one that is tied.
    """
    transposed: dict[str, ir.Value] = {}
    for node in list(graph):
        source = node.inputs[0] if node.op_type == "Transpose" and node.domain == "" else None
        if source is None or source.name not in graph.initializers or source.const_value is None:
            continue
        perm = node.attributes.get("perm")
        if perm is None or list(perm.as_ints()) != [1, 0]:
            continue
        if tied_once and any(user.op_type != "Transpose" for user, _ in source.uses()):
            continue
        assert source.name is not None and source.shape is not None and source.dtype is not None
        if source.name not in transposed:
            name, matrix = f"{source.name}.T", source.const_value
            shape = ir.Shape(reversed(source.shape.numpy()))
            lazy = _transposed(matrix, name)
            value = ir.Value(name=name, shape=shape, type=ir.TensorType(source.dtype), const_value=lazy)
            graph.register_initializer(value)
            transposed[source.name] = value
        node.outputs[0].replace_all_uses_with(transposed[source.name], replace_graph_outputs=True)
        graph.remove(node, safe=True)


def connect_affine(graph: ir.Graph) -> None:
    """Give every norm without a scale or bias ones or zeros, which norms of the same width share.

    Before: inputs of norms have shapes and types. After: every input of every norm is connected.

    Raises:
        ExportError: the size of a normalised axis is dynamic.
    """
    for node in graph:
        if node.domain != DOMAIN:
            continue
        x = node.inputs[0]
        assert x is not None and x.shape is not None and x.dtype is not None
        size = x.shape[-1]
        if not isinstance(size, int):
            raise ExportError(f"norm {node.name}: the size of the normalised axis is dynamic; it must be fixed")
        arity = 4 if node.op_type.startswith("Skip") else 3
        node.resize_inputs(arity)  # the list is shorter if the last input is absent
        for position, kind, number in ((arity - 2, "ones", 1.0), (arity - 1, "zeros", 0.0)):
            if node.inputs[position] is not None:
                continue
            name = f"ibnorm.{kind}.{size}"
            if name not in graph.initializers:
                tensor = ir.Tensor(np.full(size, number, dtype=x.dtype.numpy()), name=name)
                graph.register_initializer(
                    ir.Value(name=name, shape=ir.Shape([size]), type=ir.TensorType(x.dtype), const_value=tensor)
                )
            node.replace_input_with(position, graph.initializers[name])


def share_constants(graph: ir.Graph, *, without: Collection[str] = ()) -> None:
    """Merge small initializers that are equal.

    Args:
        graph: the graph.
        without: names of initializers that stay as they are.
    """
    first: dict[tuple[Any, ...], ir.Value] = {}
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or tensor.size > 1024 or value.is_graph_output() or value.name in without:
            continue
        key = (tensor.dtype, tuple(tensor.shape.numpy()), tensor.tobytes())
        if first.setdefault(key, value) is not value:
            value.replace_all_uses_with(first[key])
            assert value.name is not None
            del graph.initializers[value.name]


@contextlib.contextmanager
def _weights_unknown(graph: ir.Graph, weights: set[str]) -> Iterator[None]:
    """Turn weights into inputs temporarily, so that no pass folds, merges or drops one because of its value."""
    hidden = [(value, value.const_value) for name, value in graph.initializers.items() if name in weights]
    inputs = len(graph.inputs)
    for value, _ in hidden:
        assert value.name is not None
        del graph.initializers[value.name]
        value.const_value = None
        graph.inputs.append(value)
    try:
        yield
    finally:
        del graph.inputs[inputs:]
        for value, tensor in hidden:
            if value.uses():
                value.const_value = tensor
                graph.register_initializer(value)


def _fuse_standard(model: ir.Model) -> None:
    """Fuse nodes into RotaryEmbedding and the other operators of opset 23.

    onnxscript 0.7 only does so at opset 23, so a later opset is lowered temporarily.
    """
    opset = model.opset_imports[""]
    model.opset_imports[""] = min(opset, 23)
    onnx_fusions.fuse(model)
    model.opset_imports[""] = opset


def simplify(model: ir.Model, weights: set[str]) -> None:
    """Fold constants and apply the standard rewrites.

    Args:
        model: the model, changed in place.
        weights: names of initializers that keep their names and values.
    """
    with _weights_unknown(model.graph, weights):
        for _ in range(2):
            onnxscript.optimizer.fold_constants(model, onnx_shape_inference=True)
            apply_standard_rules(model)
            _fuse_standard(model)
            passes.RemoveUnusedNodesPass()(model)
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        share_constants(model.graph)
        ir.passes.Sequential(
            passes.CommonSubexpressionEliminationPass(),
            passes.RemoveUnusedNodesPass(),
            passes.RemoveUnusedOpsetsPass(),
            passes.OutputFixPass(),
            passes.NameFixPass(),
            passes.ShapeInferencePass(),
        )(model)


def name_nodes(graph: ir.Graph, entry: str) -> None:
    """Record in every node the module that it came from, and name norms after theirs; remove the exporter's metadata.

    Args:
        graph: the graph; nodes have the exporter's metadata "pkg.torch.onnx.name_scopes".
        entry: prefix of the exporter's module paths, for the attribute that holds the model.
    """
    seen: dict[str, int] = {}
    for node in graph:
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
        node.metadata_props.clear()
        node.doc_string = None
        if scopes is None:
            continue
        path = (ast.literal_eval(scopes)[:-1] or [""])[-1]
        module = path.removeprefix(entry)
        if module and module != entry.rstrip("."):
            node.metadata_props["module"] = module
            if node.domain == DOMAIN:
                seen[module] = seen.get(module, 0) + 1
                node.name = module if seen[module] == 1 else f"{module}#{seen[module]}"
    for value in [*graph.inputs, *graph.outputs, *graph.initializers.values()]:
        value.metadata_props.clear()
        value.doc_string = None
    for node in graph:
        for output in node.outputs:
            output.metadata_props.clear()


def _width(norm: ir.Node) -> int:
    scale = norm.inputs[-2]
    assert scale is not None and scale.shape is not None
    return scale.shape.numpy()[0]


def attach_functions(model: ir.Model, opset: int) -> None:
    """Add the functions of the norms that a model uses.

    Args:
        model: the model, changed in place.
        opset: version of its default domain.
    """
    norms = [(node.op_type, _width(node)) for node in model.graph if node.domain == DOMAIN]
    for op_type, body in onnx_op.functions(opset, norms).items():
        if op_type in dict(norms):
            function = ir.serde.deserialize_function(body)
            model.functions[function.identifier()] = function


def forget_initializer_info(graph: ir.Graph) -> None:
    """Forget the shapes and types of initializers, which their tensors have, so that no value_info repeats them.

    ONNX Runtime's quantize_dynamic fails on a quantised weight that has one.

    Args:
        graph: the graph, changed in place just before it is written.
    """
    inputs = set(graph.inputs)
    for value in graph.initializers.values():
        if value not in inputs:
            value.shape = value.type = None
