"""The `Session` protocol for generating texts step by step, and how to open one for each runtime."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from ibnorm_export.artifacts.axes import BATCH
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.kv_cache import input_specs
from ibnorm_export.artifacts.metadata import Target
from ibnorm_export.artifacts.onnx_file import GENAI_CONFIG_FILE
from ibnorm_export.artifacts.runtime_versions import GENAI, ONNX_RUNTIME, check_installed
from ibnorm_export.errors import BackendUnavailable, IBNormError, ModelFileError
from ibnorm_export.generation.decoder import Decoder
from ibnorm_export.runtimes.registry import fused_library, open_runner
from ibnorm_export.runtimes.runner import Backend, Kernels

if TYPE_CHECKING:  # importing torch takes seconds, and only PyTorch sessions need it
    from ibnorm_export.artifacts.loaded_model import LoadedModel
    from ibnorm_export.generation.genai_session import GenaiModel

__all__ = ["Session", "SessionSource", "open_genai", "open_sessions", "torch_sessions"]


class Session(Protocol):
    """One or more texts of equal length that are being written; their keys and values are in a cache."""

    def feed(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Append `tokens` (batch, n) to the texts, and return the logits after the last of them (batch, vocabulary)."""

    def step(self) -> NDArray[np.integer]:
        """Append the likeliest token to every text, and return the tokens (batch,).

        onnxruntime-genai knows the tokens that end a text. After one it writes padding; with several texts it never
        chooses one.
        """

    def rewind(self, length: int) -> None:
        """Forget all tokens of every text after the first `length`; `feed` must follow."""


@dataclass(frozen=True, slots=True)
class SessionSource:
    """A model that can start sessions.

    Args:
        name: the runtime: "torch", "ort-genai" or a `Backend`.
        start: (number of texts, maximum tokens of a text) -> a session without tokens.
    """

    name: str
    start: Callable[[int, int], Session]


class _DecoderSession:
    def __init__(self, decoder: Decoder, batch: int) -> None:
        self._decoder = decoder
        self._last = np.zeros((batch, 1), dtype=np.float32)
        self._chosen: NDArray[np.int64] | None = (
            None  # tokens from `step` that the model has not processed; for the last ones it never has to
        )
        decoder.start(batch)

    def feed(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        if self._chosen is not None:
            tokens, self._chosen = np.concatenate([self._chosen, tokens], axis=1), None
        self._last = self._decoder.feed(tokens)[:, -1]
        return self._last

    def step(self) -> NDArray[np.integer]:
        if self._chosen is not None:
            self.feed(self._chosen[:, :0])
        self._chosen = self._last.argmax(axis=-1, keepdims=True)
        return self._chosen[:, 0]

    def rewind(self, length: int) -> None:
        self._chosen = None
        self._decoder.rewind(length)


def torch_sessions(model: LoadedModel) -> SessionSource:
    """Run a checkpoint in PyTorch, with its cache.

    Args:
        model: loaded for the task "text-generation".
    """
    from ibnorm_export.runtimes.torch import TorchRunner

    runner = TorchRunner(model)
    return SessionSource("torch", lambda batch, _: _DecoderSession(Decoder(runner, model.inputs), batch))


def open_sessions(
    folder: str | Path,
    kernels: Kernels = Kernels.AUTO,
    *,
    threads: int | None = None,
    backend: str | None = None,
    npm: Path | None = None,
) -> SessionSource:
    """Open an exported language model: with onnxruntime-genai if it was exported for that, else with ONNX Runtime.

    Args:
        folder: a folder of `export --task text-generation`, or its model.onnx for ONNX Runtime.
        kernels: how the norms run in ONNX Runtime; a folder for onnxruntime-genai determines that itself.
        threads: number of the runtime's threads; None is its default.
        backend: a `Backend` or its name; None is the runtime that the folder was exported for.
        npm: the folder given to `npm install --prefix`, for "ort-web" and "ort-node"; None looks where Node does.

    Raises:
        ModelFileError: the folder or its op library is incomplete or damaged, or its model has no cache.
        BackendUnavailable: the runtime is not installed, or cannot compute the file's type here.
        IBNormError: there is no such backend, or it does not suit the folder.
    """
    folder = Path(folder)
    if backend is not None or npm is not None:
        return _backend_sessions(folder, backend, kernels=kernels, threads=threads, npm=npm)
    if (folder / GENAI_CONFIG_FILE).is_file():
        return SessionSource("ort-genai", open_genai(folder, threads).start)
    exported = ExportedModel(folder)
    if exported.metadata.target is Target.ORT_GENAI:
        raise ModelFileError(
            f"{exported.path} only runs in a folder for onnxruntime-genai, and {exported.path.parent} has no "
            f"{GENAI_CONFIG_FILE}: give the whole folder, or export again"
        )
    _check_sizes(exported)
    if exported.dtype == "bf16":
        raise BackendUnavailable(
            f"{folder} is bf16, which ONNX Runtime cannot compute on a CPU; export fp32 or fp16 to generate here "
            "(verify checks bf16 on a copy that rounds)"
        )
    try:
        from ibnorm_export.generation.ort_session import OrtText

        check_installed(exported, ONNX_RUNTIME)
    except ModuleNotFoundError as error:
        raise BackendUnavailable(
            f"{folder} needs the package {error.name}, which is not installed: pip install 'ibnorm-export[cpu]'"
        ) from error
    return SessionSource(
        "ort-cpu", OrtText(exported.path, threads, library=fused_library("ort-cpu", Kernels(kernels))).start
    )


def _check_sizes(exported: ExportedModel) -> None:
    """Raise ModelFileError for a file of fixed lengths: a prompt has any, and the cache grows."""
    fixed = [f"{axis} {size}" for axis, size in sorted(exported.metadata.shape.items()) if axis != BATCH]
    if fixed:
        raise ModelFileError(
            f"{exported.path} takes only {', '.join(fixed)}, and a text has any length: export it again without "
            "--shape, or with --shape batch_size=1 only"
        )


def open_genai(folder: Path, threads: int | None = None) -> GenaiModel:
    """Open a folder in onnxruntime-genai.

    Args:
        folder: a folder of `export --target ort-genai`.
        threads: number of the runtime's threads; None is its default.

    Raises:
        ModelFileError: the folder or its op library is incomplete or damaged.
        BackendUnavailable: onnxruntime-genai is not installed, or too old.
    """
    try:
        from ibnorm_export.generation.genai_session import GenaiModel
    except ModuleNotFoundError as error:
        raise BackendUnavailable(
            f"{folder} is for onnxruntime-genai, which is not installed: pip install 'ibnorm-export[genai]'"
        ) from error
    check_installed(ExportedModel(folder), GENAI, ONNX_RUNTIME)
    return GenaiModel(folder, threads)


def _backend_sessions(
    folder: Path, backend: str | None, *, kernels: Kernels, threads: int | None, npm: Path | None
) -> SessionSource:
    """Run a folder in a backend that the user names. Its cache goes to the backend and back with every token."""
    if (folder / GENAI_CONFIG_FILE).is_file():
        raise IBNormError(
            f"{folder} is for onnxruntime-genai, which runs it; leave out --backend, or export again with "
            "--task text-generation"
        )
    if backend in (None, Backend.ORT_CPU):
        if npm is not None:
            raise IBNormError("backend ort-cpu runs no npm package: use --backend ort-web or ort-node with --npm")
        return open_sessions(folder, kernels, threads=threads)
    assert backend is not None  # None is above
    if backend == Backend.TRITON:
        raise IBNormError("backend triton generates no text here: its server keeps no cache; use ort-cpu")
    exported = ExportedModel(folder)
    _check_sizes(exported)
    runner = open_runner(backend, exported, threads=threads, kernels=kernels, npm=npm)
    inputs = input_specs(exported)
    Decoder(runner, inputs)  # raises where there is no cache
    return SessionSource(str(backend), lambda batch, _: _DecoderSession(Decoder(runner, inputs), batch))
