"""Faults that rounding to half precision hides; a copy that rounds nothing shows them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.helper
import pytest

from ibnorm_export import IBNormSpec, models
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.tensors import DType
from ibnorm_export.exporter.export import ExportOptions, export
from ibnorm_export.verifier.options import InputCoverage
from ibnorm_export.verifier.verify import VerifyOptions, verify
from tests.support.checkpoints import LLAMA, VIT, save_checkpoint
from tests.support.planting import Change, insert, plant

GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_head": 2, "n_layer": 1, "n_positions": 32, "vocab_size": 64}
OPTIONS = VerifyOptions(static=False, samples=2, coverage=InputCoverage.FAST)


@pytest.fixture(scope="module")
def vit_in_bf16(tmp_path_factory: pytest.TempPathFactory) -> tuple[ExportedModel, LoadedModel]:
    folder = tmp_path_factory.mktemp("bf16")
    model = models.load(save_checkpoint(folder / "vit", VIT, IBNormSpec("T"), seed=0))
    return export(model, folder / "vit.onnx", options=ExportOptions(dtype=DType.BF16)), model


def bias_of(proto: onnx.ModelProto) -> onnx.NodeProto:
    """The node that adds the bias of the first layer of the first MLP."""
    return next(
        n for n in proto.graph.node if n.op_type == "Add" and any("layers.0" in i and "bias" in i for i in n.input)
    )


def leave_bias_out(proto: onnx.ModelProto) -> None:
    node = bias_of(proto)
    node.op_type = "Identity"
    kept = next(name for name in node.input if "bias" not in name)
    del node.input[:]
    node.input.append(kept)


def add_bias_twice(proto: onnx.ModelProto) -> None:
    node = bias_of(proto)
    data, bias = sorted(node.input, key=lambda name: "bias" in name)
    insert(proto, node, onnx.helper.make_node("Add", [data, bias], ["once"], "once"))
    kind = next(v for v in proto.graph.value_info if v.name == node.output[0])
    proto.graph.value_info.add().CopyFrom(kind)
    proto.graph.value_info[-1].name = "once"
    node.input[list(node.input).index(data)] = "once"


def approximate_gelu(proto: onnx.ModelProto) -> None:
    node = next(n for n in proto.graph.node if n.op_type == "Gelu")
    del node.attribute[:]
    node.attribute.append(onnx.helper.make_attribute("approximate", "tanh"))


def enlarge_residual(proto: onnx.ModelProto) -> None:
    node = next(n for n in proto.graph.node if n.op_type.startswith("SkipIBNorm"))
    branch = node.input[1]
    value = onnx.helper.make_tensor("factor", onnx.TensorProto.BFLOAT16, [], [1.02])
    proto.graph.initializer.append(value)
    insert(proto, node, onnx.helper.make_node("Mul", [branch, "factor"], ["larger"], "larger"))
    kind = next(v for v in proto.graph.value_info if v.name == branch)
    proto.graph.value_info.add().CopyFrom(kind)
    proto.graph.value_info[-1].name = "larger"
    node.input[1] = "larger"


@pytest.mark.parametrize("change", [leave_bias_out, add_bias_twice, approximate_gelu, enlarge_residual])
def test_wrong_arithmetic_in_bf16_is_found_and_named(
    change: Change, vit_in_bf16: tuple[ExportedModel, LoadedModel], tmp_path: Path
) -> None:
    exported, model = vit_in_bf16
    report = verify(plant(exported, tmp_path, change), model, options=OPTIONS)
    assert not report
    assert report.numeric is not None
    assert report.numeric.exact is not None
    assert not report.numeric.exact
    named = [f for f in report.findings if f.where == "without rounding, layer"]
    assert len(named) == 1, report.findings
    assert "vit.layers.0" in named[0].what


def test_rounding_hides_an_approximate_gelu(vit_in_bf16: tuple[ExportedModel, LoadedModel], tmp_path: Path) -> None:
    exported, model = vit_in_bf16
    report = verify(plant(exported, tmp_path, approximate_gelu), model, options=OPTIONS)
    assert report.numeric is not None
    assert all(output.passed for output in report.numeric.outputs)


@pytest.mark.parametrize("config", [LLAMA, GPT2, VIT], ids=["llama", "gpt2", "vit"])
@pytest.mark.parametrize("dtype", [DType.FP16, DType.BF16])
def test_a_right_file_passes_without_rounding(config: dict[str, object], dtype: DType, tmp_path: Path) -> None:
    """GPT-2's GELU has constants that the file holds rounded."""
    model = models.load(save_checkpoint(tmp_path / "model", config, IBNormSpec("L", bias=config is not LLAMA), seed=0))
    exported = export(model, tmp_path / "model.onnx", options=ExportOptions(dtype=dtype))
    report = verify(exported, model, options=OPTIONS)
    assert report, report.findings
    assert report.numeric is not None
    assert report.numeric.exact is not None
    for output in report.numeric.exact.outputs:
        assert output.error < 1e-6
    assert np.isfinite(report.numeric.exact.outputs[0].error)
    assert "without rounding:" in str(report)
