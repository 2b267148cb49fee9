"""Folders for transformers.js as files: names, config.json, and what is refused. `tests/targets` loads them in Node."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime as ort
import pytest

from ibnorm_export import ExportedModel, ExportError, ExportOptions, LoadedModel, Target, Task, export, load
from ibnorm_export.artifacts.tensors import WeightType
from ibnorm_export.exporter import single_file, transformers_js
from ibnorm_export.exporter.export import export_weights, task_of
from ibnorm_export.graph.quantization import Quantization
from ibnorm_export.verifier.finding import Finding
from ibnorm_export.verifier.folder import _companion_problems


@pytest.fixture(scope="module")
def text_model(llama_checkpoint: Path) -> LoadedModel:
    return load(llama_checkpoint, task="text-generation")


@pytest.fixture
def image_model(built: ir.Model, vit_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> LoadedModel:
    """A checkpoint whose export only has to write files."""
    monkeypatch.setattr(transformers_js, "build", lambda *_, **__: ir.from_proto(ir.to_proto(built)))
    return load(vit_checkpoint)


def test_the_task_is_that_of_the_checkpoint(llama_checkpoint: Path, vit_checkpoint: Path) -> None:
    assert task_of("transformers.js", checkpoint=llama_checkpoint) is Task.TEXT_GENERATION
    assert task_of("transformers.js", Task.TEXT_GENERATION, checkpoint=vit_checkpoint) is Task.FORWARD
    assert export_weights("transformers.js", Task.TEXT_GENERATION) == ("fp32", "fp16", "int8", "int4")
    assert export_weights(Target.TRANSFORMERS_JS, Task.FORWARD) == ("fp32", "fp16")
    assert export_weights("portable", Task.TEXT_GENERATION) == ("fp32",)


def test_a_model_that_transformers_js_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match=r"needs a checkpoint folder with config\.json: .*config\.json does not exist"
    ):
        task_of("transformers.js", checkpoint=tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "nobody"}', encoding="utf-8")
    with pytest.raises(
        ExportError, match=r"takes only a model_type of bloom, gemma, .*, vit; that of .* is 'nobody'\. Export .*-web"
    ):
        task_of("transformers.js", checkpoint=tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "falcon"}', encoding="utf-8")
    with pytest.raises(ExportError, match=r"is 'falcon': it starts Falcon without the inputs of the cache"):
        task_of("transformers.js", checkpoint=tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "options is empty"),
        (ExportOptions("bf16"), "transformers.js has no dtype for bf16; choose among fp32, fp16, int8, int4"),
        ([ExportOptions(), ExportOptions(opset=23)], "fp32 is given twice"),
        (ExportOptions(shape={"sequence_length": 4}), "fixes sequence_length, but transformers.js gives texts of any"),
        (ExportOptions(runtime="litert"), "the runtime is litert, but the target transformers.js, which runs ONNX"),
        (ExportOptions(runtime="openvino"), "the runtime is openvino, but the target transformers.js"),
        (ExportOptions(cache="static"), "leave out --cache static"),
    ],
)
def test_options_that_do_not_suit(text_model: LoadedModel, tmp_path: Path, options: Any, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        export(text_model, tmp_path / "web", target="transformers.js", options=options)
    assert not (tmp_path / "web").exists()


def test_other_targets_take_one_type(text_model: LoadedModel, tmp_path: Path) -> None:
    several = [ExportOptions(), ExportOptions(quantization=Quantization(8))]
    with pytest.raises(ExportError, match=r"portable writes one type of weights; only transformers\.js takes several"):
        export(text_model, tmp_path / "out", options=several)


def test_a_tokenizer_without_its_config(llama_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(llama_checkpoint, tmp_path / "checkpoint")
    (checkpoint / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ExportError, match=r"no tokenizer_config\.json, and transformers\.js reads both"):
        export(load(checkpoint, task="text-generation"), tmp_path / "web", target="transformers.js")


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_weights_above_the_limit_of_a_browser(
    image_model: LoadedModel, vit_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(tensor.numel() * 4 for tensor in image_model.module.parameters())
    monkeypatch.setattr(transformers_js, "_SHARD_BYTES", size * 2 // 5)
    folder = tmp_path / "web"
    written = export(image_model, folder, target="transformers.js", options=ExportOptions())
    data = {file.name: file.stat().st_size for file in (folder / "onnx").glob("*_data*")}
    assert set(data) == {"model.onnx_data", "model.onnx_data_1", "model.onnx_data_2"}
    assert max(data.values()) <= size * 2 // 5
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    expected = {"dtype": "fp32", "use_external_data_format": {"model.onnx": 3}}
    assert config.pop("transformers.js_config") == expected
    assert config == json.loads((vit_checkpoint / "config.json").read_text(encoding="utf-8"))
    assert written.metadata.target is Target.TRANSFORMERS_JS
    assert ort.InferenceSession(written.path).get_inputs()[0].name == "pixel_values"
    monkeypatch.undo()


def test_the_section_of_another_export_is_not_copied(vit_checkpoint: Path, tmp_path: Path) -> None:
    """A checkpoint that was trained from a model of a hub may still state how that model's files are called."""
    checkpoint = shutil.copytree(vit_checkpoint, tmp_path / "checkpoint")
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    stale = {**config, "transformers.js_config": {"use_external_data_format": True, "dtype": "q4"}}
    (checkpoint / "config.json").write_text(json.dumps(stale, indent=2) + "\n", encoding="utf-8")
    folder = tmp_path / "web"
    (folder / "onnx").mkdir(parents=True)
    for name in ("model.onnx", "model_quantized.onnx"):
        (folder / "onnx" / name).touch()

    def problems() -> list[Finding]:
        return list(_companion_problems(folder, load(checkpoint), names=("config.json",), web=True))

    weights = (WeightType.FP32, WeightType.INT8)
    transformers_js._write_config(checkpoint, folder, weights=weights, data_files={})
    assert json.loads((folder / "config.json").read_text(encoding="utf-8")) == config
    assert problems() == []
    shutil.copyfile(checkpoint / "config.json", folder / "config.json")
    assert [found.where for found in problems()] == [
        "config.json transformers.js_config.dtype",
        "config.json transformers.js_config.use_external_data_format",
    ]


def test_an_earlier_export_is_replaced_and_no_other_file(image_model: LoadedModel, tmp_path: Path) -> None:
    folder = tmp_path / "web"
    for _ in range(2):
        export(image_model, folder, target="transformers.js", options=ExportOptions())
        assert files(folder) == {"config.json", "onnx/model.onnx"}
    assert ExportedModel(folder).path == folder / "onnx" / "model.onnx"
    (folder / "onnx" / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ExportError, match=r"contains onnx/notes\.txt, which this command did not write"):
        export(image_model, folder, target="transformers.js", options=ExportOptions())


def test_a_weight_larger_than_any_file(
    image_model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers_js, "_SHARD_BYTES", 1000)
    with pytest.raises(ExportError, match="and a file for browsers at most 1000"):
        export(image_model, tmp_path / "web", target="transformers.js", options=ExportOptions())
    assert list(tmp_path.iterdir()) == []


def test_build_is_that_of_single_files() -> None:
    """The fixture above replaces this name."""
    assert transformers_js.build is single_file.build
