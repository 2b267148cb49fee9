"""Open a language model that generates text, from an exported folder or a checkpoint."""

from __future__ import annotations

from pathlib import Path

from ibnorm_export.artifacts.metadata import Task, Weights
from ibnorm_export.artifacts.onnx_file import resolve
from ibnorm_export.errors import IBNormError, ModelFileError
from ibnorm_export.generation.text_model import TextModel, open_checkpoint, open_folder
from ibnorm_export.runtimes.runner import Kernels

__all__ = ["open_text_model"]


def open_text_model(
    path: str | Path,
    *,
    kernels: Kernels = Kernels.AUTO,
    threads: int | None = None,
    weights: Weights | None = None,
    backend: str | None = None,
    npm: Path | None = None,
) -> TextModel:
    """Open a language model that generates text.

    Args:
        path: a folder of `export --task text-generation`, which a runtime runs, or a checkpoint, which PyTorch runs.
        kernels: how the norms of an exported folder run.
        threads: number of threads of the runtime; None is its default.
        weights: raw or EMA weights, where a checkpoint has both.
        backend: the `Backend` that runs an exported folder, or its name; None is the one it was exported for.
        npm: the folder given to `npm install --prefix`, for "ort-web" and "ort-node"; None looks where Node does.

    Raises:
        ModelFileError: the folder is incomplete or damaged, or `path` is a file.
        CheckpointError: the checkpoint cannot be loaded.
        BackendUnavailable: the runtime is not installed.
        IBNormError: there is no such backend, or it does not suit the folder.
    """
    path = Path(path)
    if path.is_dir() and resolve(path).is_file():
        return open_folder(path, kernels, threads=threads, backend=backend, npm=npm)
    if path.is_file():
        raise ModelFileError(
            f"{path} is a file; give the folder that `export CHECKPOINT -o DIR --task text-generation` writes"
        )
    if backend is not None or npm is not None:
        raise IBNormError(
            f"{path} is a checkpoint, which PyTorch runs; leave out --backend and --npm, or export it first: "
            f"ibnorm-export export {path} -o DIR --task text-generation"
        )
    from ibnorm_export.models.loading import load  # needs torch, which takes seconds to import

    return open_checkpoint(load(path, task=Task.TEXT_GENERATION, weights=weights))
