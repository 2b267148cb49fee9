"""Decode with a cache that is passed in as past_key_values.* and returned as present.*."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ibnorm_export.artifacts.kv_cache import positions
from ibnorm_export.artifacts.npz import read_npz
from ibnorm_export.artifacts.tensors import Arrays, InputSpec
from ibnorm_export.errors import ModelFileError
from ibnorm_export.runtimes.runner import Runner

__all__ = ["Decoder"]

_PAST: Final = "past_key_values."
_PRESENT: Final = "present."


class Decoder:
    """Feed tokens to a runner, and keep the cache between calls.

    Args:
        runner: runs a model that was exported or loaded for the task "text-generation".
        inputs: the inputs of that model.

    Raises:
        ModelFileError: the model has no cache.
    """

    def __init__(self, runner: Runner, inputs: Sequence[InputSpec]) -> None:
        self._runner = runner
        self._past = [spec for spec in inputs if spec.name.startswith(_PAST)]
        self._positions = any(spec.name == "position_ids" for spec in inputs)
        if not self._past:
            raise ModelFileError("the model has no cache; export it with --task text-generation")
        self._cache: Arrays = {}
        self._mask = np.zeros((0, 0), dtype=np.int64)

    @property
    def length(self) -> int:
        """Number of tokens in the cache, padding included."""
        return self._mask.shape[1]

    def start(self, batch: int) -> None:
        """Empty the cache for `batch` rows."""
        self._mask = np.zeros((batch, 0), dtype=np.int64)
        for spec in self._past:
            _, heads, _, head = spec.shape
            self._cache[spec.name] = np.zeros((batch, int(heads), 0, int(head)), dtype=np.float32)

    def feed(
        self,
        tokens: NDArray[np.int64],
        mask: NDArray[np.int64] | None = None,
    ) -> NDArray[np.float32]:
        """Run the model on more tokens, which are added to the cache.

        Args:
            tokens: (batch, sequence).
            mask: (batch, sequence), with 0 for padding on the left; None is all ones.

        Returns:
            Logits after each token (batch, sequence, vocabulary).
        """
        self._mask = np.concatenate([self._mask, np.ones_like(tokens) if mask is None else mask], axis=1)
        inputs: Arrays = {"input_ids": tokens, "attention_mask": self._mask, **self._cache}
        if self._positions:
            inputs["position_ids"] = positions(self._mask)[:, -tokens.shape[1] :]
        outputs = self._runner.run(inputs)
        for spec in self._past:
            self._cache[spec.name] = outputs[_PRESENT + spec.name.removeprefix(_PAST)]
        logits: NDArray[np.float32] = outputs["logits"].astype(np.float32, copy=False)
        return logits

    def rewind(self, length: int) -> None:
        """Forget all tokens after the first `length`, padding included."""
        self._mask = self._mask[:, :length]
        self._cache = {name: np.ascontiguousarray(array[:, :, :length]) for name, array in self._cache.items()}

    def save(self, path: str | Path) -> None:
        """Write the cache to an .npz file. After `load`, results are bit-identical."""
        with Path(path).open("wb") as stream:
            np.savez(stream, attention_mask=self._mask, **self._cache)  # type: ignore[arg-type]  # arrays by name

    def load(self, path: str | Path) -> None:
        """Continue from a cache that `save` wrote.

        Raises:
            ModelFileError: the file is missing or damaged, or its tensors do not fit the model.
        """
        saved = read_npz(path, "a saved cache")
        mask = saved.pop("attention_mask", None)
        names = [spec.name for spec in self._past]
        if mask is None or mask.ndim != 2 or sorted(saved) != sorted(names):
            raise ModelFileError(f"{path} is not a cache of this model: it must contain attention_mask and {names}")
        batch, total = mask.shape
        for spec in self._past:
            wanted = (batch, spec.shape[1], total, spec.shape[3])
            if saved[spec.name].shape != wanted:
                raise ModelFileError(f"{path}: {spec.name} has shape {saved[spec.name].shape}; it must be {wanted}")
        self._mask = mask
        self._cache = {name: saved[name] for name in names}
