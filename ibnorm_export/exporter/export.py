"""`export`, which writes a model for any target."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.metadata import Target, Task
from ibnorm_export.artifacts.tensors import WeightType
from ibnorm_export.choices import choice
from ibnorm_export.errors import ExportError
from ibnorm_export.exporter.converted_folder import export_converted
from ibnorm_export.exporter.genai import export_genai
from ibnorm_export.exporter.litert import LITERT
from ibnorm_export.exporter.openvino_ir import OPENVINO_IR
from ibnorm_export.exporter.options import ExportOptions
from ibnorm_export.exporter.single_file import export_file
from ibnorm_export.exporter.text_folder import export_folder
from ibnorm_export.exporter.transformers_js import export_transformers_js, web_task, web_weights
from ibnorm_export.progress import Progress, silent
from ibnorm_export.runtimes.runner import Kernels

__all__ = ["ExportOptions", "export", "export_weights", "task_of"]


#: What converts the file of a target that has its own format.
_CONVERTERS: Final = {Target.OPENVINO: OPENVINO_IR, Target.LITERT: LITERT}


def task_of(target: Target | str, task: Task | str | None = None, *, checkpoint: str | Path | None = None) -> Task:
    """Return the task for which a checkpoint must be loaded to be exported.

    Args:
        target: what the export is laid out for.
        task: the requested task; None and "forward" stand for the only task of a target that has one.
        checkpoint: the checkpoint, whose config.json gives the task for "transformers.js".

    Raises:
        ExportError: there is no such target or task, or the target does not take the checkpoint.
    """
    target = choice(Target, target, name="target", error=ExportError)
    if target is Target.ORT_GENAI:
        return Task.TEXT_GENERATION
    if target is Target.TRANSFORMERS_JS and checkpoint is not None:
        return web_task(checkpoint)
    return Task.FORWARD if task is None else choice(Task, task, name="task", error=ExportError)


def export_weights(target: Target | str, task: Task) -> tuple[WeightType, ...]:
    """Return the types of weights that an export has if none is requested.

    Args:
        target: what the export is laid out for.
        task: what the model is loaded for.

    Raises:
        ExportError: there is no such target.
    """
    target = choice(Target, target, name="target", error=ExportError)
    return web_weights(task) if target is Target.TRANSFORMERS_JS else (WeightType.FP32,)


def _check_task(model: LoadedModel, target: Target, *, task: Task | str | None) -> None:
    """Raise ExportError if the export needs another task than the one that `model` was loaded for."""
    if task is None and (target is Target.PORTABLE or target in _CONVERTERS):
        return
    needed = task_of(target, task, checkpoint=model.source)
    if model.task is not needed:
        raise ExportError(
            f"{model.source} was loaded for the task {model.task}, but this export needs {needed}: load it with "
            f"load({model.source!r}, task={needed.value!r}), or run ibnorm-export export with --task {needed}"
        )


def export(
    model: LoadedModel,
    path: str | Path,
    *,
    options: ExportOptions | Sequence[ExportOptions] | None = None,
    target: Target | str = Target.PORTABLE,
    task: Task | str | None = None,
    kernels: Kernels | str = Kernels.AUTO,
    progress: Progress = silent,
) -> ExportedModel:
    """Write `model` as ONNX. The same model gives the same bytes; the output appears whole or not at all.

    A model that was loaded for "forward" becomes one file (`export_file`). One that was loaded for "text-generation"
    becomes a folder with its tokenizer: for any ONNX runtime (`export_folder`) or for onnxruntime-genai
    (`export_genai`). Either becomes a folder for transformers.js (`export_transformers_js`) or for OpenVINO or
    LiteRT (`export_converted`).

    Args:
        model: from `ibnorm_export.load`; it is not changed.
        path: the .onnx file or the folder to write; an earlier export is replaced.
        options: how to export; None is `ExportOptions()`. "transformers.js" also takes several, one for each type of
            weights, and None is all types.
        target: "portable", "ort-genai" for onnxruntime-genai, "transformers.js", "openvino" or "litert".
        task: the task that the model must be loaded for; None takes the model's own.
        kernels: for "ort-genai", whether the folder contains the library of fused kernels: "auto", "fused" or
            "function"; see `export_genai`.
        progress: called at the start of each stage.

    Returns:
        The file that was written; in a folder, its model.onnx, or the first of several models.

    Raises:
        ExportError: the model was loaded for another task, torch.export cannot trace it, an option does not suit it,
            or the output cannot be written.
        BackendUnavailable: a package or library that the target needs is missing.
        ModelFileError: the tokenizer is damaged or does not fit the model.
    """
    target = choice(Target, target, name="target", error=ExportError)
    kernels = choice(Kernels, kernels, name="kernels", error=ExportError)
    _check_task(model, target, task=task)
    if target is Target.TRANSFORMERS_JS:
        several = [options] if isinstance(options, ExportOptions) else options
        return export_transformers_js(model, path, options=several, progress=progress)
    if options is not None and not isinstance(options, ExportOptions):
        raise ExportError(f"--target {target} writes one type of weights; only transformers.js takes several")
    if target in _CONVERTERS:
        return export_converted(model, path, converter=_CONVERTERS[target], options=options, progress=progress)
    if target is Target.ORT_GENAI:
        return export_genai(model, path, options=options, kernels=kernels, progress=progress)
    if model.task is Task.TEXT_GENERATION:
        return export_folder(model, path, options=options, progress=progress)
    return export_file(model, path, options=options, progress=progress)
