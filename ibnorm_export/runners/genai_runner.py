"""onnxruntime-genai: the one module that imports it to run models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og
from numpy.typing import NDArray

from ibnorm_export import native
from ibnorm_export.errors import ModelFileError
from ibnorm_export.manifest import check_library, read_manifest

__all__ = ["GenaiModel", "GenaiSession"]


def _check_library(folder: Path) -> None:
    """The op library that genai_config.json names lies in the folder and can be used here."""
    file = folder / "genai_config.json"
    try:
        config: Any = json.loads(file.read_text(encoding="utf-8"))
        name = config["model"]["decoder"].get("session_options", {}).get("custom_ops_library")
    except FileNotFoundError as error:
        raise ModelFileError(f"{folder} has no genai_config.json; export it with --target ort-genai") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelFileError(f"{file} is damaged: {error!r}") from error
    if name is None:
        return
    if Path(name).name != name:
        raise ModelFileError(f"{file}: custom_ops_library is {name!r}; it must be a file in the folder")
    library = folder / name
    if not library.is_file():
        raise ModelFileError(
            f"{folder} has no {name}, the op library that its genai_config.json names; export again, or take "
            "custom_ops_library out of genai_config.json to run the norms as functions"
        )
    check_library(folder, name, read_manifest(folder))
    found = native.inspect(library)
    if not found:
        raise ModelFileError(f"{found.problem}; export the checkpoint again on this machine")


class GenaiSession:
    """One text, its keys and values in the buffer that GenAI shares between past and present."""

    def __init__(self, generator: og.Generator) -> None:
        self._generator = generator

    def feed(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits (vocabulary,) behind the last of `tokens` (n,).

        Raises:
            ModelFileError: the runtime fails; its own words follow.
        """
        try:
            self._generator.append_tokens(tokens.astype(np.int32))
            logits: NDArray[np.float32] = np.array(self._generator.get_logits(), dtype=np.float32)[0, -1]
        except RuntimeError as error:
            raise ModelFileError(f"onnxruntime-genai cannot run the model: {_first_line(error)}") from error
        return logits


class GenaiModel:
    """A folder that onnxruntime-genai runs.

    Args:
        folder: written by `export --target ort-genai`.

    Raises:
        ModelFileError: the folder is incomplete or damaged, or its op library cannot be used here.
    """

    def __init__(self, folder: Path) -> None:
        _check_library(folder)
        try:
            self._model = og.Model(str(folder))
        except RuntimeError as error:
            raise ModelFileError(f"{folder}: onnxruntime-genai cannot load it: {_first_line(error)}") from error

    def start(self, max_length: int) -> GenaiSession:
        """The beginning of a text of at most `max_length` tokens, prompt included."""
        params = og.GeneratorParams(self._model)
        params.set_search_options(max_length=max_length, batch_size=1)
        return GenaiSession(og.Generator(self._model, params))

    def forced(self, tokens: NDArray[np.int64], prompt: int) -> Iterator[NDArray[np.float32]]:
        """Logits (vocabulary,) behind the first `prompt` of `tokens` (n,), then behind each one after it."""
        session = self.start(len(tokens) + 1)
        for start, stop in [(0, prompt), *((i, i + 1) for i in range(prompt, len(tokens)))]:
            yield session.feed(tokens[start:stop])


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
