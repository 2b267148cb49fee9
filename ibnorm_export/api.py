"""The public functions that take a model in any form: a path, a module in memory, or the result of `load`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.input_files import Inputs, arrays_in_memory
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.metadata import Target, Task
from ibnorm_export.benchmark import bench as benchmark
from ibnorm_export.benchmark.generation import generates_text
from ibnorm_export.benchmark.options import BenchOptions
from ibnorm_export.benchmark.report import BenchReport, GenerationReport
from ibnorm_export.errors import ExportError
from ibnorm_export.exporter import export as exporter
from ibnorm_export.exporter.options import ExportOptions
from ibnorm_export.models.in_memory import from_module, from_module_of_file
from ibnorm_export.models.loading import load
from ibnorm_export.progress import Progress, silent
from ibnorm_export.runtimes.registry import check_backend
from ibnorm_export.runtimes.runner import Kernels
from ibnorm_export.verifier import verify as verifier
from ibnorm_export.verifier.report import ParityReport
from ibnorm_export.verifier.verify import VerifyOptions

__all__ = ["bench", "export", "verify"]


def _exported(file: ExportedModel | str | Path) -> ExportedModel:
    return file if isinstance(file, ExportedModel) else ExportedModel(file)


def _loaded(
    checkpoint: LoadedModel | nn.Module | str | Path, *, task: Task, exported: Callable[[], ExportedModel]
) -> LoadedModel:
    """The model of a file: read from its path, or made from a module, whose inputs are those of the file."""
    if isinstance(checkpoint, LoadedModel):
        return checkpoint
    if isinstance(checkpoint, nn.Module):
        return from_module_of_file(checkpoint, exported())
    return load(checkpoint, task=task)


def export(
    model: LoadedModel | nn.Module,
    path: str | Path,
    *,
    inputs: Inputs | None = None,
    options: ExportOptions | Sequence[ExportOptions] | None = None,
    target: Target | str = Target.PORTABLE,
    task: Task | str | None = None,
    kernels: Kernels | str = Kernels.AUTO,
    progress: Progress = silent,
) -> ExportedModel:
    """Write `model` as ONNX. The same model gives the same bytes; the output appears whole or not at all.

    A model that was loaded for "forward" becomes one file. One that was loaded for "text-generation" becomes a folder
    with its tokenizer: for any ONNX runtime, or for onnxruntime-genai. Either becomes a folder for transformers.js or
    for OpenVINO. A plain module becomes one file.

    Args:
        model: from `load` or `from_module`, or any `nn.Module`; it is not changed.
        path: the .onnx file or the folder to write; an earlier export is replaced.
        inputs: for an `nn.Module`: example inputs; see `from_module`, which also names outputs and dynamic axes.
        options: how to export; None is `ExportOptions()`. "transformers.js" also takes several, one for each type of
            weights, and None is all types.
        target: "portable", "ort-genai" for onnxruntime-genai, "transformers.js", "openvino" or "litert".
        task: the task that the model must be loaded for; None takes the model's own.
        kernels: for "ort-genai", whether the folder contains the library of fused kernels: "auto", "fused" or
            "function".
        progress: called at the start of each stage.

    Returns:
        The file that was written; in a folder, its model.onnx, or the first of several models.

    Raises:
        CheckpointError: the module cannot be copied or run on the inputs.
        ExportError: the model was loaded for another task, torch.export cannot trace it, an option does not suit it,
            or the output cannot be written.
        BackendUnavailable: a package or library that the target needs is missing.
        ModelFileError: the tokenizer is damaged or does not fit the model.
    """
    if not isinstance(model, LoadedModel):
        if inputs is None:
            raise ExportError(
                f"exporting {type(model).__name__} needs example inputs, for example inputs=torch.randn(2, 16), or a "
                "dict by argument name"
            )
        model = from_module(model, inputs)
    elif inputs is not None:
        raise ExportError("inputs are only for an nn.Module; this model was loaded and draws its own inputs")
    return exporter.export(model, path, options=options, target=target, task=task, kernels=kernels, progress=progress)


def verify(
    file: ExportedModel | str | Path,
    checkpoint: LoadedModel | nn.Module | str | Path,
    *,
    options: VerifyOptions | None = None,
    inputs: Inputs | None = None,
    text: str | None = None,
    progress: Progress = silent,
) -> ParityReport:
    """Compare an exported file with its checkpoint.

    Args:
        file: the result of `export`, or the path of the file or folder that it wrote.
        checkpoint: the result of `load`, the path of a Hugging Face folder, or the module in memory that was exported.
            A path is loaded for the task that the file was exported for.
        options: the backend, the number of samples and what else is compared; see `VerifyOptions`.
        inputs: your own inputs instead of random samples: one sample in the forms that `export` takes (a tensor, a
            tuple of tensors, or a dict by name), or a list of dicts. Arrays do as well as tensors.
        text: a text whose tokens a language model predicts; needs the checkpoint's tokenizer.
        progress: called as the work progresses.

    Returns:
        A report that is true when the file passes; `print(report)` shows it.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        ModelFileError: the file cannot be read, or was exported from another model, or the inputs do not fit it.
        BackendUnavailable: the backend is not installed.
    """
    exported = _exported(file)
    options = VerifyOptions() if options is None else options
    check_backend(
        options.backend, engine=options.engine, provider=options.provider, npm=options.npm
    )  # before the checkpoint is read
    checkpoint = _loaded(checkpoint, task=exported.metadata.task, exported=lambda: exported)
    given = None if inputs is None else arrays_in_memory(inputs, checkpoint.inputs)
    return verifier.verify(exported, checkpoint, options=options, inputs=given, text=text, progress=progress)


def bench(
    file: ExportedModel | str | Path,
    checkpoint: LoadedModel | nn.Module | str | Path | None = None,
    *,
    against: Sequence[str | Path | ExportedModel] = (),
    options: BenchOptions | None = None,
    progress: Progress = silent,
) -> BenchReport | GenerationReport:
    """Measure the latency of an exported file, or the speed of a folder that generates text, and compare it.

    Args:
        file: the result of `export`, or the path of the file or folder that it wrote.
        checkpoint: the result of `load`, the path of a Hugging Face folder, or the module in memory that was exported;
            needed to compare with PyTorch. A path is loaded for the task that the file was exported for.
        against: what to compare with. For a file: "torch", "torch.compile" or other exports. For a folder that
            generates text: "torch" or other such folders.
        options: the backend, sizes, threads and rounds; see `BenchOptions`.
        progress: called as the work progresses.

    Returns:
        The times and, for each candidate of `against`, the ratio of times; `print(report)` shows them.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        ModelFileError: the file cannot be read.
        BackendUnavailable: the backend is not installed, or cannot compute the file's type here.
        IBNormError: `against` names something unknown, or there is no checkpoint for it.
    """
    if checkpoint is not None:
        path = file.path if isinstance(file, ExportedModel) else file
        of_text = generates_text(path)
        benchmark.check_candidates(() if of_text else against, options=BenchOptions() if options is None else options)
        task = Task.TEXT_GENERATION if of_text else Task.FORWARD
        checkpoint = _loaded(checkpoint, task=task, exported=lambda: _exported(file))
    return benchmark.bench(file, model=checkpoint, against=against, options=options, progress=progress)
