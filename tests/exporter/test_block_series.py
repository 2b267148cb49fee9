"""A model of equal blocks is traced as one with three, or also with two; the file is that of a whole trace."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import onnx
import onnx.helper
import onnx_ir as ir
import pytest
from torch import nn

from ibnorm_export import IBNormSpec, models
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.exporter import block_series
from ibnorm_export.exporter.options import ExportOptions
from ibnorm_export.exporter.single_file import build
from ibnorm_export.graph.repeated_blocks import Growth, NotASeriesError, lay_out, without_last_block

SPEC = IBNormSpec("L", 4.0, epsilon=1e-5, bias=False)
SIZES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 4},
    "llama, grouped": {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_inner": 48, "n_positions": 64},
    "vit": {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "image_size": 16, "patch_size": 8},
}
BLOCKS = 5


def _load(family: str, folder: Path) -> LoadedModel:
    sizes = {**SIZES[family], "n_layer" if family == "gpt2" else "num_hidden_layers": BLOCKS}
    if family != "vit":
        sizes["vocab_size"] = 64
    if family == "gpt2":
        sizes |= {"bos_token_id": 0, "eos_token_id": 0}
    models.save(models.new_model({"model_type": family.partition(",")[0], **sizes}, SPEC), folder)
    return models.load(folder)


def _bytes(model: LoadedModel, options: ExportOptions) -> bytes:
    return ir.serde.serialize_model(build(model, options)).SerializeToString(deterministic=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "dtype"), [("llama", "fp32"), ("llama, grouped", "bf16"), ("gpt2", "fp32"), ("vit", "fp16")]
)
def test_the_file_is_that_of_a_whole_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, dtype: str
) -> None:
    model = _load(family, tmp_path / "checkpoint")
    traced: list[int] = []

    def counted(part: LoadedModel, opset: int) -> ir.Model:
        traced.append(len(part.module.get_submodule(part.blocks)))  # type: ignore[arg-type]  # a ModuleList
        return whole_trace(part, opset)

    whole_trace = block_series.trace
    monkeypatch.setattr(block_series, "trace", counted)
    monkeypatch.setattr(block_series, "LEAST_FOR_TWO_TRACES", BLOCKS)
    options = ExportOptions(dtype)
    series = _bytes(model, options)
    assert traced == ([3] if family in ("llama", "vit") else [3, 2])
    assert series == _bytes(dataclasses.replace(model, blocks=""), options)


@pytest.mark.slow
def test_blocks_that_differ_are_traced_one_by_one(tmp_path: Path) -> None:
    model = _load("llama", tmp_path / "checkpoint")
    assert block_series._has_series(model)
    block: Any = model.module.get_submodule("model.layers.3")
    norm = block.input_layernorm
    norm.spec = dataclasses.replace(norm.spec, epsilon=1e-6)
    assert not block_series._has_series(model)
    block.input_layernorm = nn.Identity()
    assert not block_series._has_series(model)
    assert block_series.trace_series(model, 20) is None


def _chain(count: int, *, scale: float = 2.0) -> onnx.GraphProto:
    """A graph of `count` blocks; each multiplies by its own constant and by its weight."""
    nodes, last = [], "x"
    for block in range(count):
        suffix = f"_{block}" if block else ""
        value = onnx.helper.make_tensor("", onnx.TensorProto.FLOAT, [], [scale if block == 2 else 2.0])
        nodes.append(onnx.helper.make_node("Constant", [], [f"val_{3 * block}"], value=value))
        nodes.append(onnx.helper.make_node("Mul", [last, f"val_{3 * block}"], [f"mul{suffix}"]))
        nodes.append(onnx.helper.make_node("Mul", [f"mul{suffix}", f"m.blocks.{block}.w"], [f"scaled{suffix}"]))
        last = f"scaled{suffix}"
        for node in nodes[-3:]:
            node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=f"['', 'm.blocks.{block}', 'mul']")
    nodes.append(onnx.helper.make_node("Neg", [last], ["y"]))
    for node in nodes:
        node.name, node.domain = f"node_{node.output[0]}", ""
    kind = onnx.TensorProto.FLOAT
    weights = [onnx.helper.make_tensor(f"m.blocks.{block}.w", kind, [1], [0.5]) for block in range(count)]
    ends = [onnx.helper.make_tensor_value_info(name, kind, [1]) for name in ("x", "y")]
    return onnx.helper.make_graph(nodes, "g", ends[:1], ends[1:], initializer=weights)


def test_the_graph_continues() -> None:
    made, likes = lay_out(_chain(2), _chain(3), blocks="m.blocks", count=6)
    assert made == _chain(6)
    assert likes["m.blocks.5.w"] == "m.blocks.2.w"


def test_a_block_with_another_constant_is_not_in_the_series() -> None:
    with pytest.raises(NotASeriesError, match="is not like"):
        lay_out(_chain(2), _chain(3, scale=3.0), blocks="m.blocks", count=6)


def test_the_graph_with_two_blocks_follows_from_that_with_three() -> None:
    two, growth = without_last_block(_chain(3), blocks="m.blocks")
    assert list(two.node) == list(_chain(2).node)
    assert [value.name for value in two.initializer] == ["m.blocks.0.w", "m.blocks.1.w"]
    assert growth == Growth(values=3, nodes=0)


def test_a_name_outside_the_blocks_moves_up_only_if_it_was_made_after_them() -> None:
    three = _chain(3)
    scopes = "['', 'm', 'mul_7']"
    for number in (1, 7):
        node = three.node.add(op_type="Mul", input=["x", "y"], output=[f"mul_{number}"], name=f"node_mul_{number}")
        node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=scopes)
    three.node[-2].output[0] = "val_1"
    two, _ = without_last_block(three, blocks="m.blocks")
    assert [list(node.output) for node in list(two.node)[-2:]] == [["val_1"], ["mul_6"]]
    assert two.node[-3].input == ["scaled_1"]  # of block 1, where it was scaled_2 of block 2
    assert two.node[-1].name == "node_mul_6"
    assert "'mul_6'" in two.node[-1].metadata_props[0].value


def test_a_graph_with_a_value_that_does_not_exist_is_refused() -> None:
    graphs = [_chain(2), _chain(3)]
    for graph in graphs:
        graph.node[-1].input[0] = "lost"
    with pytest.raises(NotASeriesError, match="would read lost"):
        lay_out(*graphs, blocks="m.blocks", count=6)
