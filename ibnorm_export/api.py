"""The public functions that take a checkpoint by its path: they load it and call the package that does the work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.metadata import Task
from ibnorm_export.artifacts.tensors import Arrays
from ibnorm_export.benchmark import bench as benchmark
from ibnorm_export.benchmark.generation import generates_text
from ibnorm_export.benchmark.options import BenchOptions
from ibnorm_export.benchmark.report import BenchReport, GenerationReport
from ibnorm_export.models.loading import load
from ibnorm_export.progress import Progress, silent
from ibnorm_export.verifier import verify as verifier
from ibnorm_export.verifier.report import ParityReport
from ibnorm_export.verifier.verify import VerifyOptions

__all__ = ["bench", "verify"]


def _exported(file: ExportedModel | str | Path) -> ExportedModel:
    return file if isinstance(file, ExportedModel) else ExportedModel(file)


def verify(
    file: ExportedModel | str | Path,
    checkpoint: LoadedModel | str | Path,
    *,
    options: VerifyOptions | None = None,
    inputs: Sequence[Arrays] | None = None,
    text: str | None = None,
    progress: Progress = silent,
) -> ParityReport:
    """Compare an exported file with its checkpoint.

    Args:
        file: the result of `export`, or the path of the file or folder that it wrote.
        checkpoint: the result of `load`, or the path of a Hugging Face folder. A path is loaded for the task that the
            file was exported for.
        options: the backend, the number of samples and what else is compared; see `VerifyOptions`.
        inputs: your own inputs, arrays by input name, instead of random samples.
        text: a text whose tokens a language model predicts; needs the checkpoint's tokenizer.
        progress: called as the work progresses.

    Returns:
        A report that is true when the file passes; `print(report)` shows it.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        ModelFileError: the file cannot be read, or was exported from another model.
        BackendUnavailable: the backend is not installed.
    """
    exported = _exported(file)
    if not isinstance(checkpoint, LoadedModel):
        checkpoint = load(checkpoint, task=exported.metadata.task)
    return verifier.verify(exported, checkpoint, options=options, inputs=inputs, text=text, progress=progress)


def bench(
    file: ExportedModel | str | Path,
    checkpoint: LoadedModel | str | Path | None = None,
    *,
    against: Sequence[str | Path | ExportedModel] = (),
    options: BenchOptions | None = None,
    progress: Progress = silent,
) -> BenchReport | GenerationReport:
    """Measure the latency of an exported file, or the speed of a folder that generates text, and compare it.

    Args:
        file: the result of `export`, or the path of the file or folder that it wrote.
        checkpoint: the result of `load`, or the path of a Hugging Face folder; needed to compare with PyTorch. A path
            is loaded for the task that the file was exported for.
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
    if checkpoint is not None and not isinstance(checkpoint, LoadedModel):
        path = file.path if isinstance(file, ExportedModel) else file
        checkpoint = load(checkpoint, task=Task.TEXT_GENERATION if generates_text(path) else Task.FORWARD)
    return benchmark.bench(file, model=checkpoint, against=against, options=options, progress=progress)
