"""LoadedModel -> a folder that `@huggingface/transformers` (transformers.js) 4 loads, in Node and in a browser.

    config.json, generation_config.json, tokenizer.json, tokenizer_config.json, preprocessor_config.json
    onnx/model.onnx            dtype "fp32"
    onnx/model_fp16.onnx       dtype "fp16"
    onnx/model_quantized.onnx  dtype "q8", which is the default in a browser
    onnx/model_q4.onnx         dtype "q4"

Weights above 2 GB go into files that are called like the model with `_data`, `_data_1`, ... appended, which config.json
counts. Source of the layout: getSession, getModelDataFiles and selectDtype of transformers.js 4.3.2.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import onnx
import onnx_ir as ir

from ibnorm_export.artifacts.axes import BATCH
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.metadata import CacheKind, ModelMetadata, Target, Task
from ibnorm_export.artifacts.runtime_versions import RuntimeName
from ibnorm_export.artifacts.tensors import WeightType
from ibnorm_export.artifacts.tokenizer import read_json
from ibnorm_export.errors import ExportError, ModelFileError, quoted
from ibnorm_export.exporter.companions import (
    COMPANION_FILES,
    PREPROCESSOR,
    TRANSFORMERS_JS,
    WEB_FILES,
    WEB_FOLDER,
    copy_companions,
)
from ibnorm_export.exporter.options import ExportOptions
from ibnorm_export.exporter.single_file import build, check_written, quantized, write_metadata
from ibnorm_export.files import new_folder
from ibnorm_export.graph.cleanup import forget_initializer_info
from ibnorm_export.graph.float32_ends import float32_ends
from ibnorm_export.graph.model_writer import write_model
from ibnorm_export.progress import Progress, silent

__all__ = [
    "MODEL_FOLDER",
    "MODEL_TYPES",
    "WEIGHT_FILES",
    "earlier_web_export",
    "export_transformers_js",
    "web_task",
    "web_weights",
]

#: The folder of the models, and what transformers.js calls the types of weights: the values of its option `dtype`.
MODEL_FOLDER: Final = WEB_FOLDER
DTYPES: Final = {WeightType.FP32: "fp32", WeightType.FP16: "fp16", WeightType.INT8: "q8", WeightType.INT4: "q4"}

#: The file of each type of weights.
WEIGHT_FILES: Final = {weights: WEB_FILES[dtype] for weights, dtype in DTYPES.items()}

#: The values of `model_type` with which transformers.js was seen to give what Python gives, and their tasks.
MODEL_TYPES: Final = {
    **dict.fromkeys(
        (
            "bloom",
            "gemma",
            "gemma2",
            "gemma3_text",
            "gpt2",
            "gpt_neox",
            "llama",
            "mistral",
            "olmo2",
            "opt",
            "phi3",
            "qwen2",
            "qwen3",
        ),
        Task.TEXT_GENERATION,
    ),
    **dict.fromkeys(
        ("bert", "distilbert", "electra", "modernbert", "roberta", "convnext", "deit", "resnet", "swin", "vit"),
        Task.FORWARD,
    ),
}

#: Why others that it knows are refused.
_REFUSED: Final = {"falcon": "it starts Falcon without the inputs of the cache (transformers.js 4.3.2)"}

#: Browsers give no page a buffer of 2 GiB, so that no file is longer.
_SHARD_BYTES: Final = 2_000_000_000

#: Constants of up to this many bytes, such as shapes, stay in the model: inference of shapes reads no other file.
_INSIDE_BYTES: Final = 256


def web_task(checkpoint: str | Path) -> Task:
    """Return the task for which a checkpoint must be loaded to be exported for transformers.js.

    Args:
        checkpoint: a folder with config.json.

    Raises:
        ExportError: transformers.js is not known to run the model, or there is no config.json.
    """
    model_type = _config(Path(checkpoint)).get("model_type")
    if not isinstance(model_type, str) or model_type not in MODEL_TYPES:
        why = f": {_REFUSED[model_type]}" if isinstance(model_type, str) and model_type in _REFUSED else ""
        raise ExportError(
            f"--target transformers.js takes only a model_type of {', '.join(MODEL_TYPES)}; that of "
            f"{checkpoint}/config.json is {quoted(model_type)}{why}. Export with --target portable, and run the file "
            "with onnxruntime-web or onnxruntime-node"
        )
    return MODEL_TYPES[model_type]


def _config(checkpoint: Path) -> dict[str, Any]:
    try:
        return read_json(checkpoint / "config.json")
    except ModelFileError as error:
        raise ExportError(f"--target transformers.js needs a checkpoint folder with config.json: {error}") from error


def _weight_type(options: ExportOptions) -> WeightType:
    """The type of weights that an export with these options has."""
    if options.quantization is not None:
        return WeightType.INT8 if options.quantization.bits == 8 else WeightType.INT4
    return WeightType(options.dtype)


def web_weights(task: Task) -> tuple[WeightType, ...]:
    """Every type of weights that a model of this task can have."""
    plain = (WeightType.FP32, WeightType.FP16)
    return (*plain, WeightType.INT8, WeightType.INT4) if task is Task.TEXT_GENERATION else plain


def _check_options(chosen: Sequence[ExportOptions]) -> dict[WeightType, ExportOptions]:
    """Return the options by type of weights."""
    if not chosen:
        raise ExportError("options is empty; give one ExportOptions for each type of weights, or None for all types")
    found: dict[WeightType, ExportOptions] = {}
    for options in chosen:
        weights = _weight_type(options)
        if weights not in WEIGHT_FILES:
            raise ExportError(f"transformers.js has no dtype for {weights}; choose among {', '.join(WEIGHT_FILES)}")
        if weights in found:
            raise ExportError(f"{weights} is given twice; a folder for transformers.js has one file of each type")
        if options.cache is not CacheKind.DYNAMIC:
            raise ExportError("transformers.js grows the cache itself: leave out --cache static")
        _check_form(options)
        found[weights] = options
    return found


def _check_form(options: ExportOptions) -> None:
    """Raise ExportError for a form that transformers.js does not run: it gives texts of any length."""
    runtime = options.runtime
    if runtime is not None and runtime.runtime not in (RuntimeName.WEB, RuntimeName.ORT):
        raise ExportError(
            f"the runtime is {runtime}, but the target {Target.TRANSFORMERS_JS}, which runs ONNX Runtime: leave one of "
            "them out"
        )
    if fixed := sorted(set(options.shape) - {BATCH}):
        raise ExportError(
            f"shape fixes {fixed[0]}, but transformers.js gives texts of any length: leave it out, or export with "
            "--target portable"
        )


def _check_tokenizer(source: Path) -> None:
    if (source / "tokenizer.json").is_file() and not (source / "tokenizer_config.json").is_file():
        raise ExportError(
            f"{source} has tokenizer.json but no tokenizer_config.json, and transformers.js reads both; write them "
            "with AutoTokenizer.from_pretrained(...).save_pretrained"
        )


def _shards(built: ir.Model) -> list[list[ir.Value]]:
    """The weights in the order of the model, in groups that fit into one file each."""
    groups: list[list[ir.Value]] = []
    free = 0
    for value in built.graph.initializers.values():
        assert value.const_value is not None
        size = value.const_value.nbytes
        if size <= _INSIDE_BYTES:
            continue
        if size > _SHARD_BYTES:
            raise ExportError(
                f"the weight {value.name} has {size} bytes, and a file for browsers at most {_SHARD_BYTES}: export "
                "with --dtype int8 or int4"
            )
        if not groups or size > free:
            groups.append([])
            free = _SHARD_BYTES
        groups[-1].append(value)
        free -= size
    return groups


def _save(built: ir.Model, file: Path) -> tuple[onnx.ModelProto, int]:
    """Write a model. Return it without its weights, and the number of its data files: none up to 2 GB of weights."""
    shards = _shards(built)
    forget_initializer_info(built.graph)
    if len(shards) <= 1:
        return write_model(built, file), 0
    for number, values in enumerate(shards):
        name = f"{file.name}_data{f'_{number}' if number else ''}"
        tensors = [value.const_value for value in values if value.const_value is not None]
        stored = ir.external_data.convert_tensors_to_external(tensors, file.parent, name)
        for value, tensor in zip(values, stored, strict=True):
            value.const_value = tensor
    return write_model(built, file), len(shards)


def _write_model(model: LoadedModel, file: Path, *, options: ExportOptions, progress: Progress) -> int:
    """Write one model, and return the number of its data files."""
    built = build(model, options, progress=progress)
    built = quantized(built, options)
    # A browser has no half-precision numbers for images and scores; the cache only goes from one call to the next.
    float32_ends(built.graph, wanted=lambda name: not name.startswith(("past_key_values.", "present.")))
    metadata = ModelMetadata.from_props(built.metadata_props, file)
    write_metadata(built, replace(metadata, target=Target.TRANSFORMERS_JS))
    written, count = _save(built, file)
    check_written(written, options.dtype, opset=built.opset_imports[""])
    return count


def _write_config(source: Path, folder: Path, *, weights: Sequence[WeightType], data_files: dict[str, int]) -> None:
    """Write config.json: the checkpoint's, with what transformers.js must know to find the files."""
    section: dict[str, Any] = {}
    if not {WeightType.FP32, WeightType.INT8} <= set(weights):  # its defaults, in Node and in a browser
        section["dtype"] = DTYPES[weights[0]]
    if data_files:
        section["use_external_data_format"] = data_files
    config = _config(source)
    config.pop(TRANSFORMERS_JS, None)  # that of the checkpoint is about the files of another export
    if section:
        config[TRANSFORMERS_JS] = section
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def earlier_web_export(folder: Path) -> set[str]:
    """Names of the files that an export for transformers.js writes, or has written, to `folder`.

    Raises:
        ExportError: the folder has no model, or this package did not write it.
    """
    models = [file for file in (folder / MODEL_FOLDER / name for name in WEIGHT_FILES.values()) if file.is_file()]
    if not models:
        raise ExportError(f"{folder} is not empty and has no {MODEL_FOLDER}/model.onnx: choose another folder")
    if not all(ExportedModel(file).metadata.source_sha256 for file in models):
        raise ExportError(f"{models[0]} was not written by ibnorm-export: choose another folder, or move the file away")
    written = {file.name for name in WEIGHT_FILES.values() for file in (folder / MODEL_FOLDER).glob(f"{name}*")}
    return {*(f"{MODEL_FOLDER}/{name}" for name in written), *COMPANION_FILES, PREPROCESSOR}


def export_transformers_js(
    model: LoadedModel,
    folder: str | Path,
    *,
    options: Sequence[ExportOptions] | None = None,
    progress: Progress = silent,
) -> ExportedModel:
    """Write a model as a folder that transformers.js 4 loads without an edit; see the top of this module.

    Inputs and outputs are fp32 in every file, but for the cache of a language model in fp16. The folder appears whole
    or not at all.

    Args:
        model: loaded for the task that `web_task` returns; it is not changed.
        folder: the folder to write; an earlier export in it is replaced.
        options: one for each type of weights; None is all: fp32 and fp16, and int8 and int4 for language models.
        progress: called at the start of each stage.

    Returns:
        The first file that was written.

    Raises:
        ExportError: transformers.js is not known to run the model, it was loaded for another task, an option does not
            suit it, or the folder contains other files.
        ModelFileError: the tokenizer is damaged or does not fit the model.
    """
    source = Path(model.source)
    task = web_task(source)
    if model.task is not task:
        raise ExportError(
            f"{model.source} was loaded for the task {model.task}, but transformers.js runs it for {task}: load it "
            f"with task={task.value!r}"
        )
    chosen = _check_options(
        [ExportOptions.with_weights(weights) for weights in web_weights(task)] if options is None else options
    )
    _check_tokenizer(source)
    with new_folder(Path(folder), earlier_web_export) as new:
        copy_companions(model, new)
        if (source / PREPROCESSOR).is_file():
            shutil.copyfile(source / PREPROCESSOR, new / PREPROCESSOR)
        (new / MODEL_FOLDER).mkdir()
        counts = {
            WEIGHT_FILES[weights]: _write_model(
                model, new / MODEL_FOLDER / WEIGHT_FILES[weights], options=how, progress=progress
            )
            for weights, how in chosen.items()
        }
        data_files = {name: count for name, count in counts.items() if count}
        _write_config(source, new, weights=list(chosen), data_files=data_files)
    progress("written", 4, 4)
    return ExportedModel(Path(folder) / MODEL_FOLDER / next(iter(counts)))
