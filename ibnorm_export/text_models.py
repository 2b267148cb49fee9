"""Open a language model that generates text, from an exported folder or a checkpoint."""

from __future__ import annotations

from pathlib import Path

from ibnorm_export.artifacts.metadata import Task, Weights
from ibnorm_export.artifacts.onnx_file import MODEL_FILE
from ibnorm_export.errors import ModelFileError
from ibnorm_export.generation.text_model import TextModel, open_checkpoint, open_folder
from ibnorm_export.runtimes.runner import Kernels

__all__ = ["open_text_model"]


def open_text_model(
    path: str | Path,
    *,
    kernels: Kernels = Kernels.AUTO,
    threads: int | None = None,
    weights: Weights | None = None,
) -> TextModel:
    """Open a language model that generates text.

    Args:
        path: a folder of `export --task text-generation`, which a runtime runs, or a checkpoint, which PyTorch runs.
        kernels: how the norms of an exported folder run.
        threads: number of threads of the runtime; None is its default.
        weights: raw or EMA weights, where a checkpoint has both.

    Raises:
        ModelFileError: the folder is incomplete or damaged, or `path` is a file.
        CheckpointError: the checkpoint cannot be loaded.
        BackendUnavailable: the runtime is not installed.
    """
    path = Path(path)
    if (path / MODEL_FILE).is_file():
        return open_folder(path, kernels, threads=threads)
    if path.is_file():
        raise ModelFileError(
            f"{path} is a file; give the folder that `export CHECKPOINT -o DIR --task text-generation` writes"
        )
    from ibnorm_export.models.loading import load  # needs torch, which takes seconds to import

    return open_checkpoint(load(path, task=Task.TEXT_GENERATION, weights=weights))
