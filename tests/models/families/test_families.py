"""Every family with every kind of norm, through export and verification; faults in them are found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnx.numpy_helper
import onnxruntime as ort
import pytest
import torch

from ibnorm_export import NormConfig, models
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.tensors import DType
from ibnorm_export.exporter.export import ExportOptions, export
from ibnorm_export.models.families.causal import cache_argument
from ibnorm_export.op.spec import DOMAIN
from ibnorm_export.verifier.report import ParityReport
from ibnorm_export.verifier.verify import VerifyOptions, verify
from tests.support.checkpoints import GPT2, LLAMA, RESNET, VIT

BOTTLENECK = {**RESNET, "layer_type": "bottleneck", "hidden_sizes": [16, 32]}
CONFIGS = {"gpt2": GPT2, "resnet": RESNET, "bottleneck": BOTTLENECK, "vit": VIT, "llama": LLAMA}


def section(compression: str = "L", **more: Any) -> NormConfig:
    return NormConfig.from_config(
        {"compression": compression, "lambda": 2.0, "epsilon": 1e-5, "convention": "divide", **more}
    )


def only(norm: str) -> NormConfig:
    return section(layers=[{"match": "*", "norm": norm}])


DEEP = section(
    layers=[
        {"match": "transformer.h.0.ln_2", "compression": "T", "lambda": 0.5},
        {"match": "transformer.h.1.*", "norm": "layernorm"},
        {"match": "transformer.ln_f", "norm": "rmsnorm", "scale": False},
    ]
)

CASES = {
    "gpt2 S": ("gpt2", section("S"), DType.FP32),
    "gpt2 bf16": ("gpt2", section("T"), DType.BF16),
    "gpt2 of layers": ("gpt2", DEEP, DType.FP32),
    "gpt2 affine-free": ("gpt2", section(scale=False, bias=False), DType.FP32),
    "resnet over channels": ("resnet", section("L"), DType.FP32),
    "resnet over axes": ("resnet", section("T", grouping="axes", axis=1), DType.FP32),
    "resnet over axes fp16": ("resnet", section("L", grouping="axes", axis=1), DType.FP16),
    "resnet in batches S": ("resnet", section("S", grouping="batch"), DType.FP32),
    "resnet in batches L fp16": ("resnet", section("L", grouping="batch"), DType.FP16),
    "bottleneck in batches T": ("bottleneck", section("T", grouping="batch"), DType.FP32),
    "resnet BatchNorm": ("resnet", only("batchnorm"), DType.FP32),
    "resnet LayerNorm": ("resnet", only("layernorm"), DType.FP32),
    "gpt2 BatchNorm": ("gpt2", only("batchnorm"), DType.FP32),
    "vit LayerNorm fp16": ("vit", only("layernorm"), DType.FP16),
    "llama RMSNorm bf16": ("llama", only("rmsnorm"), DType.BF16),
}


def load_new(config: str, norms: NormConfig, folder: Path) -> LoadedModel:
    models.save(models.new_model(CONFIGS[config], norms), folder / config)
    return models.load(folder / config)


def all_layers(report: ParityReport) -> list[str]:
    assert report.numeric is not None
    assert report.numeric.layers is not None
    assert report.numeric.layers.notes == ()
    return [layer.module for layer in report.numeric.layers.layers if layer.kind == "norm"]


@pytest.mark.parametrize("case", CASES)
def test_export_and_verify(case: str, tmp_path: Path) -> None:
    config, norms, dtype = CASES[case]
    model = load_new(config, norms, tmp_path)
    exported = export(model, tmp_path / "m.onnx", options=ExportOptions(dtype=dtype))
    report = verify(exported, model, options=VerifyOptions(layers=True))
    assert report, report.findings
    replaced = sorted(dict(model.module.named_modules()).keys() & set(all_layers(report)))
    expected = [p for p, m in model.module.named_modules() if type(m).__name__.endswith("Norm") or "BatchNorm" in p]
    expected += [p for p, m in model.module.named_modules() if type(m).__name__.startswith("BatchNorm")]
    assert replaced == sorted(set(expected))


def planted(exported: ExportedModel, folder: Path, change: Any) -> ExportedModel:
    proto = onnx.load(exported.path)
    change(proto.graph)
    onnx.save(proto, folder / "bad.onnx")
    return ExportedModel(folder / "bad.onnx")


def wrong_statistic(graph: onnx.GraphProto) -> None:
    tensor = next(t for t in graph.initializer if t.name == "resnet.embedder.embedder.normalization.compressed_mean")
    array = onnx.numpy_helper.to_array(tensor) + 0.01
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))


def wrong_lambda(graph: onnx.GraphProto) -> None:
    node = next(n for n in graph.node if n.domain == DOMAIN)
    next(a for a in node.attribute if a.name == "lambd").f *= 1.02


def affine_at_the_node(graph: onnx.GraphProto) -> None:
    node = next(n for n in graph.node if n.domain == DOMAIN)
    node.input[1] = node.input[2]


@pytest.mark.parametrize(
    ("norms", "change", "named"),
    [
        (section("L", grouping="batch"), wrong_statistic, "normalization.compressed_mean"),
        (section("L"), wrong_lambda, "norm resnet.embedder.embedder.normalization"),
        (section("L", grouping="axes", axis=1), wrong_lambda, "norm resnet.embedder.embedder.normalization"),
        (section("L", grouping="axes", axis=1), affine_at_the_node, "norm resnet.embedder.embedder.normalization"),
    ],
)
def test_a_fault_in_a_resnet_is_named(norms: NormConfig, change: Any, named: str, tmp_path: Path) -> None:
    model = load_new("resnet", norms, tmp_path)
    bad = planted(export(model, tmp_path / "m.onnx"), tmp_path, change)
    report = verify(bad, model, options=VerifyOptions(layers=True))
    assert not report
    assert any(named in finding.where for finding in report.findings), report.findings
    assert report.numeric is not None
    assert report.numeric.layers is not None
    first = report.numeric.layers.first_failed_layer
    assert first is not None
    assert first.module == "resnet.embedder.embedder.normalization"


def optimised(exported: ExportedModel, folder: Path) -> list[str]:
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.log_severity_level = 3
    ort.InferenceSession(exported.path, options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(folder / "optimised.onnx").graph.node]


def test_linear_batch_norms_are_folded_into_convolutions(tmp_path: Path) -> None:
    """S with running statistics is affine, so the runtime folds it away; L and T stay."""
    linear = export(load_new("resnet", section("S", grouping="batch"), tmp_path), tmp_path / "s.onnx")
    kinds = optimised(linear, tmp_path)
    assert "BatchNormalization" not in kinds
    assert not {"Div", "Sub", "Mul"} & set(kinds)
    tanh = export(load_new("resnet", section("T", grouping="batch"), tmp_path), tmp_path / "t.onnx")
    assert optimised(tanh, tmp_path).count("Tanh") == 6


def test_the_argument_of_the_cache_has_the_name_of_the_installed_transformers() -> None:
    class Earlier(torch.nn.Module):
        def forward(self, input_ids: Any, past_key_values: Any = None) -> None: ...

    class Renamed(torch.nn.Module):
        def forward(self, input_ids: Any, cache: Any = None, **more: Any) -> None: ...

    assert cache_argument(Earlier) == cache_argument(Earlier()) == "past_key_values"
    assert cache_argument(Renamed) == cache_argument(Renamed()) == "cache"
