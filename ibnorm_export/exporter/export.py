"""`export`, which writes a model for any target."""

from __future__ import annotations

from pathlib import Path

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.metadata import Target, Task
from ibnorm_export.choices import choice
from ibnorm_export.errors import ExportError
from ibnorm_export.exporter.genai import export_genai
from ibnorm_export.exporter.options import ExportOptions
from ibnorm_export.exporter.single_file import export_file
from ibnorm_export.exporter.text_folder import export_folder
from ibnorm_export.progress import Progress, silent
from ibnorm_export.runtimes.runner import Kernels

__all__ = ["ExportOptions", "export", "task_of"]


def task_of(target: Target | str, task: Task | str | None = None) -> Task:
    """Return the task for which a checkpoint must be loaded to be exported.

    Args:
        target: what the export is laid out for.
        task: the requested task; None and "forward" stand for the only task of a target that has one.

    Raises:
        ExportError: there is no such target or task.
    """
    if choice(Target, target, name="target", error=ExportError) is Target.ORT_GENAI:
        return Task.TEXT_GENERATION
    return Task.FORWARD if task is None else choice(Task, task, name="task", error=ExportError)


def _check_task(model: LoadedModel, target: Target, *, task: Task | str | None) -> None:
    """Raise ExportError if the export needs another task than the one that `model` was loaded for."""
    if task is None and target is Target.PORTABLE:
        return
    needed = task_of(target, task)
    if model.task is not needed:
        raise ExportError(
            f"{model.source} was loaded for the task {model.task}, but this export needs {needed}: load it with "
            f"load({model.source!r}, task={needed.value!r}), or run ibnorm-export export with --task {needed}"
        )


def export(
    model: LoadedModel,
    path: str | Path,
    *,
    options: ExportOptions | None = None,
    target: Target | str = Target.PORTABLE,
    task: Task | str | None = None,
    kernels: Kernels | str = Kernels.AUTO,
    progress: Progress = silent,
) -> ExportedModel:
    """Write `model` as ONNX. The same model gives the same bytes; the output appears whole or not at all.

    A model that was loaded for "forward" becomes one file (`export_file`). One that was loaded for "text-generation"
    becomes a folder with its tokenizer: for any ONNX runtime (`export_folder`) or for onnxruntime-genai
    (`export_genai`).

    Args:
        model: from `ibnorm_export.load`; it is not changed.
        path: the .onnx file or the folder to write; an earlier export is replaced.
        options: how to export; None is `ExportOptions()`.
        target: "portable", or "ort-genai" for onnxruntime-genai.
        task: the task that the model must be loaded for; None takes the model's own.
        kernels: for "ort-genai", whether the folder contains the library of fused kernels: "auto", "fused" or
            "function"; see `export_genai`.
        progress: called at the start of each stage.

    Returns:
        The file that was written; in a folder, its model.onnx.

    Raises:
        ExportError: the model was loaded for another task, torch.export cannot trace it, an option does not suit it,
            or the output cannot be written.
        BackendUnavailable: a package or library that the target needs is missing.
        ModelFileError: the tokenizer is damaged or does not fit the model.
    """
    target = choice(Target, target, name="target", error=ExportError)
    kernels = choice(Kernels, kernels, name="kernels", error=ExportError)
    _check_task(model, target, task=task)
    if target is Target.ORT_GENAI:
        return export_genai(model, path, options=options, kernels=kernels, progress=progress)
    if model.task is Task.TEXT_GENERATION:
        return export_folder(model, path, options=options, progress=progress)
    return export_file(model, path, options=options, progress=progress)
