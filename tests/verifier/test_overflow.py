"""Overflow in half precision: of the file, of the model itself, and a dtype that does not fit the model."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import pytest
import torch
from safetensors.torch import load_file, save_file

from ibnorm_export import models
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.tensors import DType
from ibnorm_export.exporter.export import ExportOptions, export
from ibnorm_export.verifier.verify import VerifyOptions, verify
from tests.support.planting import plant, rewrite

NUMERIC = VerifyOptions(static=False)

DOWN, UP = "model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.up_proj.weight"


def scale_up_and_down(proto: onnx.ModelProto) -> None:
    """Multiply the values of one projection by 3e4 and divide again: no effect in float32, infinity in float16."""
    node = next(n for n in proto.graph.node if n.op_type == "MatMul" and "down_proj" in n.input[1])
    output = node.output[0]
    node.output[0] = "up"
    for name, value in (("large", 3e4), ("small", 1 / 3e4)):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value, np.float16), name))
    place = list(proto.graph.node).index(node) + 1
    proto.graph.node.insert(place, onnx.helper.make_node("Mul", ["up", "large"], ["up/large"], name="up/large"))
    proto.graph.node.insert(place + 1, onnx.helper.make_node("Mul", ["up/large", "small"], [output], name="down"))
    kind = next(v for v in proto.graph.value_info if v.name == output)
    for name in ("up", "up/large"):
        copy = proto.graph.value_info.add()
        copy.CopyFrom(kind)
        copy.name = name


def scale_weights(
    checkpoint: Path, exported: ExportedModel, folder: Path, *, factors: dict[str, float]
) -> tuple[ExportedModel, LoadedModel]:
    """File and checkpoint with some weights multiplied by powers of two, which is exact in float32."""
    copy = Path(shutil.copytree(checkpoint, folder / "scaled"))
    weights = load_file(copy / "model.safetensors")
    for name, factor in factors.items():
        weights[name] *= factor
    save_file(weights, copy / "model.safetensors", {"format": "pt"})

    def change(proto: onnx.ModelProto) -> None:
        for name, factor in factors.items():
            rewrite(proto, f"{name}.T", lambda a, factor=factor: (a.astype(np.float32) * factor).astype(a.dtype))

    return plant(exported, copy, change), models.load(copy)


def test_an_overflow_of_the_file_only(fp16_llama: ExportedModel, llama_checkpoint: Path, tmp_path: Path) -> None:
    """On a CPU, ONNX Runtime computes this graph in float32, where nothing overflows."""
    good, model = scale_weights(llama_checkpoint, fp16_llama, tmp_path, factors={DOWN: 2.0**14})
    report = verify(good, model, options=NUMERIC)
    assert report, report.findings
    bad = plant(good, tmp_path, scale_up_and_down)
    report = verify(bad, model, options=NUMERIC)
    assert not report
    assert any("overflow in fp16" in f.what for f in report.findings), report.findings


def test_an_overflow_of_the_model_itself(
    fp16_llama: ExportedModel, exported_llama: ExportedModel, llama_checkpoint: Path, tmp_path: Path
) -> None:
    """An intermediate value above 65504: in float16 the model overflows, in float32 it does not.

    The factors are powers of two whose product is 1. In float32 every sum of the scaled model is that of the original
    one times a power of two, in whatever order a processor adds, so the outputs are the same bits.
    """
    factors = {UP: 2.0**19, DOWN: 2.0**-19}
    for folder in ("half", "single"):
        (tmp_path / folder).mkdir()
    half, model = scale_weights(llama_checkpoint, fp16_llama, tmp_path / "half", factors=factors)
    assert all(np.isfinite(half.array(f"{name}.T")).all() for name in factors)
    report = verify(half, model)
    assert not report
    assert any("PyTorch itself overflows in fp16" in f.what for f in report.findings), report.findings
    single, model = scale_weights(llama_checkpoint, exported_llama, tmp_path / "single", factors=factors)
    report = verify(single, model)
    assert report, report.findings
    original = verify(exported_llama, models.load(llama_checkpoint)).numeric
    assert original is not None
    assert report.numeric is not None
    assert report.numeric.outputs == original.outputs


#: Adds and subtracts 256, next to which bfloat16 holds only even numbers: most of the input is lost.
CANCELLATION = """
from torch import nn

from ibnorm_export import IBNorm, IBNormSpec
from ibnorm_export.models import CustomModel, InputSpec


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = IBNorm(16, IBNormSpec("L"))

    def forward(self, x):
        return self.norm((x + 256.0) - 256.0)


def build():
    return CustomModel(Net(), inputs=(InputSpec("x", ("batch", 16), True),))
"""


def test_a_dtype_in_which_pytorch_fails_does_not_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the error of PyTorch would let zeros pass."""
    (tmp_path / "cancelling.py").write_text(CANCELLATION, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    import cancelling  # type: ignore[import-not-found]  # written above

    torch.save(cancelling.Net().state_dict(), tmp_path / "weights.pt")
    model = models.load(tmp_path / "weights.pt", "cancelling:build")
    exported = export(model, tmp_path / "m.onnx", options=ExportOptions(dtype=DType.BF16))
    report = verify(exported, models.load(tmp_path / "weights.pt", "cancelling:build"), options=NUMERIC)
    assert not report
    assert report.numeric is not None
    assert all(output.baseline_error > 0.2 for output in report.numeric.outputs)
    assert {f.where for f in report.findings} >= {"bf16 of output output"}
    assert any("the model does not fit this dtype" in f.what for f in report.findings)
    sys.modules.pop("cancelling")
