"""The static verdict: each kind of fault that reading a file shows, and right files that tools have changed."""

from __future__ import annotations

import copy
import re
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnx.inliner
import onnx.numpy_helper
import onnxruntime
import pytest
import torch

from ibnorm_export import Compression, ExportOptions, IBNorm, IBNormSpec, export, models
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.tensors import DType
from ibnorm_export.errors import ModelFileError
from ibnorm_export.op import onnx_functions as onnx_op
from ibnorm_export.op.norm_variants import BatchIBNorm
from ibnorm_export.op.spec import DOMAIN
from ibnorm_export.verifier.checkpoint.coverage import Coverage, measure_coverage
from ibnorm_export.verifier.report import StaticReport
from ibnorm_export.verifier.static.constants import KnownConstants
from ibnorm_export.verifier.static.types import check_types
from ibnorm_export.verifier.static.verdict import check_static
from ibnorm_export.verifier.weights.values import WeightValues
from tests.support.planting import Array, Change, initializer, insert, norm_of, norms, plant, rewrite, set_attribute
from tests.support.shared_exports import SharedExports


def cover(model: LoadedModel) -> Coverage:
    return measure_coverage(model, model.in_float64(), inputs=model.sample(np.random.default_rng(0), 0))


@pytest.fixture(scope="module")
def llama_coverage(llama: LoadedModel) -> Coverage:
    return cover(llama)


@pytest.fixture(scope="module")
def vit_coverage(vit: LoadedModel) -> Coverage:
    return cover(vit)


@pytest.fixture(scope="module")
def inlined_vit(exports: SharedExports) -> ExportedModel:
    return exports("vit", inline=True)


def found(report: StaticReport, pattern: str) -> bool:
    return any(re.search(pattern, str(finding)) for finding in report.findings)


# ---- changes ----


def add(proto: onnx.ModelProto, array: Array, name: str) -> str:
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ascontiguousarray(array), name))
    return name


def value(proto: onnx.ModelProto, name: str) -> Array:
    return onnx.numpy_helper.to_array(initializer(proto, name))


def user(proto: onnx.ModelProto, name: str) -> tuple[onnx.NodeProto, int]:
    """The first node that reads a value, and where."""
    return next((n, list(n.input).index(name)) for n in proto.graph.node if name in n.input)


def copy_of(name: str, change: Callable[[Array], Array]) -> Change:
    """The weight stays in the file, and a changed copy is used instead."""

    def apply(proto: onnx.ModelProto) -> None:
        node, position = user(proto, name)
        node.input[position] = add(proto, change(value(proto, name).copy()), "copy")

    return apply


def through(name: str, op_type: str, *numbers: float) -> Change:
    """The weight is reached through one more node."""

    def apply(proto: onnx.ModelProto) -> None:
        node, position = user(proto, name)
        others = [add(proto, np.float32(number), f"number.{i}") for i, number in enumerate(numbers)]
        insert(proto, node, onnx.helper.make_node(op_type, [name, *others], ["changed"], name="extra"))
        node.input[position] = "changed"

    return apply


def after(output: str, op_type: str, *constants: Array) -> Change:
    """A value of the graph goes through one more node before anything reads it."""

    def apply(proto: onnx.ModelProto) -> None:
        others = [add(proto, array, f"number.{i}") for i, array in enumerate(constants)]
        readers = [node for node in proto.graph.node if output in node.input]
        insert(proto, readers[0], onnx.helper.make_node(op_type, [output, *others], ["changed"], name="extra"))
        for node in readers:
            for position, name in enumerate(node.input):
                if name == output:
                    node.input[position] = "changed"

    return apply


def one_value(array: Array) -> Array:
    array[-1, -1] += 1e-3
    return array


def claim(key: str, text: str) -> Change:
    def apply(proto: onnx.ModelProto) -> None:
        next(p for p in proto.metadata_props if p.key == key).value = text

    return apply


def claim_another_norm(proto: onnx.ModelProto) -> None:
    entry = next(p for p in proto.metadata_props if p.key == "ibnorm.norms")
    entry.value = entry.value.replace("model.norm", "model.other")


def claim_another_lambda(proto: onnx.ModelProto) -> None:
    entry = next(p for p in proto.metadata_props if p.key == "ibnorm.norms")
    entry.value = entry.value.replace('"lambda": 4.0', '"lambda": 8.0', 1)


def call_an_overload(proto: onnx.ModelProto) -> None:
    """The function without an overload is right; the node calls another one."""
    node = norms(proto)[0]
    node.overload = "fast"
    wrong = onnx_op.function(Compression.TANH, proto.opset_import[0].version)
    wrong.name, wrong.overload = node.op_type, "fast"
    proto.functions.append(wrong)


def bypass_a_norm(proto: onnx.ModelProto) -> None:
    """The node stays in the file, but nothing reads its output."""
    node = norm_of(proto, "model.layers.0.input_layernorm")
    for other in proto.graph.node:
        for position, name in enumerate(other.input):
            if name == node.output[0]:
                other.input[position] = node.input[0]


def norm_twice(proto: onnx.ModelProto) -> None:
    node = norm_of(proto, "model.layers.0.input_layernorm")
    again = onnx.NodeProto()
    again.CopyFrom(node)
    again.name = f"{node.name}#2"
    output = node.output[0]
    node.output[0], again.input[0] = "first", "first"
    assert again.output[0] == output
    proto.graph.node.insert(list(proto.graph.node).index(node) + 1, again)


def exchange_norms(proto: onnx.ModelProto) -> None:
    """Two norms trade their names, modules and weights."""
    first, second = (norm_of(proto, f"model.layers.{i}.post_attention_layernorm") for i in (0, 1))
    first.name, second.name = second.name, first.name
    first.input[-2], second.input[-2] = second.input[-2], first.input[-2]
    props = [next(p for p in node.metadata_props if p.key == "module") for node in (first, second)]
    props[0].value, props[1].value = props[1].value, props[0].value


def negate_in_a_branch(proto: onnx.ModelProto) -> None:
    """From 600 tokens on, the logits change their sign."""
    node = next(n for n in proto.graph.node if n.output[0] == "logits")
    node.output[0] = "right"
    limit = add(proto, np.int64(600), "limit")
    axis = add(proto, np.int64(1), "axis")

    def branch(op_type: str) -> onnx.GraphProto:
        info = onnx.helper.make_tensor_value_info(f"{op_type}.out", onnx.TensorProto.FLOAT, None)
        return onnx.helper.make_graph([onnx.helper.make_node(op_type, ["right"], [info.name])], op_type, [], [info])

    make = onnx.helper.make_node
    proto.graph.node.extend(
        [
            make("Shape", ["input_ids"], ["shape"]),
            make("Gather", ["shape", axis], ["length"]),
            make("Greater", ["length", limit], ["long"]),
            make("If", ["long"], ["logits"], then_branch=branch("Neg"), else_branch=branch("Identity"), name="if"),
        ]
    )


def remap_tokens(proto: onnx.ModelProto) -> None:
    table = np.arange(256)
    table[[200, 201]] = table[[201, 200]]
    add(proto, table, "table")
    node, position = user(proto, "input_ids")
    insert(proto, node, onnx.helper.make_node("Gather", ["table", "input_ids"], ["changed"], name="extra"))
    node.input[position] = "changed"


def add_a_sparse_vector(proto: onnx.ModelProto) -> None:
    values = onnx.numpy_helper.from_array(np.float32([1e-3]), "sparse")
    indices = onnx.numpy_helper.from_array(np.int64([5]))
    proto.graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(values, indices, [32]))
    node, position = user(proto, "embedding")
    insert(proto, node, onnx.helper.make_node("Add", ["embedding", "sparse"], ["changed"], name="extra"))
    node.input[position] = "changed"


def repeat_a_constant(proto: onnx.ModelProto) -> None:
    add(proto, value(proto, _MATRIX) * 2, _MATRIX)


_EMBEDDING = "model.embed_tokens.weight"
_MATRIX = "model.layers.0.mlp.up_proj.weight.T"

#: fault -> how it is planted in a LLaMA, and a finding that names it.
FAULTS: dict[str, tuple[Change, str]] = {
    "a changed copy of the embedding": (
        copy_of(_EMBEDDING, one_value),
        r"constant copy: .*copy of the weight model\.embed_tokens\.weight with 1 of 8192 values changed",
    ),
    "the right matrix is not used": (
        copy_of(_MATRIX, lambda a: a[::-1]),
        r"weight model\.layers\.0\.mlp\.up_proj\.weight: no output of the file depends on it",
    ),
    "another matrix under another name": (copy_of(_MATRIX, lambda a: a * 0.5), r"constant copy: is used by the MatMul"),
    "a weight through Mul": (through(_MATRIX, "Mul", 1.01), "constant changed: is used by the MatMul"),
    "a weight through Add": (through(_EMBEDDING, "Add", 1e-3), "constant changed: is used by the Gather"),
    "a weight through Clip": (through(_EMBEDDING, "Clip", -0.01, 0.01), "constant changed: is used by the Gather"),
    "a vector is added": (
        after("logits.before", "Add", np.linspace(0, 1e-3, 256, dtype=np.float32)),
        "constant number.0: is used by the Add .* neither has nor computes",
    ),
    "token ids are clipped": (
        after("input_ids", "Clip", np.int64(0), np.int64(199)),
        "number 199: input 2 of the Clip node 'extra'",
    ),
    "token ids wrap": (after("input_ids", "Mod", np.int64(250)), "number 250: input 1 of the Mod"),
    "a factor on a residual": (after("embedding", "Mul", np.float32(1.02)), "number 1.02: input 1 of the Mul"),
    "a limit on activations": (
        after("embedding", "Clip", np.float32(-40), np.float32(40)),
        "number -40: input 1 of the Clip",
    ),
    "a branch on the length": (negate_in_a_branch, "If node 'if': the file branches"),
    "the limit of a branch": (negate_in_a_branch, "number 600: input 1 of the Greater"),
    "positions stop": (
        after("attention_mask", "Slice", np.int64([0]), np.int64([100]), np.int64([1])),
        "position 100: input 2 of the Slice",
    ),
    "integers that remap tokens": (
        remap_tokens,
        "constant table: .*256 integers that the checkpoint neither has nor computes",
    ),
    "random numbers": (after("embedding", "RandomNormalLike"), "RandomNormalLike node 'extra': the file draws random"),
    "a sparse vector": (add_a_sparse_vector, "constant sparse: is used by the Add"),
    "a name that two constants have": (repeat_a_constant, "up_proj.weight.T: the file has two of this name"),
    "inlined is claimed": (claim("ibnorm.inlined", "true"), "metadata: states that norms are inlined, .* 5 norm nodes"),
    "a norm is claimed": (claim_another_norm, "metadata of norm model.other: the checkpoint has no such norm"),
    "a lambda is claimed": (claim_another_lambda, r"metadata of norm .*'lambda': 8\.0.*; the checkpoint has"),
    "a function by its overload": (call_an_overload, "function IBNormL:fast: the body differs"),
    "a norm that nothing reads": (bypass_a_norm, r"norm model\.layers\.0\.input_layernorm: .*dropped or changed"),
    "two nodes for a module": (norm_twice, r"norm model\.layers\.0\.input_layernorm: has 2 nodes, .* 1 time$"),
    "norms are exchanged": (exchange_norms, r"depends on norm model\.layers\.1\.post_attention_layernorm, which runs"),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_fault_is_named(
    exported_llama: ExportedModel, llama: LoadedModel, llama_coverage: Coverage, tmp_path: Path, fault: str
) -> None:
    change, pattern = FAULTS[fault]

    def planted(proto: onnx.ModelProto) -> None:
        head = next(n for n in proto.graph.node if n.output[0] == "logits")
        if fault == "a vector is added":
            head.output[0] = "logits.before"
            proto.graph.node.append(onnx.helper.make_node("Identity", ["logits.before"], ["logits"]))
        change(proto)

    report = check_static(plant(exported_llama, tmp_path, planted), llama, coverage=llama_coverage)
    assert not report
    assert found(report, pattern), report.findings


@pytest.mark.parametrize(("attribute", "number"), [("epsilon", 1e-2), ("lambd", 3.3)])
def test_a_fault_in_an_inlined_norm_is_named(
    inlined_vit: ExportedModel, vit: LoadedModel, vit_coverage: Coverage, tmp_path: Path, attribute: str, number: float
) -> None:
    def change(proto: onnx.ModelProto) -> None:
        if attribute == "epsilon":
            set_attribute(next(n for n in proto.graph.node if n.op_type == "LayerNormalization"), "epsilon", number)
        else:
            scaled = next(n for n in proto.graph.node if n.op_type == "Div" and "ibnorm" not in n.input[0].lower())
            scaled.input[1] = add(proto, np.float32(number), "other")

    report = check_static(plant(inlined_vit, tmp_path, change), vit, coverage=vit_coverage)
    assert found(report, r"norm vit\.layers\.0\.layernorm_before: no output depends on .*IBNorm-T \(lambda 3"), report


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda table: table, ""),
        (lambda table: table[:40], "a rotary table of 40 positions; the model has 64"),
        (lambda table: np.where(np.arange(64)[:, None] < 50, table, 0), "of which 14 positions are wrong, from 50 on"),
        (lambda table: table + 0.01, "neither has nor computes"),
    ],
)
@pytest.mark.parametrize("function", [np.cos, np.sin])
def test_a_rotary_table_is_compared_to_its_last_position(
    llama: LoadedModel, llama_coverage: Coverage, function: Callable[[Array], Array], change: Any, problem: str
) -> None:
    """Base 10000, heads of 8: frequencies 10000^(-2i/8)."""
    angles = np.outer(np.arange(64), 10000.0 ** (-np.arange(0, 8, 2) / 8))
    table = change(function(angles)).astype(np.float32)
    found = KnownConstants(llama, llama_coverage, dtype=DType.FP32).problem(table)
    assert problem in found
    assert bool(problem) == bool(found)


@pytest.mark.parametrize("block", [8, 16])
def test_a_weight_in_blocks_of_channels_is_recognised(block: int) -> None:
    """Output channel o is in block o // block, at place o % block of the last axis; missing channels are zeros."""
    kernel = torch.randn(12, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    stored = np.zeros((-(-12 // block), 3, 2, 2, block), dtype=np.float32)
    for channel in range(12):
        stored[channel // block, ..., channel % block] = kernel[channel]
    module = torch.nn.Module()
    module.register_buffer("kernel", kernel)
    values = WeightValues(types.SimpleNamespace(module=module), torch.float32)  # type: ignore[arg-type]  # all it reads
    assert values.find(stored, blocked=True)[0] is module.kernel
    stored[0, 0, 0, 0, 0] += 1e-3
    assert values.find(stored, blocked=True) == ()


@pytest.mark.parametrize("fault", [0.0, 1e-2])
def test_a_norm_folded_into_a_convolution_is_recognised(fault: float) -> None:
    """The definition, for one channel: y = w (x - m - 3 c) / sqrt(9 (v + e)) + b, because S compresses by x / 3."""
    generator = torch.Generator().manual_seed(0)
    module = torch.nn.Module()
    module.conv = torch.nn.Conv2d(2, 4, 3)
    spec = IBNormSpec("S", 3.0, epsilon=1e-3, grouping="batch")
    module.norm = norm = BatchIBNorm(4, spec, channel_axis=1)
    for tensor in (*norm.parameters(), *norm.buffers()):
        tensor.data = torch.rand(tensor.shape, generator=generator) + 0.5
    w, b, m, c, v = (
        t.detach().double().numpy()
        for t in (norm.weight, norm.bias, norm.running_mean, norm.compressed_mean, norm.compressed_var)
    )
    scale = w / np.sqrt(9 * (v + 1e-3))
    kernel = module.conv.weight.detach().double().numpy() * scale[:, None, None, None]
    kernel[-1] *= 1 + fault
    shift = (module.conv.bias.detach().double().numpy() - m - 3 * c) * scale + b
    values = WeightValues(types.SimpleNamespace(module=module), torch.float32)  # type: ignore[arg-type]  # all it reads
    found = values.folded.find(kernel.astype(np.float32), blocked=False)
    assert any(tensor is module.conv.weight for tensor in found) == (not fault)
    assert any(t is module.conv.bias for t in values.folded.find(shift.astype(np.float32), blocked=False))


class NormOverChannels(torch.nn.Module):
    """A convolution, and IBNorm over the channels of each position."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3)
        self.norm = IBNorm(8, IBNormSpec("L", 4.0, epsilon=1e-5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("axis", [1, 2])
def test_a_transposition_that_an_optimiser_moves_into_a_norm(tmp_path: Path, axis: int) -> None:
    """ONNX Runtime takes the mean over axis 1, and transposes after it. Over axis 2 the norm is another one."""
    torch.manual_seed(0)
    model = models.from_module(NormOverChannels().eval(), inputs=(torch.randn(2, 3, 6, 6),))
    export(model, tmp_path / "model.onnx", options=ExportOptions(inline=True))
    settings = onnxruntime.SessionOptions()
    settings.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    onnxruntime.InferenceSession(tmp_path / "model.onnx", settings, providers=["CPUExecutionProvider"])

    def change(proto: onnx.ModelProto) -> None:
        (mean,) = (node for node in proto.graph.node if node.op_type == "ReduceMean")
        assert value(proto, mean.input[1]).tolist() == [1]
        mean.input[1] = add(proto, np.array([axis]), "over")

    copied = plant(ExportedModel(tmp_path / "optimised.onnx"), tmp_path, change)
    report = check_static(copied, model, coverage=cover(model))
    assert found(report, "dropped or changed") == (axis != 1)
    assert report.norms == (axis == 1)


def test_shapes_that_onnx_cannot_infer(
    exported_vit: ExportedModel, vit: LoadedModel, vit_coverage: Coverage, tmp_path: Path
) -> None:
    """A convolution over another axis than its weight: a finding, not an unexpected error."""

    def cut(proto: onnx.ModelProto) -> None:
        node = next(node for node in proto.graph.node if node.op_type == "Conv")
        node.input[1] = node.input[0]

    assert check_static(plant(exported_vit, tmp_path, cut), vit, coverage=vit_coverage).findings


@pytest.mark.parametrize(
    ("kind", "kept", "needed"), [("Conv", 0, 2), ("Shape", 0, 1), ("Gather", 1, 2), ("Slice", 1, 3)]
)
@pytest.mark.parametrize("nested", [False, True])
def test_a_node_without_its_inputs(
    exported_vit: ExportedModel,
    vit: LoadedModel,
    vit_coverage: Coverage,
    tmp_path: Path,
    kind: str,
    kept: int,
    needed: int,
    nested: bool,
) -> None:
    def cut(proto: onnx.ModelProto) -> None:
        first = proto.graph.input[0].name
        node = onnx.helper.make_node(kind, [first] * kept, ["cut"], name="bare")
        if nested:
            body = onnx.helper.make_graph([node], "body", [], [onnx.ValueInfoProto(name="cut")])
            node = onnx.helper.make_node("If", [first], ["chosen"], then_branch=body, else_branch=body)
        proto.graph.node.insert(0, node)

    with pytest.raises(ModelFileError, match=f"the {kind} node 'bare' has {kept} inputs; it needs {needed}"):
        check_static(plant(exported_vit, tmp_path, cut), vit, coverage=vit_coverage)


def test_an_attribute_of_another_type(
    exported_vit: ExportedModel, vit: LoadedModel, vit_coverage: Coverage, tmp_path: Path
) -> None:
    """A Constant whose tensor is a number: an error in the graph, a finding in a function."""

    def retype(node: onnx.NodeProto) -> None:
        attribute = next(a for a in node.attribute if a.name == "value")
        attribute.Clear()
        attribute.name, attribute.type, attribute.f = "value", onnx.AttributeProto.FLOAT, 1.0

    def in_body(proto: onnx.ModelProto) -> None:
        retype(next(n for n in proto.functions[0].node if n.op_type == "Constant" and n.attribute[0].name == "value"))

    def in_graph(proto: onnx.ModelProto) -> None:
        node = onnx.helper.make_node("Constant", [], ["made"], value=onnx.numpy_helper.from_array(np.ones(1)))
        retype(node)
        proto.graph.node.insert(0, node)

    assert check_static(plant(exported_vit, tmp_path, in_body), vit, coverage=vit_coverage).findings
    with pytest.raises(ModelFileError, match="the attribute 'value' of the Constant node '' must have type TENSOR"):
        check_static(plant(exported_vit, tmp_path, in_graph), vit, coverage=vit_coverage)


def test_an_unused_tensor_does_not_change_the_dtype(
    exported_vit: ExportedModel, vit: LoadedModel, vit_coverage: Coverage, tmp_path: Path
) -> None:
    """Most numbers of the file are bfloat16, but no node reads them."""

    def change(proto: onnx.ModelProto) -> None:
        unused = onnx.helper.make_tensor("unused", onnx.TensorProto.BFLOAT16, [10**6], np.zeros(10**6, np.float32))
        proto.graph.initializer.append(unused)

    bad = plant(exported_vit, tmp_path, change)
    assert bad.stored_dtype == bad.dtype == "fp32"
    assert check_static(bad, vit, coverage=vit_coverage)


# ---- right files ----


def rename_everything(proto: onnx.ModelProto) -> None:
    """As tools do: initializers get numbers for names, and nodes lose their names and metadata."""
    names = {tensor.name: f"_v_{index}" for index, tensor in enumerate(proto.graph.initializer)}
    for tensor in proto.graph.initializer:
        tensor.name = names[tensor.name]
    for node in proto.graph.node:
        for position, name in enumerate(node.input):
            node.input[position] = names.get(name, name)
        if node.domain != DOMAIN:
            node.name = ""
        del node.metadata_props[:]


def unfold_transposes(proto: onnx.ModelProto) -> None:
    for tensor in list(proto.graph.initializer):
        if tensor.name.endswith(".T"):
            node, position = user(proto, tensor.name)
            plain = add(proto, onnx.numpy_helper.to_array(tensor).T, f"plain.{tensor.name}")
            insert(proto, node, onnx.helper.make_node("Transpose", [plain], [f"{tensor.name}/t"], perm=[1, 0]))
            node.input[position] = f"{tensor.name}/t"
            proto.graph.initializer.remove(tensor)


def constants_as_nodes(proto: onnx.ModelProto) -> None:
    nodes = [onnx.helper.make_node("Constant", [], [t.name], value=t) for t in proto.graph.initializer]
    kept = list(proto.graph.node)
    del proto.graph.initializer[:], proto.graph.node[:]
    proto.graph.node.extend([*nodes, *kept])


def reorder_bodies(proto: onnx.ModelProto) -> None:
    """Constants first, and values renamed."""
    for body in proto.functions:
        nodes = sorted(body.node, key=lambda node: node.op_type != "Constant")
        inner = {name: f"r_{name}" for node in nodes for name in node.output if name not in body.output}
        for node in nodes:
            for names in (node.input, node.output):
                for position, name in enumerate(names):
                    names[position] = inner.get(name, name)
        del body.node[:]
        body.node.extend(nodes)


def bodies_of_earlier_versions(proto: onnx.ModelProto) -> None:
    """Nodes without names, and constants as numbers where they are tensors now."""
    for body in proto.functions:
        for node in body.node:
            node.ClearField("name")
            if node.op_type == "Constant" and not node.attribute[0].ref_attr_name:
                array = onnx.numpy_helper.to_array(node.attribute[0].t)
                name = "value_ints" if array.ndim else "value_float"
                node.attribute[0].CopyFrom(onnx.helper.make_attribute(name, array.tolist()))


def join_projections(proto: onnx.ModelProto) -> None:
    """The matrices of queries, keys and values become one, as onnxsim does."""
    names = [f"model.layers.0.self_attn.{part}_proj.weight.T" for part in "qkv"]
    nodes = [user(proto, name)[0] for name in names]
    joined = add(proto, np.concatenate([value(proto, name) for name in names], axis=1), "joined")
    sizes = add(proto, np.array([value(proto, name).shape[1] for name in names]), "sizes")
    make = onnx.helper.make_node
    insert(proto, nodes[0], make("MatMul", [nodes[0].input[0], joined], ["product"]))
    insert(proto, nodes[0], make("Split", ["product", sizes], [n.output[0] for n in nodes], axis=-1))
    for node, name in zip(nodes, names, strict=True):
        proto.graph.node.remove(node)
        proto.graph.initializer.remove(initializer(proto, name))


def expand_norms(proto: onnx.ModelProto) -> None:
    """As ONNX Runtime does when it writes an optimised file; the metadata does not say so."""
    proto.CopyFrom(onnx.inliner.inline_local_functions(proto))


def drop_names(proto: onnx.ModelProto) -> None:
    for node in proto.graph.node:
        node.name = ""
        del node.metadata_props[:]


RIGHT: dict[str, Change] = {
    "no names and no metadata": drop_names,
    "names and metadata": rename_everything,
    "transposes": unfold_transposes,
    "constants as nodes": constants_as_nodes,
    "reordered bodies": reorder_bodies,
    "bodies of earlier versions": bodies_of_earlier_versions,
    "joined matrices": join_projections,
    "expanded norms": expand_norms,
}


@pytest.mark.parametrize("tool", list(RIGHT))
def test_what_tools_change_makes_no_difference(
    exported_llama: ExportedModel, llama: LoadedModel, llama_coverage: Coverage, tmp_path: Path, tool: str
) -> None:
    copy = plant(exported_llama, tmp_path, RIGHT[tool])
    onnx.checker.check_model(copy.path, full_check=True)
    report = check_static(copy, llama, coverage=llama_coverage)
    assert report, report.findings
    assert report.norms == 5
    assert report.weights >= 20


def test_a_version_of_norms_that_no_node_uses(
    inlined_vit: ExportedModel, vit: LoadedModel, vit_coverage: Coverage, tmp_path: Path
) -> None:
    """ONNX Runtime states a version of every domain that it knows in the files that it optimises."""
    copy = plant(inlined_vit, tmp_path, lambda p: p.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1000)))
    report = check_static(copy, vit, coverage=vit_coverage)
    assert report, report.findings


@pytest.mark.parametrize("merged", ["model.layers.0.input_layernorm.weight", "ones"])
def test_equal_weights_may_be_merged(
    exported_llama: ExportedModel, llama: LoadedModel, llama_coverage: Coverage, tmp_path: Path, merged: str
) -> None:
    """A fresh model has scales of 1 everywhere, of which tools keep one, under any name."""
    fresh = replace(llama, module=copy.deepcopy(llama.module))
    scales = [name for name, _ in fresh.module.named_parameters() if "norm" in name]
    for name in scales:
        fresh.module.get_parameter(name).data.fill_(1)

    def merge(proto: onnx.ModelProto) -> None:
        rewrite(proto, scales[0], np.ones_like)
        kept = scales[0] if merged == scales[0] else add(proto, value(proto, scales[0]), merged)
        for node in proto.graph.node:
            for position, name in enumerate(node.input):
                if name in scales:
                    node.input[position] = kept

    report = check_static(plant(exported_llama, tmp_path, merge), fresh, coverage=llama_coverage)
    assert report, report.findings


def test_a_type_that_onnx_does_not_have_is_a_finding(exported_vit: ExportedModel) -> None:
    exported = ExportedModel(exported_vit.path)
    exported.proto.graph.input[0].type.tensor_type.elem_type = 999
    assert any("999" in finding.what for finding in check_types(exported))


def test_a_constant_of_a_function_that_does_not_fit_its_shape_is_a_finding(
    exported_vit: ExportedModel, vit_checkpoint: Path
) -> None:
    exported = ExportedModel(exported_vit.path)
    function = next(f for f in exported.proto.functions if any(node.op_type == "Constant" for node in f.node))
    constant = next(node for node in function.node if node.op_type == "Constant")
    constant.attribute[0].t.CopyFrom(onnx.helper.make_tensor("", onnx.TensorProto.FLOAT, [2], [1.0, 2.0]))
    constant.attribute[0].t.dims[:] = [1]
    model = models.load(vit_checkpoint)
    report = check_static(exported, model, coverage=cover(model))
    assert any(function.name in finding.where for finding in report.findings)
