"""A static cache passed and returned like a dynamic one: each pass copies it into a buffer and out again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ibnorm_export.artifacts.axes import CAPACITY
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.tensors import Arrays

__all__ = ["CachePasser"]

#: Number of unused tokens at the end of a static cache, and the value in them. Results must not depend on either.
_SPARE: Final = 3
_UNUSED: Final = 100.0


class CachePasser:
    """Gives a model with a static cache the inputs and outputs of one with a dynamic cache; others pass unchanged.

    Args:
        in_place: the model, or the names of the inputs that it writes to.
    """

    def __init__(self, in_place: ExportedModel | frozenset[str]) -> None:
        if isinstance(in_place, ExportedModel):
            in_place = frozenset(tensor.name for tensor in in_place.inputs if CAPACITY in tensor.shape)
        self._in_place = in_place

    def with_room(self, inputs: Arrays) -> Arrays:
        """The inputs with each cache in a buffer for all tokens and some unused ones."""
        if not self._in_place:
            return inputs
        total = inputs["attention_mask"].shape[1]
        return {name: _buffer(array, total) if name in self._in_place else array for name, array in inputs.items()}

    def run(self, run: Callable[[Arrays], Arrays], inputs: Arrays) -> Arrays:
        """Run one pass, and return its outputs without the unused tokens."""
        outputs = run(self.with_room(inputs))
        if not self._in_place:
            return outputs
        total = inputs["attention_mask"].shape[1]
        return {name: a[:, :, :total] if name.startswith("present.") else a for name, a in outputs.items()}


def _buffer(cache: NDArray[Any], total: int) -> NDArray[Any]:
    """Copy a cache (batch, heads, past, head) into a buffer of `total` tokens and some unused ones."""
    batch, heads, past, head = cache.shape
    buffer = np.full((batch, heads, total + _SPARE, head), _UNUSED, dtype=cache.dtype)
    buffer[:, :, :past] = cache
    return buffer
