"""int8 and int4: what is stored, that it is what was trained within a step, and how its predictions are judged."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import LLAMA, save_checkpoint

from ibnorm_export import IBNormSpec, models
from ibnorm_export.artifact import ExportedModel
from ibnorm_export.errors import ExportError, ModelFileError
from ibnorm_export.export import ExportOptions, export
from ibnorm_export.genai_export import export_genai
from ibnorm_export.loaded import LoadedModel
from ibnorm_export.quality_check import POSITIONS, check_quality
from ibnorm_export.quantize import Quantization, dequantize
from ibnorm_export.runners.base import Kernels
from ibnorm_export.runners.torch_runner import TorchRunner
from ibnorm_export.tensors import DType
from ibnorm_export.text import Sampling, open_folder
from ibnorm_export.tokens import write_byte_tokenizer
from ibnorm_export.verify import VerifyOptions, verify

FUNCTION = VerifyOptions(kernels=Kernels.FUNCTION)


def load(checkpoint: Path) -> LoadedModel:
    return models.load(checkpoint, task="text-generation")


@pytest.fixture(scope="module")
def quantised_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights large enough that logits differ: a model of nearly equal logits agrees with nothing."""
    folder = tmp_path_factory.mktemp("quantize") / "llama"
    save_checkpoint(folder, {**LLAMA, "hidden_size": 64, "initializer_range": 0.2}, IBNormSpec("L", bias=False))
    write_byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="module", params=[8, 4])
def exported(
    request: pytest.FixtureRequest, quantised_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> ExportedModel:
    options = ExportOptions(quantization=Quantization(request.param, head_bits=8))
    folder = tmp_path_factory.mktemp("quantize") / f"int{request.param}"
    return export_genai(load(quantised_checkpoint), folder, options, Kernels.FUNCTION)


def test_matrices_are_quantised_and_norms_are_not(exported: ExportedModel) -> None:
    says = exported.metadata["quantization"]
    bits = says["bits"]
    assert (says["block_size"], says["head_bits"], says["norms"]) == (32, 8, "fp32")
    assert exported.operators["com.microsoft::MatMulNBits"] == 11
    assert "MatMul" not in exported.operators
    found = [name for name in exported.weights if name.endswith(f"_Q{bits}")]
    assert len(found) == (11 if bits == 8 else 10)
    assert "lm_head.weight.T_Q8" in exported.weights
    assert all(exported.array(f"{n.module}.weight").dtype == np.float32 for n in exported.norms)
    assert len(exported.norms) == 5


def test_every_value_is_within_half_a_step_or_one(exported: ExportedModel, quantised_checkpoint: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    found = dequantize(exported, f"{name}.T")
    assert found is not None
    values, steps = found
    expected = load(quantised_checkpoint).module.state_dict()[name].numpy().T
    assert values.shape == expected.shape == (64, 64)
    assert (np.abs(values - expected) <= steps * 1.001).all()
    assert np.sqrt(np.mean(((values - expected) / steps) ** 2)) < 0.33  # 1 / sqrt(12) = 0.29 for even rounding
    assert dequantize(exported, "model.norm.weight") is None


def test_the_file_writes_text(exported: ExportedModel) -> None:
    assert open_folder(exported.path.parent).generate("abc", Sampling(5)).tokens


def test_static_verdict_sees_through_the_blocks(
    exported: ExportedModel, quantised_checkpoint: Path, tmp_path: Path
) -> None:
    report = verify(exported, load(quantised_checkpoint), FUNCTION)
    assert report.static is not None
    assert report.static, report.static.findings
    assert report.static.weights == 17
    proto = onnx.load(exported.path)
    bits = exported.metadata["quantization"]["bits"]
    name = f"model.layers.0.self_attn.qkv_proj.weight.T_Q{bits}"
    (tensor,) = (t for t in proto.graph.initializer if t.name == name)
    values = onnx.numpy_helper.to_array(tensor).copy()
    values[7] = values[7, :, ::-1]
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, name))
    onnx.save(proto, tmp_path / "model.onnx")
    broken = verify(ExportedModel(tmp_path), load(quantised_checkpoint), FUNCTION)
    assert broken.static is not None
    assert [f.where for f in broken.static.findings] == ["weight model.layers.0.self_attn.qkv_proj.weight.T"]
    assert "more than one step" in broken.static.findings[0].what


def test_quality_counts_what_it_says(exported: ExportedModel, quantised_checkpoint: Path) -> None:
    """Against another's numbers: PyTorch beside itself is perfect, beside scaled logits agrees and yet diverges."""
    from ibnorm_export.progress import silent

    model = load(quantised_checkpoint)
    own = TorchRunner(model)

    class Cold:
        name = "cold"

        def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            outputs = own.run(inputs)
            return {**outputs, "logits": outputs["logits"] * np.float32(0.5)}

    tokens = np.random.default_rng(0).integers(0, 256, 1 + 2 * 64)
    same, cold = check_quality(model, own, {"a": own, "b": Cold()}, model.inputs, "int8", tokens, silent)
    assert (same.positions, same.agreement, same.divergence, same.passed) == (128, 1.0, 0.0, True)
    assert same.before == same.after
    assert (cold.agreement, cold.passed) == (1.0, False)
    assert cold.divergence > 0.01
    assert POSITIONS == 512


def test_a_text_is_judged_by_its_kind(exported: ExportedModel, quantised_checkpoint: Path) -> None:
    text = "The quick brown fox jumps over the lazy dog. " * 4
    report = verify(exported, load(quantised_checkpoint), FUNCTION, text=text)
    assert report.numeric is not None
    (quality,) = report.numeric.quality
    assert quality.kind == f"int{exported.metadata['quantization']['bits']}"
    assert quality.positions == len(text) - 1
    assert not report.numeric.outputs
    assert (quality in report.numeric.quality) and quality.passed == bool(report.numeric)


def test_what_has_no_meaning_is_refused(quantised_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="block size is 48; it must be one of 16, 32"):
        Quantization(4, 48)
    with pytest.raises(ExportError, match="must be 4 or 8"):
        Quantization(3)
    with pytest.raises(ExportError, match="this is forward in fp32"):
        export(models.load(quantised_checkpoint), tmp_path / "a.onnx", ExportOptions(quantization=Quantization(4)))
    with pytest.raises(ExportError, match="this is text-generation in fp16"):
        export_genai(
            load(quantised_checkpoint), tmp_path / "a", ExportOptions(DType.FP16, quantization=Quantization(4))
        )
    made = export(models.load(quantised_checkpoint), tmp_path / "a.onnx")
    with pytest.raises(ModelFileError, match="a text is for text-generation"):
        verify(made, models.load(quantised_checkpoint), FUNCTION, text="abc")


def test_logging_is_left_as_it_was(quantised_checkpoint: Path, tmp_path: Path) -> None:
    code = (
        "import logging, sys; from ibnorm_export.cli.main import _run; sys.argv[1:] = sys.argv[1:]; code = _run(); "
        "root = logging.getLogger(); sys.exit(code or root.handlers != [] or root.manager.disable != 0)"
    )
    arguments = ["export", str(quantised_checkpoint), "-o", str(tmp_path / "out"), "--target", "ort-genai"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments, "--dtype", "int4"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert logging.getLogger().manager.disable == 0
