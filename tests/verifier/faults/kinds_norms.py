"""Faults in norms: attributes, order, function bodies, the affine part, and norms that are inlined."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper

from ibnorm_export.op import onnx_functions
from tests.support.planting import drop_norm, is_skip, tanh_in_every_body
from tests.verifier.faults.edit import Edit
from tests.verifier.faults.kind import NORMED, Kind

__all__ = ["KINDS"]


def _attribute(name: str, value: Callable[[float], float]) -> Callable[[Edit], None]:
    def plant(e: Edit) -> None:
        node = e.norms[1]
        old = next(a.f for a in node.attribute if a.name == name)
        e.set(node, **{name: float(value(old))})

    return plant


def _other_type(e: Edit) -> None:
    node = e.norms[1]
    old = node.op_type[-1]
    new = "T" if old != "T" else "S"
    node.op_type = node.op_type[:-1] + new
    opset = next(o.version for o in e.proto.opset_import if o.domain == "")
    if not any(f.name == node.op_type for f in e.proto.functions):
        e.proto.functions.append(onnx_functions.functions(opset)[node.op_type])


def _twice(e: Edit) -> None:
    node = e.norms[-1]
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    plain = node.op_type.removeprefix("Skip")
    opset = next(o.version for o in e.proto.opset_import if o.domain == "")
    if not any(f.name == plain for f in e.proto.functions):
        e.proto.functions.append(onnx_functions.functions(opset)[plain])
    e.splice(node.output[0], lambda n, x: n(plain, x, *node.input[-2:], domain=node.domain, **attributes))


def _second_node(e: Edit) -> None:
    """A module has two nodes, one after the other."""
    node = next(n for n in e.norms if not is_skip(n))
    again = onnx.NodeProto()
    again.CopyFrom(node)
    again.name = f"{node.name}#2"
    node.output[0] = again.input[0] = e.new_name("first")
    place = list(e.proto.graph.node).index(node)
    e.proto.graph.node.insert(place + 1, again)


def _exchange(e: Edit) -> None:
    """Two norms trade their names and weights."""
    first, second = e.norms[0], e.norms[-1]
    first.name, second.name = second.name, first.name
    for position in (-2, -1):
        first.input[position], second.input[position] = second.input[position], first.input[position]
    props = [next(p for p in node.metadata_props if p.key == "module") for node in (first, second)]
    props[0].value, props[1].value = props[1].value, props[0].value


def _swap_affine(position: int) -> Callable[[Edit], None]:
    def plant(e: Edit) -> None:
        first, second = e.norms[0], e.norms[-1]
        first.input[position], second.input[position] = second.input[position], first.input[position]

    return plant


def _fill(position: int, kind: str) -> Callable[[Edit], None]:
    """A scale of ones or a bias of zeros stands for the weight."""

    def plant(e: Edit) -> None:
        node = e.norms[0]
        width = list(e.tensor(node.input[-2]).dims)
        name = f"ibnorm.{kind}.{width[0]}"
        if not any(t.name == name for t in e.proto.graph.initializer):
            e.constant(np.full(width, float(kind == "ones"), np.float32), name)
        node.input[position] = name

    return plant


def _bypass(e: Edit) -> None:
    """The node stays, and nothing reads its output."""
    node = next(n for n in e.norms if not is_skip(n))
    e.replace_reads(node.output[0], node.input[0])


def _skip_twice(e: Edit) -> None:
    node = next(n for n in e.norms if is_skip(n))
    node.input[1] = node.input[0]


def _sum_for_norm(e: Edit) -> None:
    """What follows reads the sum where it must read the norm."""
    node = next(n for n in e.norms if is_skip(n))
    node.output[0], node.output[1] = node.output[1], node.output[0]


def _scaled_input(e: Edit) -> None:
    node = e.norms[-1]
    e.splice_input(node, 0, lambda n, x: n("Mul", x, np.float32(1.05)))


def _zeros_that_are_not(e: Edit) -> None:
    e.rewrite("ibnorm.zeros", lambda a: a + np.asarray(0.01, a.dtype))


# ---- bodies of functions ----


def _in_bodies(change: Callable[[onnx.FunctionProto], bool]) -> Callable[[Edit], None]:
    def plant(e: Edit) -> None:
        changed = [change(body) for body in e.proto.functions if body.domain == "ai.ibnorm"]
        assert any(changed)

    return plant


def _swap_op(old: str, new: str) -> Callable[[onnx.FunctionProto], bool]:
    def change(body: onnx.FunctionProto) -> bool:
        found = [node for node in body.node if node.op_type == old]
        for node in found:
            node.op_type = new
        return bool(found)

    return change


def _last_norm_epsilon(body: onnx.FunctionProto) -> bool:
    found = [a for n in body.node if n.op_type == "LayerNormalization" for a in n.attribute if a.name == "epsilon"]
    for attribute in found:
        attribute.CopyFrom(onnx.helper.make_attribute("epsilon", 0.5))
    return bool(found)


def _body_axis(body: onnx.FunctionProto) -> bool:
    found = [a for n in body.node if n.op_type == "Constant" and n.output[0] == "axes" for a in n.attribute]
    for attribute in found:
        attribute.CopyFrom(onnx.helper.make_attribute("value", onnx.numpy_helper.from_array(np.array([-2]))))
    return bool(found)


def _constants_of_bodies(factor: float) -> Callable[[onnx.FunctionProto], bool]:
    def change(body: onnx.FunctionProto) -> bool:
        tensors = [a.t for n in body.node if n.op_type == "Constant" for a in n.attribute if a.name == "value"]
        found = [(t, array) for t in tensors if (array := onnx.numpy_helper.to_array(t)).dtype == np.float32]
        for tensor, array in found:
            tensor.CopyFrom(onnx.numpy_helper.from_array(array * np.float32(factor), tensor.name))
        return bool(found)

    return change


def _overload(e: Edit) -> None:
    node = e.norms[0]
    node.overload = "fast"
    opset = next(o.version for o in e.proto.opset_import if o.domain == "")
    right = onnx_functions.functions(opset)
    other = node.op_type[:-1] + ("T" if node.op_type[-1] != "T" else "S")
    wrong = onnx.FunctionProto()
    wrong.CopyFrom(right[other])
    wrong.name, wrong.overload = node.op_type, "fast"
    e.proto.functions.append(wrong)


def _no_functions(e: Edit) -> None:
    del e.proto.functions[:]


def _wrap(change: Callable[[Any, str], str]) -> Callable[[Edit], None]:
    """A function of another domain hides a fault."""

    def plant(e: Edit) -> None:
        opset = e.proto.opset_import
        nodes = [onnx.helper.make_node("Mul", ["x", "factor"], ["y"])]
        body = onnx.helper.make_function("planted", "Scale", ["x", "factor"], ["y"], nodes, list(opset))
        e.proto.functions.append(body)
        e.proto.opset_import.append(onnx.helper.make_opsetid("planted", 1))
        e.splice(e.head_input, change)

    return plant


# ---- norms that are inlined ----


def _clip_distance(limit: float) -> Callable[[Edit], None]:
    """The distance from the mean is clipped."""

    def plant(e: Edit) -> None:
        mean = next(n for n in e.proto.graph.node if n.op_type == "ReduceMean")
        distance = next(n for n in e.proto.graph.node if n.op_type == "Sub" and mean.output[0] in n.input)
        e.splice(distance.output[0], lambda n, x: n("Clip", x, np.float32(-limit), np.float32(limit)))

    return plant


def _inlined_epsilon(e: Edit) -> None:
    e.set(e.node("LayerNormalization"), epsilon=1e-2)


def _without_mean(e: Edit) -> None:
    """The first mean is not subtracted."""
    mean = next(n for n in e.proto.graph.node if n.op_type == "ReduceMean")
    distance = next(n for n in e.proto.graph.node if n.op_type == "Sub" and mean.output[0] in n.input)
    distance.op_type = "Identity"
    del distance.input[1:]


def _inlined_axis(e: Edit) -> None:
    e.set(e.node("LayerNormalization"), axis=-2)


def _inlined_scale(e: Edit) -> None:
    nodes = [n for n in e.proto.graph.node if n.op_type == "LayerNormalization"]
    nodes[0].input[1], nodes[-1].input[1] = nodes[-1].input[1], nodes[0].input[1]


def _inlined_lambda(e: Edit) -> None:
    mean = next(n for n in e.proto.graph.node if n.op_type == "ReduceMean")
    distance = next(n for n in e.proto.graph.node if n.op_type == "Sub" and mean.output[0] in n.input)
    node = next(n for n in e.proto.graph.node if n.op_type in ("Div", "Mul") and distance.output[0] in n.input)
    node.input[1] = e.constant(np.float32(3.3))


_INLINED: Final = ("vit inlined", "llama inlined")

KINDS: Final = tuple(
    Kind(name, forms, plant, group="norms")
    for name, forms, plant in (
        ("lambda x 1.01", NORMED, _attribute("lambd", lambda v: v * 1.01)),
        ("epsilon x 100", NORMED, _attribute("epsilon", lambda v: v * 100)),
        ("epsilon of zero", NORMED, _attribute("epsilon", lambda v: 0.0)),
        ("lambda is its reciprocal", NORMED, _attribute("lambd", lambda v: 1 / v)),
        ("another compression", NORMED, _other_type),
        ("another axis", ("llama", "vit bf16"), lambda e: e.set(e.norms[0], axis=1)),
        ("a norm is left out", NORMED, lambda e: drop_norm(e.proto, e.norms[-1])),
        ("a norm is applied twice", NORMED, _twice),
        ("a norm has a second node", ("llama", "gpt2", "llama genai"), _second_node),
        ("two norms exchanged with their weights", ("llama", "gpt2", "llama genai"), _exchange),
        ("scales of two norms exchanged", ("llama", "gpt2", "vit bf16", "llama genai", "llama int8"), _swap_affine(-2)),
        ("biases of two norms exchanged", ("gpt2", "vit"), _swap_affine(-1)),
        ("a scale of ones", ("llama", "gpt2", "vit bf16"), _fill(-2, "ones")),
        ("a bias of zeros", ("gpt2", "vit", "vit fp16"), _fill(-1, "zeros")),
        ("zeros that are not zero", ("llama", "llama genai"), _zeros_that_are_not),
        ("nothing reads a norm", ("llama", "gpt2", "vit"), _bypass),
        ("a residual is added to itself", ("llama", "gpt2", "vit"), _skip_twice),
        ("sum and norm exchanged", ("llama", "gpt2", "vit"), _sum_for_norm),
        ("the input of the last norm x 1.05", ("llama", "vit", "gpt2 bf16", "llama genai bf16"), _scaled_input),
        (
            "every body computes another compression",
            ("llama", "resnet", "llama int8"),
            lambda e: tanh_in_every_body(e.proto),
        ),
        ("a body without Abs", ("llama", "resnet", "llama genai"), _in_bodies(_swap_op("Abs", "Neg"))),
        ("a body that divides where it multiplies", ("llama", "vit"), _in_bodies(_swap_op("Div", "Mul"))),
        ("another epsilon in the bodies", ("llama", "vit", "resnet"), _in_bodies(_last_norm_epsilon)),
        ("another axis in the bodies", ("llama", "vit", "llama genai"), _in_bodies(_body_axis)),
        ("a constant of the bodies x 1.01", ("llama",), _in_bodies(_constants_of_bodies(1.01))),
        ("a function by its overload", ("llama", "vit"), _overload),
        ("no functions", ("llama", "vit", "llama genai"), _no_functions),
        (
            "a factor in a function of another domain",
            ("llama", "vit"),
            _wrap(lambda n, x: n("Scale", x, np.float32(1.01), domain="planted")),
        ),
        ("inlined: |d| > 200 clipped", _INLINED, _clip_distance(200.0)),
        ("inlined: |d| > 20 clipped", _INLINED, _clip_distance(20.0)),
        ("inlined: another epsilon", _INLINED, _inlined_epsilon),
        ("inlined: no first mean", _INLINED, _without_mean),
        ("inlined: another axis", _INLINED, _inlined_axis),
        ("inlined: scales exchanged", _INLINED, _inlined_scale),
        ("inlined: another lambda", _INLINED, _inlined_lambda),
    )
)
