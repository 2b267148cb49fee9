"""int8 and int4: what is stored, that it is within a step of the trained weights, and how predictions are checked."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from ibnorm_export import IBNormSpec, models
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.tensors import DType
from ibnorm_export.artifacts.tokenizer import write_byte_tokenizer
from ibnorm_export.errors import ExportError, ModelFileError
from ibnorm_export.exporter.export import ExportOptions, export
from ibnorm_export.exporter.genai import export_genai
from ibnorm_export.exporter.text_folder import export_folder
from ibnorm_export.generation.sampling import Sampling
from ibnorm_export.generation.text_model import open_folder
from ibnorm_export.graph.quantization import Quantization, dequantize, step_sizes
from ibnorm_export.runtimes.runner import Kernels
from ibnorm_export.runtimes.torch import TorchRunner
from ibnorm_export.verifier.outputs.quality import POSITIONS, check_quality
from ibnorm_export.verifier.verify import VerifyOptions, verify
from tests.support.checkpoints import LLAMA, save_checkpoint
from tests.support.comparisons import compare_runners

FUNCTION = VerifyOptions(kernels=Kernels.FUNCTION)


def load(checkpoint: Path) -> LoadedModel:
    return models.load(checkpoint, task="text-generation")


@pytest.fixture(scope="module")
def quantised_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights large enough that logits differ: nearly equal logits would make the predictions arbitrary."""
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
    return export_genai(load(quantised_checkpoint), folder, options=options, kernels=Kernels.FUNCTION)


def test_matrices_are_quantised_and_norms_are_not(exported: ExportedModel) -> None:
    recorded = exported.metadata.quantization
    assert recorded is not None
    bits = recorded.bits
    assert (recorded.block_size, recorded.head_bits, recorded.norms) == (32, 8, "fp32")
    assert exported.operators["com.microsoft::MatMulNBits"] == 11
    assert "MatMul" not in exported.operators
    found = [name for name in exported.weights if name.endswith(f"_Q{bits}")]
    assert len(found) == (11 if bits == 8 else 10)
    assert "lm_head.weight.T_Q8" in exported.weights
    assert all(exported.array(f"{n.module}.weight").dtype == np.float32 for n in exported.norms)
    assert len(exported.norms) == 5


def test_every_value_is_within_half_a_step_or_one(exported: ExportedModel, quantised_checkpoint: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    values = dequantize(exported, f"{name}.T")
    assert values is not None
    expected = load(quantised_checkpoint).module.state_dict()[name].numpy().T
    assert values.shape == expected.shape == (64, 64)
    step = step_sizes(expected, exported.metadata.quantization.bits, block_size=32)
    assert (np.abs(values - expected) <= step * 1.001).all()
    assert np.sqrt(np.mean(((values - expected) / step) ** 2)) < 0.33  # 1 / sqrt(12) = 0.29 for even rounding
    assert dequantize(exported, "model.norm.weight") is None


def test_the_steps_of_a_block() -> None:
    """By hand: a block reaches from its smallest value to its largest, and includes 0."""
    weight = np.array([[-1, 1], [2, 3], [0, 2], [5, -1], [-10, 0]], dtype=np.float32)
    expected = np.array([[3, 3]] * 2 + [[5, 3]] * 2 + [[10, 0]], dtype=np.float32) / 15
    np.testing.assert_allclose(step_sizes(weight, 4, block_size=2), expected, rtol=1e-6)


def test_a_quantised_file_generates_text(exported: ExportedModel) -> None:
    assert open_folder(exported.path.parent).generate("abc", Sampling(5)).tokens


def test_the_static_verdict_reads_quantised_weights(
    exported: ExportedModel, quantised_checkpoint: Path, tmp_path: Path
) -> None:
    report = verify(exported, load(quantised_checkpoint), options=FUNCTION)
    assert report.static is not None
    assert report.static, report.static.findings
    assert report.static.weights == 17
    proto = onnx.load(exported.path)
    bits = exported.metadata.quantization.bits
    name = f"model.layers.0.self_attn.qkv_proj.weight.T_Q{bits}"
    (tensor,) = (t for t in proto.graph.initializer if t.name == name)
    values = onnx.numpy_helper.to_array(tensor).copy()
    values[7] = values[7, :, ::-1]
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, name))
    onnx.save(proto, tmp_path / "model.onnx")
    broken = verify(ExportedModel(tmp_path), load(quantised_checkpoint), options=FUNCTION)
    assert broken.static is not None
    (finding,) = (
        f for f in broken.static.findings if f.where.startswith("weight")
    )  # the rest of the folder is missing
    assert finding.where == "weight model.layers.0.self_attn.qkv_proj.weight.T"
    assert "more than one step" in finding.what


@pytest.fixture(scope="module")
def portable(quantised_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportedModel:
    """int4 in standard operators and MatMulNBits, which accepts rows of unequal length; GenAI does not."""
    options = ExportOptions(quantization=Quantization(4))
    return export_folder(load(quantised_checkpoint), tmp_path_factory.mktemp("quantize") / "portable", options=options)


def test_a_quantised_matrix_belongs_to_the_module_of_its_linear_layer(portable: ExportedModel) -> None:
    """The comparison of layers takes a block's end from the modules of the nodes."""
    modules = [
        {entry.key: entry.value for entry in node.metadata_props}.get("module", "")
        for node in onnx.load(portable.path, load_external_data=False).graph.node
        if node.op_type == "MatMulNBits"
    ]
    assert "model.layers.0.mlp.down_proj" in modules
    assert all(modules)


def planted(exported: ExportedModel, folder: Path, change: Callable[[onnx.ModelProto], None]) -> ExportedModel:
    proto = onnx.load(exported.path)
    change(proto)
    onnx.save(proto, folder / "model.onnx")
    return ExportedModel(folder / "model.onnx")


def test_a_quantised_file_is_compared_with_its_own_matrices(
    portable: ExportedModel, quantised_checkpoint: Path
) -> None:
    """Within the tolerance of fp32; the checkpoint's own numbers differ 100,000 times as much."""
    model = load(quantised_checkpoint)
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    report = verify(portable, model, options=VerifyOptions(layers=True))
    assert {finding.where for finding in report.findings} == {"quality"}, "int4 predictions of random weights are poor"
    assert report.numeric is not None
    assert report.numeric.dtype == "int4"
    assert {"logits", "prompt (1 call)", "decoding (32 calls)"} <= {o.name for o in report.numeric.outputs}
    assert max(output.error for output in report.numeric.outputs) < 2e-6
    assert report.numeric.layers is not None
    assert report.numeric.layers.layers
    assert report.numeric.quality
    assert all(bool((before[name] == tensor).all()) for name, tensor in model.module.state_dict().items())


def test_a_mask_that_is_ignored_is_found(portable: ExportedModel, quantised_checkpoint: Path, tmp_path: Path) -> None:
    def ignore(proto: onnx.ModelProto) -> None:
        ones = onnx.numpy_helper.from_array(np.array(1, np.int64), "one")
        proto.graph.initializer.append(ones)
        proto.graph.node.insert(0, onnx.helper.make_node("Max", ["attention_mask", "one"], ["whole"]))
        for node in list(proto.graph.node)[1:]:
            for index, name in enumerate(node.input):
                if name == "attention_mask":
                    node.input[index] = "whole"

    report = verify(planted(portable, tmp_path, ignore), load(quantised_checkpoint))
    assert {"operators", "output logits", "prompt", "decoding"} <= {finding.where for finding in report.findings}


def test_a_matrix_of_zeros_with_huge_scales_is_found(
    portable: ExportedModel, quantised_checkpoint: Path, tmp_path: Path
) -> None:
    """A value may differ by a step of the checkpoint's weights, not by a step that the file claims."""
    name = "model.layers.1.self_attn.o_proj.weight.T"

    def vanish(proto: onnx.ModelProto) -> None:
        found = {tensor.name: tensor for tensor in proto.graph.initializer}
        for suffix, change in (
            ("_Q4", lambda a: a * 0 + 0x88),
            ("_zero_points", lambda a: a * 0 + 0x88),
            ("_scales", lambda a: a * 0 + 100),
        ):
            tensor = found[name + suffix]
            array = change(onnx.numpy_helper.to_array(tensor))
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))

    file = planted(portable, tmp_path, vanish)
    zeros = dequantize(file, name)
    assert zeros is not None
    assert not zeros.any()
    report = verify(file, load(quantised_checkpoint))
    assert report.static is not None
    assert [finding.where for finding in report.static.findings] == [f"weight {name}"]


def test_a_file_is_not_excused_by_its_own_metadata(
    portable: ExportedModel, quantised_checkpoint: Path, tmp_path: Path
) -> None:
    """A file that declares int4 must have such matrices, with as many bits."""
    model = load(quantised_checkpoint)
    plain = export_folder(model, tmp_path / "plain")

    def claim(proto: onnx.ModelProto) -> None:
        says = {"bits": 4, "block_size": 32, "head_bits": 8}
        entry = next(entry for entry in proto.metadata_props if entry.key == "ibnorm.quantization")
        entry.value = json.dumps(says)
        weight = next(t for t in proto.graph.initializer if t.name == "model.norm.weight")
        weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * 1.01, weight.name))

    (tmp_path / "claims").mkdir()
    report = verify(planted(plain, tmp_path / "claims", claim), model, options=VerifyOptions(static=False))
    assert "output logits" in {finding.where for finding in report.findings}

    def other(proto: onnx.ModelProto) -> None:
        entry = next(entry for entry in proto.metadata_props if entry.key == "ibnorm.quantization")
        entry.value = json.dumps({**json.loads(entry.value), "bits": 8})

    (tmp_path / "other").mkdir()
    report = verify(planted(portable, tmp_path / "other", other), model)
    assert report.static is not None
    assert "has 4 bits per value; the metadata of the file declares 8" in {f.what for f in report.static.findings}

    def vast(proto: onnx.ModelProto) -> None:
        entry = next(entry for entry in proto.metadata_props if entry.key == "ibnorm.quantization")
        entry.value = json.dumps({**json.loads(entry.value), "block_size": 0})

    (tmp_path / "vast").mkdir()
    report = verify(planted(portable, tmp_path / "vast", vast), model)
    assert report.static is not None
    assert any("has blocks of 0 values" in finding.what for finding in report.static.findings)


def test_fused_norms_are_required_of_quantised_files_too(portable: ExportedModel, quantised_checkpoint: Path) -> None:
    options = VerifyOptions(kernels=Kernels.FUNCTION, require_fused=True, samples=1)
    report = verify(portable, load(quantised_checkpoint), options=options)
    unfused = [finding.where for finding in report.findings if finding.where != "quality"]
    assert unfused == [f"norm {node.module}" for node in portable.norms]


def test_an_incomplete_matrix_is_named(portable: ExportedModel, quantised_checkpoint: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight.T"

    def lose(proto: onnx.ModelProto) -> None:
        kept = [tensor for tensor in proto.graph.initializer if tensor.name != f"{name}_zero_points"]
        del proto.graph.initializer[:]
        proto.graph.initializer.extend(kept)

    report = verify(planted(portable, tmp_path, lose), load(quantised_checkpoint))
    assert f"weight {name}" in {finding.where for finding in report.findings}


def test_quality_is_measured_as_documented(exported: ExportedModel, quantised_checkpoint: Path) -> None:
    """PyTorch compared with itself is perfect; compared with scaled logits, it agrees but diverges."""
    model = load(quantised_checkpoint)
    baseline = TorchRunner(model)

    class Cold:
        name = "cold"

        def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            outputs = baseline.run(inputs)
            return {**outputs, "logits": outputs["logits"] * np.float32(0.5)}

    tokens = np.random.default_rng(0).integers(0, 256, 1 + 2 * 64)
    comparison = compare_runners(exported, model, runners={"same": baseline, "cold": Cold()})
    same, cold = check_quality(comparison, tokens, kind="int8")
    assert (same.positions, same.agreement, same.divergence, same.passed) == (128, 1.0, 0.0, True)
    assert same.baseline_perplexity == same.perplexity
    assert (cold.agreement, cold.passed) == (1.0, False)
    assert cold.divergence > 0.01
    assert POSITIONS == 512


def test_a_text_is_checked_by_the_type_of_the_weights(exported: ExportedModel, quantised_checkpoint: Path) -> None:
    text = "The quick brown fox jumps over the lazy dog. " * 4
    report = verify(exported, load(quantised_checkpoint), options=FUNCTION, text=text)
    assert report.numeric is not None
    (quality,) = report.numeric.quality
    assert quality.kind == f"int{exported.metadata.quantization.bits}"
    assert quality.positions == len(text) - 1
    assert report.numeric.outputs
    assert all(output.passed for output in report.numeric.outputs)
    assert quality.passed == bool(report.numeric)


def test_options_without_meaning_are_rejected(quantised_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="block size is 48; it must be one of 16, 32"):
        Quantization(4, 48)
    with pytest.raises(ExportError, match="must be 4 or 8"):
        Quantization(3)
    with pytest.raises(ExportError, match="was loaded for the task forward"):
        export(
            models.load(quantised_checkpoint), tmp_path / "a.onnx", options=ExportOptions(quantization=Quantization(4))
        )
    with pytest.raises(ExportError, match="with quantised weights must compute in fp32"):
        export_genai(
            load(quantised_checkpoint), tmp_path / "a", options=ExportOptions(DType.FP16, quantization=Quantization(4))
        )
    exported = export(models.load(quantised_checkpoint), tmp_path / "a.onnx")
    with pytest.raises(ModelFileError, match="a text needs task text-generation"):
        verify(exported, models.load(quantised_checkpoint), options=FUNCTION, text="abc")


def test_logging_is_restored(quantised_checkpoint: Path, tmp_path: Path) -> None:
    code = (
        "import logging, sys; from ibnorm_export.cli.main import main; code = main(); "
        "root = logging.getLogger(); sys.exit(code or root.handlers != [] or root.manager.disable != 0)"
    )
    arguments = ["export", str(quantised_checkpoint), "-o", str(tmp_path / "out"), "--target", "ort-genai"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments, "--dtype", "int4", "--quiet"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert logging.getLogger().manager.disable == 0
