"""LoadedModel -> a folder to serve a language model from: model.onnx, configuration and tokenizer."""

from __future__ import annotations

from pathlib import Path

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.manifest import MANIFEST_FILE, read_manifest
from ibnorm_export.artifacts.metadata import Task
from ibnorm_export.artifacts.onnx_file import MODEL_FILE
from ibnorm_export.errors import ExportError
from ibnorm_export.exporter.companions import COMPANION_FILES, copy_companions
from ibnorm_export.exporter.options import ExportOptions
from ibnorm_export.exporter.single_file import SharedBuild, export_file
from ibnorm_export.files import new_folder
from ibnorm_export.progress import Progress, silent

__all__ = ["earlier_export", "export_folder"]


def earlier_export(folder: Path) -> set[str]:
    """Names of the files that an export of a language model writes, or has written, to `folder`.

    Raises:
        ExportError: the folder has no model.onnx, or this package did not write it.
    """
    file = folder / MODEL_FILE
    if not file.is_file():
        raise ExportError(f"{folder} is not empty and has no {MODEL_FILE}: choose another folder")
    if not ExportedModel(file).metadata.source_sha256:
        raise ExportError(f"{file} was not written by ibnorm-export: choose another folder, or move the file away")
    manifest = read_manifest(folder)["files"] if (folder / MANIFEST_FILE).is_file() else ()
    return {MODEL_FILE, f"{MODEL_FILE}.data", MANIFEST_FILE, *COMPANION_FILES, *manifest}


def export_folder(
    model: LoadedModel,
    folder: str | Path,
    *,
    options: ExportOptions | None = None,
    shared: SharedBuild | None = None,
    progress: Progress = silent,
) -> ExportedModel:
    """Write a language model as a folder with which any ONNX runtime can generate text.

    model.onnx takes input_ids, attention_mask, position_ids, past_key_values.N.key and past_key_values.N.value. It
    returns logits, present.N.key and present.N.value. The folder also contains the checkpoint's configuration and
    tokenizer. It appears whole or not at all.

    Args:
        model: loaded for the task "text-generation"; it is not changed.
        folder: the folder to write; an earlier export in it is replaced.
        options: how to export; None is `ExportOptions()`.
        shared: builds the model, if several folders of it are written; None builds it here.
        progress: called at the start of each stage.

    Raises:
        ExportError: as for `export_file`; or the model was loaded for another task, or the folder contains other files.
        ModelFileError: the tokenizer is damaged or does not fit the model.
    """
    if model.task is not Task.TEXT_GENERATION:
        raise ExportError(
            f"{model.source} was loaded for the task {model.task}: load it with task='text-generation', or run "
            "ibnorm-export export with --task text-generation"
        )
    with new_folder(Path(folder), earlier_export) as new:
        copy_companions(model, new)
        export_file(model, new / MODEL_FILE, options=options, shared=shared, progress=progress)
    return ExportedModel(Path(folder) / MODEL_FILE)
