"""LoadedModel -> a folder that a language model is served from: model.onnx, config and tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Final

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.manifest import MANIFEST_FILE, read_manifest
from ibnorm_export.artifacts.metadata import Task
from ibnorm_export.artifacts.onnx_file import MODEL_FILE
from ibnorm_export.artifacts.tokenizer import TOKENIZER_FILES, FolderTokenizer
from ibnorm_export.errors import ExportError
from ibnorm_export.exporter.export import ExportOptions, export
from ibnorm_export.files import new_folder
from ibnorm_export.progress import Progress, silent

__all__ = ["copy_companions", "earlier_export", "export_folder"]

_CONFIG_FILES: Final = ("config.json", "generation_config.json")


def copy_companions(model: LoadedModel, folder: Path) -> None:
    """Copy the checkpoint's configuration and, where it has one, its tokenizer into `folder`.

    Raises:
        ModelFileError: the tokenizer is damaged or does not fit the model's embedding.
    """
    source = Path(model.source)
    if (source / "tokenizer.json").is_file():
        FolderTokenizer(source, model.vocabulary)
    for name in (*_CONFIG_FILES, *TOKENIZER_FILES):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def earlier_export(folder: Path) -> set[str]:
    """The files in `folder` that an export of a language model has written, or would write.

    Raises:
        ExportError: its model.onnx is missing, or is not of this package.
    """
    file = folder / MODEL_FILE
    if not file.is_file():
        raise ExportError(f"{folder} is not empty and holds no {MODEL_FILE}; choose another folder")
    if not ExportedModel(file).metadata.source_sha256:
        raise ExportError(f"{file} was not written by ibnorm-export; choose another folder, or move it away")
    manifest = read_manifest(folder)["files"] if (folder / MANIFEST_FILE).is_file() else ()
    return {MODEL_FILE, f"{MODEL_FILE}.data", MANIFEST_FILE, *_CONFIG_FILES, *TOKENIZER_FILES, *manifest}


def export_folder(
    model: LoadedModel,
    folder: str | Path,
    *,
    options: ExportOptions | None = None,
    progress: Progress = silent,
) -> ExportedModel:
    """Write `model`, loaded for the task "text-generation", as a folder that any ONNX runtime can decode with.

    model.onnx takes input_ids, attention_mask, position_ids and past_key_values.N.key and .value, and gives
    logits and present.N.key and .value; beside it lie the checkpoint's configuration and tokenizer. The folder
    appears whole or not at all.

    Raises:
        ExportError: as `export`; or the model was loaded for another task, or the folder holds something else.
        ModelFileError: the tokenizer is damaged or does not fit the model.
    """
    if model.task is not Task.TEXT_GENERATION:
        raise ExportError(f"{model.source} was loaded for the task {model.task}; load it for text-generation")
    with new_folder(Path(folder), earlier_export) as beside:
        copy_companions(model, beside)
        export(model, beside / MODEL_FILE, options=options, progress=progress)
    return ExportedModel(Path(folder) / MODEL_FILE)
