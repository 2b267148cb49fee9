"""Run models with onnxruntime-genai; no other module imports it to run models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og
from numpy.typing import NDArray

from ibnorm_export.artifacts.manifest import check_library, read_manifest
from ibnorm_export.artifacts.onnx_file import GENAI_CONFIG_FILE
from ibnorm_export.errors import ModelFileError, quoted
from ibnorm_export.files import has_file
from ibnorm_export.op import native
from ibnorm_export.parsing import read_json
from ibnorm_export.usable_cores import default_threads

__all__ = ["GenaiModel", "GenaiSession"]


def _check_library(folder: Path) -> None:
    """Raise ModelFileError unless the op library that genai_config.json names is in the folder and usable here."""
    file = folder / GENAI_CONFIG_FILE
    try:
        config: Any = read_json(file)
        name = config["model"]["decoder"].get("session_options", {}).get("custom_ops_library")
    except FileNotFoundError as error:
        raise ModelFileError(f"{folder} has no {GENAI_CONFIG_FILE}; export it with --target ort-genai") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelFileError(f"{file} is damaged: {quoted(error)}") from error
    if name is None:
        return
    if not isinstance(name, str) or Path(name).name != name or "\0" in name:
        shown = quoted(name)
        raise ModelFileError(f"{file}: custom_ops_library is {shown}; it must be the name of a file in the folder")
    library = folder / name
    if not has_file(folder, name):
        raise ModelFileError(
            f"{folder} has no {quoted(name)}, the op library that its {GENAI_CONFIG_FILE} names; export again, or "
            f"remove custom_ops_library from {GENAI_CONFIG_FILE} to run the norms as functions"
        )
    check_library(folder, name, manifest=read_manifest(folder))
    inspected = native.inspect(library)
    if not inspected:
        raise ModelFileError(f"{inspected.problem}; export the checkpoint again on this machine")


class GenaiSession:
    """Texts of equal length. GenAI keeps their keys and values in one buffer for past and present."""

    def __init__(self, generator: og.Generator) -> None:
        self._generator = generator
        self._chosen: NDArray[np.integer] | None = None  # tokens from `step` that the model has not processed yet

    def feed(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits (batch, vocabulary) after the last of `tokens` (batch, n); see `Session`.

        With several texts, only the prompt can be given; GenAI chooses all later tokens, see `step`.

        Raises:
            ModelFileError: the runtime fails; the message ends with the runtime's own.
        """
        try:
            if self._chosen is not None:  # GenAI would leave this token out of its cache
                self._generator.rewind_to(self._generator.token_count() - 1)
                tokens, self._chosen = np.concatenate([self._chosen[:, None], tokens], axis=1), None
            self._generator.append_tokens(tokens.astype(np.int32))
            logits: NDArray[np.float32] = np.array(self._generator.get_logits(), dtype=np.float32)[:, -1]
        except RuntimeError as error:
            raise ModelFileError(f"onnxruntime-genai cannot run the model: {_first_line(error)}") from error
        return logits

    def all_logits(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits (batch, n, vocabulary) after each of `tokens` (batch, n), the first ones of the texts.

        Raises:
            ModelFileError: the runtime fails; the message ends with the runtime's own.
        """
        try:
            self._generator.append_tokens(tokens.astype(np.int32))
            return np.array(self._generator.get_output("logits"), dtype=np.float32)
        except RuntimeError as error:
            raise ModelFileError(f"onnxruntime-genai cannot run the model: {_first_line(error)}") from error

    def step(self) -> NDArray[np.integer]:
        """Append the likeliest token to every text, and return the tokens (batch,); see `Session`.

        GenAI chooses the token. For a small model, copying the logits to an array takes a quarter of a token's time.

        Raises:
            ModelFileError: the runtime fails; the message ends with the runtime's own.
        """
        try:
            self._generator.generate_next_token()
            chosen: NDArray[np.integer] = self._generator.get_next_tokens()
        except RuntimeError as error:
            raise ModelFileError(f"onnxruntime-genai cannot run the model: {_first_line(error)}") from error
        self._chosen = chosen
        return chosen

    def rewind(self, length: int) -> None:
        """Forget all tokens after the first `length`. With several texts, GenAI forgets all tokens or none."""
        self._chosen = None
        self._generator.rewind_to(length)


class GenaiModel:
    """A folder that onnxruntime-genai runs.

    Args:
        folder: written by `export --target ort-genai`.
        threads: number of the runtime's threads; None is its default, or fewer where the process may use fewer cores.

    Raises:
        ModelFileError: the folder is incomplete or damaged, or its op library cannot be used here.
    """

    def __init__(self, folder: Path, threads: int | None = None) -> None:
        _check_library(folder)
        try:
            config = og.Config(str(folder))
            threads = default_threads() if threads is None else threads
            if threads is not None:
                session = {"session_options": {"intra_op_num_threads": threads}}
                config.overlay(json.dumps({"model": {"decoder": session}}))
            self._model = og.Model(config)
        except RuntimeError as error:
            raise ModelFileError(f"{folder}: onnxruntime-genai cannot load it: {_first_line(error)}") from error

    def start(self, batch: int, length: int) -> GenaiSession:
        """Begin `batch` texts of at most `length` tokens, prompt included.

        Raises:
            ModelFileError: the runtime rejects the folder's genai_config.json.
        """
        params = og.GeneratorParams(self._model)
        # min_length keeps a text from ending while the others continue. The other options make the search greedy, which
        # the folder's own settings may not be.
        params.set_search_options(
            max_length=length,
            min_length=0 if batch == 1 else length,
            batch_size=batch,
            do_sample=False,
            num_beams=1,
            num_return_sequences=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
        )
        try:
            return GenaiSession(og.Generator(self._model, params))
        except RuntimeError as error:
            raise ModelFileError(f"onnxruntime-genai cannot run the model: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
