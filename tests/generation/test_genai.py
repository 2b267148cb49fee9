"""Exports for onnxruntime-genai: built by its builder, verified, run by a program that imports only that package."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from ibnorm_export import IBNormSpec, NormConfig, models
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.tensors import DType
from ibnorm_export.artifacts.tokenizer import write_byte_tokenizer
from ibnorm_export.errors import BackendUnavailable, ExportError, IBNormError, ModelFileError
from ibnorm_export.exporter.export import ExportOptions
from ibnorm_export.exporter.genai import export_genai
from ibnorm_export.generation.genai_session import GenaiModel
from ibnorm_export.op import native
from ibnorm_export.runtimes.registry import open_runner
from ibnorm_export.runtimes.runner import Kernels
from ibnorm_export.verifier.verify import VerifyOptions, verify
from tests.support.accuracy import assert_rows_close
from tests.support.checkpoints import LLAMA, save_checkpoint

CONFIG: dict[str, Any] = {**LLAMA, "hidden_size": 64}  # heads of 16, the smallest that GroupQueryAttention rotates
FUNCTION = VerifyOptions(kernels=Kernels.FUNCTION)


def load(checkpoint: Path) -> LoadedModel:
    return models.load(checkpoint, task="text-generation")


def make(folder: Path, config: dict[str, Any], spec: IBNormSpec) -> Path:
    save_checkpoint(folder, config, spec)
    write_byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def exported(text_folder: Callable[[str], Path]) -> ExportedModel:
    return ExportedModel(text_folder("genai-function"))


@pytest.fixture
def folder(exported: ExportedModel, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(exported.path.parent, tmp_path / "folder"))


def test_the_graph_is_the_builders_with_ibnorm_nodes(exported: ExportedModel) -> None:
    found = exported.operators
    assert found["com.microsoft::GroupQueryAttention"] == 2
    assert (found["ai.ibnorm::IBNormL"], found["ai.ibnorm::SkipIBNormL"]) == (1, 4)
    assert not any("LayerNormalization" in name for name in found)
    assert sorted(f.name for f in exported.proto.functions) == ["IBNormL", "SkipIBNormL"]
    config = json.loads((exported.path.parent / "genai_config.json").read_text())
    assert config["search"]["past_present_share_buffer"] is True
    assert "custom_ops_library" not in config["model"]["decoder"]["session_options"]


def test_it_verifies_in_onnxruntime_and_in_genai(exported: ExportedModel, genai_checkpoint: Path) -> None:
    report = verify(exported, load(genai_checkpoint), options=FUNCTION)
    assert report, report.findings
    assert report.numeric is not None
    assert report.static is not None
    names = [o.name for o in report.numeric.outputs]
    assert "onnxruntime-genai (33 calls)" in names
    assert report.static.weights == 17, "2 embeddings, 5 norms, 5 matrices of each of 2 layers"


@pytest.mark.parametrize(
    ("changes", "spec"),
    [
        ({"tie_word_embeddings": True, "num_key_value_heads": 4}, IBNormSpec("T", 2.0, epsilon=1e-5)),
        ({"head_dim": 32}, IBNormSpec("S", 1.0, epsilon=1e-6, scale=False, bias=False)),
    ],
    ids=["tied, full heads, bias", "wide heads, no affine"],
)
def test_other_shapes_of_model(tmp_path: Path, changes: dict[str, Any], spec: IBNormSpec) -> None:
    checkpoint = make(tmp_path / "llama", {**CONFIG, **changes}, spec)
    exported = export_genai(load(checkpoint), tmp_path / "out", kernels=Kernels.FUNCTION)
    report = verify(exported, load(checkpoint), options=FUNCTION)
    assert report, report.findings


def test_half_precision_is_verified_with_a_rounding_copy(genai_checkpoint: Path, tmp_path: Path) -> None:
    exported = export_genai(
        load(genai_checkpoint), tmp_path / "out", options=ExportOptions(DType.BF16), kernels=Kernels.FUNCTION
    )
    assert exported.operators["com.microsoft::GroupQueryAttention"] == 2
    report = verify(exported, load(genai_checkpoint), options=FUNCTION)
    assert report, report.findings


@pytest.mark.parametrize("weight", ["model.layers.0.self_attn.qkv_proj.weight.T", "lm_head.weight.T"])
def test_a_changed_weight_is_found(folder: Path, genai_checkpoint: Path, weight: str) -> None:
    proto = onnx.load(folder / "model.onnx")
    (tensor,) = (t for t in proto.graph.initializer if t.name == weight)
    values = onnx.numpy_helper.to_array(tensor).copy()
    values[3, 5] *= -1
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, weight))
    (folder / "model.onnx.data").unlink()
    onnx.save(proto, folder / "model.onnx")
    report = verify(ExportedModel(folder), load(genai_checkpoint), options=FUNCTION)
    assert report.static is not None
    assert [f.where for f in report.static.findings] == [f"weight {weight}"]


def test_a_program_that_imports_only_genai_runs_it(genai_checkpoint: Path, text_folder: Callable[[str], Path]) -> None:
    library = native.availability()
    exported = ExportedModel(text_folder("genai"))
    if library:
        config = json.loads((exported.path.parent / "genai_config.json").read_text())
        name = config["model"]["decoder"]["session_options"]["custom_ops_library"]
        assert (exported.path.parent / name).is_file()
        assert "/" not in name
    program = """
import sys
sys.modules["ibnorm_export"] = None
import onnxruntime_genai as og
model = og.Model(sys.argv[1])
tokenizer = og.Tokenizer(model)
prompt = tokenizer.encode("Hello, na\\u00efve world")
params = og.GeneratorParams(model)
params.set_search_options(max_length=len(prompt) + 8, do_sample=False)
generator = og.Generator(model, params)
generator.append_tokens(prompt)
while not generator.is_done():
    generator.generate_next_token()
print(list(map(int, generator.get_sequence(0))))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(exported.path.parent)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    tokens = json.loads(done.stdout)
    prompt = list("Hello, naïve world".encode())
    assert tokens[: len(prompt)] == prompt
    # greedy in float64, from the start at every token
    model = load(genai_checkpoint)
    module = model.in_float64()
    import torch

    expected = list(prompt)
    for _ in range(8):
        with torch.inference_mode():
            expected.append(int(module(input_ids=torch.tensor([expected])).logits[0, -1].argmax()))
    assert tokens == expected[: len(tokens)]
    assert len(tokens) > len(prompt)


def test_logits_follow_the_tokens(exported: ExportedModel) -> None:
    tokens = np.arange(12)[None] + 70
    once, again = (GenaiModel(exported.path.parent).start(1, 20) for _ in range(2))
    steps = [once.feed(tokens[:, :5]), *(once.feed(tokens[:, i : i + 1]) for i in range(5, 12))]
    assert_rows_close(steps[-1], again.feed(tokens))
    once.rewind(9)
    np.testing.assert_array_equal(once.feed(tokens[:, 9:10]), steps[5])
    assert np.abs(steps[5] - steps[6]).max() > 1e-3


# ---- what it cannot do: errors ----


def test_the_op_library_must_exist_and_match(folder: Path) -> None:
    file = folder / "genai_config.json"
    config = json.loads(file.read_text())
    config["model"]["decoder"]["session_options"]["custom_ops_library"] = "libibnorm_ort.so"
    file.write_text(json.dumps(config))
    with pytest.raises(ModelFileError, match=r"has no 'libibnorm_ort\.so', the op library"):
        GenaiModel(folder)
    (folder / "libibnorm_ort.so").write_bytes(b"\x7fELF of another machine")
    with pytest.raises(ModelFileError, match=r"was changed after packaging|does not list; it is not loaded"):
        GenaiModel(folder)
    config["model"]["decoder"]["session_options"]["custom_ops_library"] = "../libibnorm_ort.so"
    file.write_text(json.dumps(config))
    with pytest.raises(ModelFileError, match="must be the name of a file in the folder"):
        GenaiModel(folder)
    file.write_text("{")
    with pytest.raises(ModelFileError, match="is damaged"):
        GenaiModel(folder)
    file.unlink()
    with pytest.raises(ModelFileError, match=r"no genai_config\.json"):
        GenaiModel(folder)


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        ({"machine": "aarch64"}, "is built for .*, but this machine is"),
        ({"schema": {"version": 9}}, "implements .*version.: 9"),
    ],
)
def test_the_op_library_is_for_this_machine_and_schema(
    text_folder: Callable[[str], Path], tmp_path: Path, entry: dict[str, Any], match: str
) -> None:
    if not native.availability():
        pytest.skip(str(native.availability()))
    folder = Path(shutil.copytree(text_folder("genai"), tmp_path / "out"))
    assert GenaiModel(folder).start(1, 8).feed(np.ones((1, 3), dtype=np.int64)).shape == (1, 256)
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text())
    (name,) = manifest["libraries"]
    manifest["libraries"][name] |= entry
    file.write_text(json.dumps(manifest))
    with pytest.raises(ModelFileError, match=match):
        GenaiModel(folder)


def test_rows_of_unequal_length_are_rejected(exported: ExportedModel, genai_checkpoint: Path) -> None:
    model = load(genai_checkpoint)
    inputs = model.sample(np.random.default_rng(0), 1)
    assert (inputs["attention_mask"] == 0).any()
    with pytest.raises(ModelFileError, match="rows of the inputs have unequal lengths"):
        verify(exported, model, options=FUNCTION, inputs=[inputs])


def test_a_past_of_the_wrong_shape_is_rejected(exported: ExportedModel, genai_checkpoint: Path) -> None:
    model = load(genai_checkpoint)
    inputs = model.sample(np.random.default_rng(0), 2)
    names = {t.name for t in exported.inputs}
    inputs = {name: array for name, array in inputs.items() if name in names}
    inputs["past_key_values.0.key"] = np.zeros((1, 3, 4, 16), dtype=np.float32)
    with pytest.raises(ModelFileError, match="ONNX Runtime cannot run the model"):
        open_runner("ort-cpu", exported, kernels=Kernels.FUNCTION).run(inputs)


def test_what_the_builder_cannot_export(llama_checkpoint: Path, genai_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="multiples of 16"):
        export_genai(load(llama_checkpoint), tmp_path / "a")
    with pytest.raises(ExportError, match="for the task text-generation"):
        export_genai(models.load(genai_checkpoint), tmp_path / "a")
    with pytest.raises(ExportError, match="does not take --opset, --inline, --cache"):
        export_genai(load(genai_checkpoint), tmp_path / "a", options=ExportOptions(opset=20))
    mixed = NormConfig.from_config(
        {
            **IBNormSpec("L", bias=False).to_config(),
            "layers": [{"match": "model.norm", "norm": "rmsnorm"}],
        }
    )
    models.save(models.new_model(CONFIG, mixed), tmp_path / "mixed")
    with pytest.raises(ExportError, match="final_norm of layer 2 is RMSNorm"):
        export_genai(load(tmp_path / "mixed"), tmp_path / "a", kernels=Kernels.FUNCTION)
    assert not (tmp_path / "a").exists()


def test_the_builder_has_one_version(genai_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "0.99.0" if name == "onnxruntime-genai" else real(name)
    )
    with pytest.raises(BackendUnavailable, match=r"0\.99\.0 is installed"):
        export_genai(load(genai_checkpoint), tmp_path / "a")

    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(IBNormError, match=r"ibnorm-export\[genai\]"):
        export_genai(load(genai_checkpoint), tmp_path / "a")
