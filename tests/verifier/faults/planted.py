"""Faults planted in correct files, and correct files of many kinds, to measure verification."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import onnx_ir as ir

from ibnorm_export import IBNormSpec, models
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.tensors import DType
from ibnorm_export.exporter.export import ExportOptions
from ibnorm_export.exporter.single_file import export_file
from ibnorm_export.graph.attention_cache import grow_cache_by_concat
from ibnorm_export.op import onnx_functions as onnx_op
from ibnorm_export.op.spec import DOMAIN
from ibnorm_export.verifier.report import Finding
from ibnorm_export.verifier.verify import VerifyOptions, verify
from tests.support.checkpoints import LLAMA, VIT, save_checkpoint
from tests.support.planting import (
    Change,
    drop_norm,
    flip_one_sign,
    insert,
    is_skip,
    norm_of,
    rewrite,
    set_attribute,
    swap_scales,
)


@dataclass(frozen=True)
class Base:
    """A correct file and its checkpoint."""

    checkpoint: Path
    file: Path
    task: str


def bases(folder: Path) -> dict[str, Base]:
    """The four correct files that faults are planted in."""
    llama = save_checkpoint(folder / "llama", LLAMA, IBNormSpec("L", 4.0, epsilon=1e-5, bias=False))
    vit = save_checkpoint(folder / "vit", VIT, IBNormSpec("T", 3.0, epsilon=1e-5))
    made = {}
    for name, checkpoint, task, dtype in (
        ("llama", llama, "forward", DType.FP32),
        ("half", llama, "forward", DType.FP16),
        ("decoder", llama, "text-generation", DType.FP32),
        ("vit", vit, "forward", DType.FP32),
    ):
        file = folder / f"{name}.onnx"
        export_file(models.load(checkpoint, None, task=task), file, options=ExportOptions(dtype=dtype))
        made[name] = Base(checkpoint, file, task)
    return made


# ---- the faults ----


def at(proto: onnx.ModelProto, module: str, op_type: str = "") -> list[onnx.NodeProto]:
    """Nodes of one module, optionally only those of one op type."""
    return [
        node
        for node in proto.graph.node
        if any(p.key == "module" and p.value == module for p in node.metadata_props) and op_type in ("", node.op_type)
    ]


def attribute(module: str, name: str, value: float) -> Change:
    return lambda proto: set_attribute(norm_of(proto, module), name, value)


def tanh_at_one_norm(proto: onnx.ModelProto) -> None:
    node = norm_of(proto, "model.layers.1.post_attention_layernorm")
    node.op_type = node.op_type.removesuffix("L") + "T"
    proto.functions.append(onnx_op.functions(23)[node.op_type])


def skip_residual(proto: onnx.ModelProto) -> None:
    """The output of the first attention is not added to its input."""
    node = norm_of(proto, "model.layers.0.post_attention_layernorm")
    if is_skip(node):
        insert(
            proto, node, onnx.helper.make_node("Identity", [node.input[1]], [node.output[1]], name="without residual")
        )
        node.op_type = node.op_type.removeprefix("Skip")
        del node.input[0], node.output[1]
    else:
        add = at(proto, "model.layers.0", "Add")[0]
        add.op_type = "Identity"
        del add.input[0]


def overflow(proto: onnx.ModelProto) -> None:
    """Multiply by 3e4 twice after one projection and divide again: no effect in float32, infinity in float16."""
    (node,) = at(proto, "model.layers.0.mlp.down_proj", "MatMul")
    output, names = node.output[0], ["projected", "louder", "loud", "quieter"]
    node.output[0] = names[0]
    place = list(proto.graph.node).index(node) + 1
    for name, value in (("large", 3e4), ("small", 1 / 3e4)):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value, np.float16), name))
    for index, factor in enumerate(("large", "large", "small", "small")):
        made = onnx.helper.make_node("Mul", [names[index], factor], [[*names, output][index + 1]], name=f"times{index}")
        proto.graph.node.insert(place + index, made)
    kind = next(v for v in proto.graph.value_info if v.name == output)
    for name in names:
        proto.graph.value_info.add().CopyFrom(kind)
        proto.graph.value_info[-1].name = name


def wrong_mask(proto: onnx.ModelProto) -> None:
    """Tokens attend to the following ones, not to the previous ones."""
    next(n for n in proto.graph.node if n.op_type == "LessOrEqual").op_type = "GreaterOrEqual"


def next_position(proto: onnx.ModelProto) -> None:
    """Queries of the first layer are rotated to the position after their own."""
    query = at(proto, "model.layers.0.self_attn", "RotaryEmbedding")[0]
    cos, sin = (next(n for n in proto.graph.node if n.output[0] == name) for name in query.input[1:3])
    angle = cos.input[0]
    insert(proto, cos, onnx.helper.make_node("Add", [angle, "model.rotary_emb.inv_freq"], ["angle/next"], name="next"))
    for index, (op_type, name) in enumerate((("Cos", "cos/next"), ("Sin", "sin/next")), 1):
        insert(proto, query, onnx.helper.make_node(op_type, ["angle/next"], [name], name=name))
        query.input[index] = name
    assert sin.input[0] == angle


def drop_norm_bias(proto: onnx.ModelProto) -> None:
    node = norm_of(proto, "vit.layers.0.layernorm_after")
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(32, np.float32), "ibnorm.zeros.32"))
    node.input[-1] = "ibnorm.zeros.32"


def naive_log_body(proto: onnx.ModelProto) -> None:
    """c = Sign(t) * Log(1 + |t|)."""
    for body in proto.functions:
        by_output = {n.output[0]: n for n in body.node}
        by_output["log_q"].input[0] = "one_r"
        sign = by_output["q_1"]
        sign.op_type = "Sign"
        del sign.input[:]
        sign.input.append("t")
        by_output["numerator"].op_type = "Identity"
        del by_output["numerator"].input[0]
        by_output["c"].op_type = "Mul"


def cache_row_out_of_place(proto: onnx.ModelProto) -> None:
    """The new row of the values' cache comes before the old ones."""
    model = ir.serde.deserialize_model(proto)
    assert grow_cache_by_concat(model.graph)
    proto.CopyFrom(ir.serde.serialize_model(model))
    node = next(n for n in proto.graph.node if n.output and n.output[0] == "present.1.value")
    past, new = node.input
    node.input[0], node.input[1] = new, past


def swap_heads(proto: onnx.ModelProto) -> None:
    rewrite(
        proto,
        "model.layers.1.self_attn.q_proj.weight.T",
        lambda a: np.concatenate([a[:, 8:16], a[:, :8], a[:, 16:]], axis=1),
    )


def norm_twice(proto: onnx.ModelProto) -> None:
    node = norm_of(proto, "model.layers.1.input_layernorm")
    users = [n for n in proto.graph.node if node.output[0] in n.input]
    again = onnx.helper.make_node(
        node.op_type.removeprefix("Skip"), [node.output[0], *node.input[-2:]], ["again"], "again", domain=DOMAIN
    )
    again.attribute.extend(node.attribute)
    insert(proto, users[0], again)
    for user in users:
        user.input[list(user.input).index(node.output[0])] = "again"


def wrong_axis(proto: onnx.ModelProto) -> None:
    """The function takes the mean over the sequence."""
    for body in proto.functions:
        axes = next(a for n in body.node if n.output[0] == "axes" for a in n.attribute)
        axes.t.CopyFrom(onnx.numpy_helper.from_array(np.array([-2]), axes.t.name))


def truncate_weights(proto: onnx.ModelProto) -> None:
    def cut(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        bits = array.view(np.uint32) & np.uint32(0xFFFF0000)
        return bits.view(np.float32)

    rewrite(proto, "model.layers.1.mlp.down_proj.weight.T", cut)


def swap_gate_and_up(proto: onnx.ModelProto) -> None:
    (gate,), (up,) = (at(proto, f"model.layers.0.mlp.{m}", "MatMul") for m in ("gate_proj", "up_proj"))
    gate.input[1], up.input[1] = up.input[1], gate.input[1]


def attention_scale(proto: onnx.ModelProto) -> None:
    (node,) = at(proto, "model.layers.1.self_attn", "Attention")
    kept = [a for a in node.attribute if a.name != "scale"]
    del node.attribute[:]
    node.attribute.extend([*kept, onnx.helper.make_attribute("scale", 0.125)])


@dataclass(frozen=True)
class Fault:
    """One fault.

    Args:
        name: what is wrong.
        base: the file that it is planted in.
        change: how it is planted.
        static: pattern of the finding of the static verdict; empty where reading the file does not show the fault.
        place: beginning of the finding of the numeric verdict; empty where running the file does not show the fault.
    """

    name: str
    base: str
    change: Change
    static: str
    place: str


_POST = "norm model.layers.{}.post_attention_layernorm "
_FIRST = "model.layers.0.post_attention_layernorm"

FAULTS = (
    Fault("sign of one weight", "llama", flip_one_sign, "weight model.layers.0.mlp.down_proj", "block model.layers.0 "),
    Fault(
        "transposed matrix",
        "llama",
        lambda p: rewrite(p, "model.layers.1.self_attn.q_proj.weight.T", lambda a: a.T),
        "weight model.layers.1.self_attn.q_proj",
        _POST.format(1),
    ),
    Fault(
        "lambda 4 to 4.04",
        "llama",
        attribute("model.layers.0.post_attention_layernorm", "lambd", 4.04),
        "layers.0.post_attention_layernorm.*lambd",
        _POST.format(0),
    ),
    Fault(
        "epsilon 1e-5 to 1e-3",
        "llama",
        attribute("model.layers.1.input_layernorm", "epsilon", 1e-3),
        "layers.1.input_layernorm.*epsilon",
        "norm model.layers.1.input_layernorm ",
    ),
    Fault(
        "T for L",
        "llama",
        tanh_at_one_norm,
        "layers.1.post_attention_layernorm.*op type is (?:Skip)?IBNormT",
        _POST.format(1),
    ),
    Fault("skipped residual", "llama", skip_residual, "", _POST.format(0)),
    Fault("fp16 overflow", "half", overflow, "", "block model.layers.0 "),
    Fault("wrong mask", "llama", wrong_mask, "", _POST.format(0)),
    Fault("off-by-one position", "llama", next_position, "", _POST.format(0)),
    Fault(
        "dropped bias",
        "vit",
        drop_norm_bias,
        "vit.layers.0.layernorm_after.*bias is connected",
        "norm vit.layers.0.layernorm_after ",
    ),
    Fault(
        "naive log body", "llama", naive_log_body, "function IBNormL: the body", "norm model.layers.0.input_layernorm "
    ),
    Fault("cache row out of place", "decoder", cache_row_out_of_place, "", _POST.format(1)),
    Fault("swapped heads", "llama", swap_heads, "weight model.layers.1.self_attn.q_proj", _POST.format(1)),
    Fault("norm applied twice", "llama", norm_twice, "norm again: in the file but not", _POST.format(1)),
    Fault("wrong axis", "llama", wrong_axis, "function IBNormL: the body", "norm model.layers.0.input_layernorm "),
    Fault(
        "truncated weights", "llama", truncate_weights, "weight model.layers.1.mlp.down_proj", "block model.layers.1 "
    ),
    Fault(
        "dropped norm",
        "llama",
        lambda p: drop_norm(p, norm_of(p, "model.norm")),
        "norm model.norm: .*dropped",
        "output logits",
    ),
    Fault(
        "swapped scales",
        "llama",
        lambda p: swap_scales(norm_of(p, _FIRST), norm_of(p, "model.layers.1.input_layernorm")),
        "layers.0.post_attention_layernorm.*scale is connected",
        _POST.format(0),
    ),
    Fault("gate and up swapped", "llama", swap_gate_and_up, "", "block model.layers.0 "),
    Fault("attention scale", "llama", attention_scale, "", _POST.format(1)),
)


@dataclass(frozen=True)
class Outcome:
    """What verification reports about one fault: the findings, the error source, and whether they name the fault."""

    name: str
    static: str
    numeric: str
    source: str
    failed: bool
    named: bool
    numeric_only: bool


def _named(findings: tuple[Finding, ...], pattern: str) -> str:
    return next((str(f) for f in findings if pattern and re.search(pattern, str(f))), "")


def judge(fault: Fault, base: Base, folder: Path) -> Outcome:
    """Plant a fault in a copy of the file and verify it."""
    proto = onnx.load(base.file)
    before = proto.SerializeToString()
    fault.change(proto)
    assert proto.SerializeToString() != before, "nothing was planted"
    file = folder / "planted.onnx"
    onnx.save(proto, file)
    report = verify(
        ExportedModel(file), models.load(base.checkpoint, None, task=base.task), options=VerifyOptions(layers=True)
    )
    assert report.static is not None
    assert report.numeric is not None
    static = _named(report.static.findings, fault.static)
    numeric = _named(report.numeric.findings, re.escape(fault.place))
    source = report.numeric.attribution.source if report.numeric.attribution is not None else ""
    named = bool(static or not fault.static) and bool(numeric or not fault.place) and bool(static or numeric)
    return Outcome(fault.name, static, numeric, source, not report, named, not report.numeric)
