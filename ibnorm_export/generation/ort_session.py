"""Decode in ONNX Runtime with its own values, so that the cache is not copied more than the graph requires."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ibnorm_export.artifacts.axes import CAPACITY
from ibnorm_export.errors import ModelFileError, quoted
from ibnorm_export.runtimes.ort import OrtError, OrtRunner, first_line
from ibnorm_export.text_report import counted

__all__ = ["OrtText", "OrtTextSession"]

_PAST: Final = "past_key_values."
_TYPES: Final = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def _caches(session: ort.InferenceSession) -> list[ort.NodeArg]:
    """The inputs of the cache.

    Raises:
        ModelFileError: there are none, or one is not (batch, heads, past, size) with a fixed number and size of heads.
    """
    caches = [i for i in session.get_inputs() if i.name.startswith(_PAST)]
    for cache in caches:
        fixed = len(cache.shape) == 4 and all(isinstance(cache.shape[axis], int) for axis in (1, 3))
        if not fixed or cache.type not in _TYPES:
            raise ModelFileError(
                f"the cache {quoted(cache.name)} is {quoted(cache.type)} of shape {quoted(cache.shape)}; it must be "
                "float or float16 with 4 axes, of which heads and their size are fixed: export the model again"
            )
    if not caches:
        raise ModelFileError(f"the model has no cache: no input begins with {_PAST}; export it again")
    return caches


class OrtTextSession:
    """Texts of equal length.

    With a dynamic cache, each `present` becomes the next `past`. With a static cache (its length is an axis called
    "capacity"), one buffer is bound as input and output.
    """

    def __init__(self, session: ort.InferenceSession, batch: int, *, length: int) -> None:
        self._session = session
        self._length = 0
        self._batch = batch
        self._positions = any(i.name == "position_ids" for i in session.get_inputs())
        caches = _caches(session)
        self._in_place = caches[0].shape[2] == CAPACITY
        self._room = length
        self._ones = np.ones((batch, length), dtype=np.int64)
        self._places = np.tile(np.arange(length, dtype=np.int64), (batch, 1))
        self._last = np.zeros((batch, 1), dtype=np.float32)
        self._chosen: NDArray[np.int64] | None = (
            None  # tokens from `step` that the model has not processed; for the last ones it never has to
        )
        size = length if self._in_place else 0
        self._past = {
            i.name: ort.OrtValue.ortvalue_from_numpy(
                np.zeros((batch, i.shape[1], size, i.shape[3]), dtype=_TYPES[i.type])
            )
            for i in caches
        }
        self._presents = [f"present.{name.removeprefix(_PAST)}" for name in self._past]
        self._binding = session.io_binding()
        if self._in_place:
            self._binding.bind_output("logits")  # bound first, so that it is the first of the outputs
            for present, (name, value) in zip(self._presents, self._past.items(), strict=True):
                self._binding.bind_ortvalue_input(name, value)
                self._binding.bind_ortvalue_output(present, value)

    def feed(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits (batch, vocabulary) after the last of `tokens` (batch, n); see `Session`.

        Raises:
            ModelFileError: the texts would become too long, or the runtime fails; the message ends with its reason.
        """
        if self._chosen is not None:
            tokens, self._chosen = np.concatenate([self._chosen, tokens], axis=1), None
        total = self._length + tokens.shape[1]
        if tokens.shape[0] != self._batch or total > self._room:
            raise ModelFileError(
                f"tokens have shape {tokens.shape} after {self._length} tokens; the session was started for "
                f"{counted(self._batch, 'text')} of at most {self._room} tokens"
            )
        inputs = {"input_ids": tokens, "attention_mask": self._ones[:, :total]}
        if self._positions:
            inputs["position_ids"] = self._places[:, self._length : total]
        given = {
            name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array, dtype=np.int64))
            for name, array in inputs.items()
        }
        try:
            logits = self._run_in_place(given) if self._in_place else self._run(given)
        except (*OrtError, RuntimeError) as error:  # with bound values, ONNX Runtime raises RuntimeError
            raise ModelFileError(f"ONNX Runtime cannot run the model: {first_line(error)}") from error
        self._length = total
        last: NDArray[Any] = logits.numpy()[:, -1]
        self._last = last.astype(np.float32)  # a copy, so that the logits of the whole prompt are freed
        return self._last

    def _run(self, given: dict[str, ort.OrtValue]) -> ort.OrtValue:
        # Binding 16 pasts and 16 presents again would cost 0.2 ms a step; passing them as arguments does not.
        logits, *presents = self._session.run_with_ort_values(["logits", *self._presents], {**given, **self._past})
        self._past = dict(zip(self._past, presents, strict=True))
        return logits

    def _run_in_place(self, given: dict[str, ort.OrtValue]) -> ort.OrtValue:
        for name, value in given.items():
            self._binding.bind_ortvalue_input(name, value)
        self._binding.bind_output("logits")
        self._session.run_with_iobinding(self._binding)
        return ort.OrtValue(self._binding.get_outputs_as_ortvaluevector()[0])

    def step(self) -> NDArray[np.integer]:
        """Append the likeliest token to every text, and return the tokens (batch,); see `Session`."""
        if self._chosen is not None:
            self.feed(self._chosen[:, :0])
        self._chosen = self._last.argmax(axis=-1, keepdims=True)
        return self._chosen[:, 0]

    def rewind(self, length: int) -> None:
        """Forget all tokens after the first `length`; `feed` must follow."""
        self._chosen = None
        self._length = min(length, self._length)
        if not self._in_place:
            self._past = {
                name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value.numpy()[:, :, : self._length]))
                for name, value in self._past.items()
            }


class OrtText(OrtRunner):
    """A language model on the CPU. The arguments are those of `OrtRunner`.

    Raises:
        ModelFileError: the runtime cannot load it, or it has no cache.
    """

    def __init__(self, source: Path, threads: int | None = None, *, library: Path | None = None) -> None:
        super().__init__(source, threads, library=library)
        if not any(name.startswith(_PAST) for name in self._types):
            raise ModelFileError(f"{source} has no cache; export it with --task text-generation")

    def start(self, batch: int, length: int) -> OrtTextSession:
        """Begin `batch` texts of at most `length` tokens."""
        return OrtTextSession(self._session, batch, length=length)
