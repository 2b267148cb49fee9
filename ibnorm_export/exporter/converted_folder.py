"""LoadedModel -> a folder with a file in the format of one runtime, converted from the ONNX file next to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path

import numpy as np

from ibnorm_export.artifacts.covering_inputs import fit_sizes
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.metadata import Task
from ibnorm_export.artifacts.model_limits import find_limits
from ibnorm_export.artifacts.onnx_file import MODEL_FILE
from ibnorm_export.artifacts.random_inputs import draw_inputs
from ibnorm_export.artifacts.runtime_versions import RuntimeName
from ibnorm_export.artifacts.tensors import Arrays, DType
from ibnorm_export.errors import ExportError
from ibnorm_export.exporter.companions import copy_companions
from ibnorm_export.exporter.number_check import SAMPLES, check_numbers
from ibnorm_export.exporter.options import ExportOptions
from ibnorm_export.exporter.runtime_settings import runtime_settings
from ibnorm_export.exporter.single_file import export_file
from ibnorm_export.exporter.text_folder import earlier_export
from ibnorm_export.files import new_folder
from ibnorm_export.progress import Progress, silent

__all__ = ["Converter", "export_converted"]

#: Runs a converted file: arrays by input name -> arrays by output name.
Run = Callable[[Arrays], Arrays]


@dataclass(frozen=True, slots=True)
class Converter:
    """A format that ONNX files are converted to.

    Args:
        runtime: the runtime that reads it; its settings are those of `export --for`.
        title: its name in messages.
        files: names of the files that `convert` writes.
        convert: (ONNX file, folder to write to, type of the weights in it) -> what runs the result.
        rounds_to: types that `convert` rounds the weights of an fp32 file to; the runtime computes in fp32 with them.
    """

    runtime: RuntimeName
    title: str
    _: KW_ONLY
    files: tuple[str, ...]
    convert: Callable[[ExportedModel, Path, DType], Run]
    rounds_to: tuple[DType, ...] = ()


def _samples(model: LoadedModel, exported: ExportedModel) -> list[Arrays]:
    """Inputs of several shapes, or of the one that the file takes."""
    if all(isinstance(axis, int) for tensor in exported.inputs for axis in tensor.shape):
        return [draw_inputs(exported, {}, seed=seed) for seed in range(SAMPLES)]
    rng = np.random.default_rng(0)
    drawn = [model.sample(rng, index) for index in range(SAMPLES)]
    fixed = exported.metadata.shape
    if not fixed:
        return drawn
    limits = find_limits(model, inputs=drawn[0])
    return [fit_sizes(model, arrays, limits=limits, fixed=fixed) for arrays in drawn]


def _with_runtime(options: ExportOptions, converter: Converter) -> ExportOptions:
    """The options with what the runtime needs, as `export --for` sets it.

    Raises:
        ExportError: they name another runtime, or contradict this one.
    """
    if options.runtime is not None and options.runtime.runtime is not converter.runtime:
        raise ExportError(
            f"the runtime is {options.runtime}, but the target {converter.runtime}: leave one of them out"
        )
    settings = runtime_settings(converter.runtime)
    return replace(options, runtime=settings, inline=options.inline or settings.inline)


def export_converted(
    model: LoadedModel,
    folder: str | Path,
    *,
    converter: Converter,
    options: ExportOptions | None = None,
    progress: Progress = silent,
) -> ExportedModel:
    """Write the file of a runtime, and the model.onnx that it was converted from, which `verify` reads.

    What the runtime computes is held to PyTorch in float64. The folder appears whole or not at all; that of a language
    model also has configuration and tokenizer.

    Args:
        model: from `ibnorm_export.load`; it is not changed.
        folder: the folder to write; an earlier export in it is replaced.
        converter: the format.
        options: how to export; None is `ExportOptions()`. What the runtime needs is added.
        progress: called at the start of each stage.

    Raises:
        ExportError: the model cannot be exported, the runtime cannot read it or computes other numbers, or the folder
            contains other files.
        BackendUnavailable: a package or command that converts or runs the file is missing.
    """
    options = ExportOptions() if options is None else options
    if options.quantization is not None or options.dtype is DType.BF16:
        raise ExportError(
            f"--target {converter.runtime} takes weights in fp32 or fp16; the portable file has them in other types too"
        )
    dtype = options.dtype
    if dtype in converter.rounds_to:
        options = replace(options, dtype=DType.FP32)
    options = _with_runtime(options, converter)

    def earlier(there: Path) -> set[str]:
        return earlier_export(there) | set(converter.files)

    with new_folder(Path(folder), earlier) as new:
        if model.task is Task.TEXT_GENERATION:
            copy_companions(model, new)
        exported = export_file(model, new / MODEL_FILE, options=options, progress=progress)
        progress("converting", 3, 5)
        run = converter.convert(exported, new, dtype)
        progress("comparing", 4, 5)
        check_numbers(model, run, dtype=dtype, samples=_samples(model, exported), what=converter.title)
    progress("written", 5, 5)
    return ExportedModel(Path(folder) / MODEL_FILE)
