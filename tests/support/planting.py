"""Changes to an exported file that act like a bug of an exporter or a graph pass.

A norm is `IBNorm*(X, scale, bias) -> Y` or `SkipIBNorm*(X, skip, scale, bias) -> (Y, sum)`; each change handles both.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper

from ibnorm_export import Compression
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.op import onnx_functions as onnx_op
from ibnorm_export.op.spec import DOMAIN

Array = np.ndarray[Any, Any]
Change = Callable[[onnx.ModelProto], None]


def plant(exported: ExportedModel, folder: Path, change: Change) -> ExportedModel:
    """Write a copy of the file with the change to `folder`."""
    proto = onnx.load(exported.path)
    before = proto.SerializeToString()
    change(proto)
    assert proto.SerializeToString() != before, "the change has no effect"
    onnx.save(proto, folder / "planted.onnx")
    return ExportedModel(folder / "planted.onnx")


def initializer(proto: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(t for t in proto.graph.initializer if t.name == name)


def rewrite(proto: onnx.ModelProto, name: str, change: Callable[[Array], Any]) -> None:
    """Replace the values of an initializer and keep its type and shape."""
    tensor = initializer(proto, name)
    array = onnx.numpy_helper.to_array(tensor)
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(change(array.copy())), name))


def flip_one_sign(proto: onnx.ModelProto) -> None:
    def flip(array: Array) -> Array:
        array.flat[np.abs(array).argmax()] *= -1
        return array

    rewrite(proto, "model.layers.0.mlp.down_proj.weight.T", flip)


def insert(proto: onnx.ModelProto, before: onnx.NodeProto, node: onnx.NodeProto) -> None:
    proto.graph.node.insert(list(proto.graph.node).index(before), node)


def norms(proto: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in proto.graph.node if node.domain == DOMAIN]


def norm_of(proto: onnx.ModelProto, module: str) -> onnx.NodeProto:
    return next(node for node in norms(proto) if node.name == module)


def is_skip(node: onnx.NodeProto) -> bool:
    return node.op_type.startswith("Skip")


def set_attribute(node: onnx.NodeProto, name: str, value: float) -> None:
    next(a for a in node.attribute if a.name == name).f = value


def swap_scales(a: onnx.NodeProto, b: onnx.NodeProto) -> None:
    a.input[-2], b.input[-2] = b.input[-2], a.input[-2]


def drop_norm(proto: onnx.ModelProto, node: onnx.NodeProto) -> None:
    """Remove a norm: what reads its output reads its input."""
    kept = node.input[0]
    if is_skip(node):
        kept = node.output[1]
        insert(proto, node, onnx.helper.make_node("Add", node.input[:2], [kept], name="sum"))
    for other in proto.graph.node:
        for position, name in enumerate(other.input):
            if name == node.output[0]:
                other.input[position] = kept
    proto.graph.node.remove(node)


def tanh_in_every_body(proto: onnx.ModelProto) -> None:
    """Make every function, whatever its name, compute tanh."""
    for body in proto.functions:
        make = onnx_op.skip_function if body.name.startswith("Skip") else onnx_op.function
        wrong = make(Compression.TANH, next(o.version for o in body.opset_import if o.domain == ""))
        wrong.name = body.name
        body.CopyFrom(wrong)
