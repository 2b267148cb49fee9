"""Draw inputs of a language model with any sizes and masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ibnorm_export.artifacts.axes import BATCH, PAST, SEQUENCE, TOTAL, axis_name, axis_sizes
from ibnorm_export.artifacts.kv_cache import positions
from ibnorm_export.artifacts.model_limits import ModelLimits
from ibnorm_export.artifacts.tensors import Arrays, InputSpec

__all__ = ["Sizes", "TokenInputs", "mask_holes", "mask_patterns", "mask_rows", "ones"]


class _Ids:
    """Draws ids: every id once, the ends of the vocabulary first, and at random after that."""

    def __init__(self, rng: np.random.Generator, vocabulary: int) -> None:
        ends = [i for i in (vocabulary - 1, 0, vocabulary - 2, 1) if 0 <= i < vocabulary]
        others = rng.permutation(np.arange(2, max(vocabulary - 2, 2), dtype=np.int64))
        self._new = np.concatenate([np.array(list(dict.fromkeys(ends)), dtype=np.int64), others])
        self._rng = rng
        self._vocabulary = vocabulary

    def draw(self, mask: NDArray[np.int64]) -> NDArray[np.int64]:
        """Draw one id for each place; ids that have not been drawn yet go where `mask` is not 0."""
        ids = self._rng.integers(0, self._vocabulary, mask.shape, dtype=np.int64)
        places = self._rng.permutation(np.flatnonzero(mask))[: len(self._new)]
        ids.flat[places] = self._new[: len(places)]
        self._new = self._new[len(places) :]
        return ids


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of the named axes of a language model's inputs."""

    batch: int
    sequence: int
    past: int = 0

    def fixed(self, fixed: Mapping[str, int]) -> Sizes:
        """The sizes, except those that the file fixes."""
        known = axis_sizes(fixed)
        sequence = known.get(SEQUENCE, self.sequence)
        past = known.get(PAST, self.past)
        if TOTAL in known and PAST not in known:
            past = max(0, known[TOTAL] - sequence)
        return Sizes(known.get(BATCH, self.batch), sequence, past)

    def of(self, spec: InputSpec) -> tuple[int, ...]:
        """The shape of an input."""
        named = {BATCH: self.batch, SEQUENCE: self.sequence, PAST: self.past, TOTAL: self.past + self.sequence}
        return tuple(n if isinstance(n, int) else named[axis_name(n)] for n in spec.shape)


_TOKEN_AXES: Final = {BATCH, SEQUENCE, PAST, TOTAL}


@dataclass(frozen=True)
class TokenInputs:
    """Draws inputs of a model that takes input_ids, with any sizes."""

    specs: tuple[InputSpec, ...]
    limits: ModelLimits
    rng: np.random.Generator
    _ids: dict[str, _Ids] = field(default_factory=dict, init=False)

    @staticmethod
    def can_draw(specs: Sequence[InputSpec]) -> bool:
        """Whether the names and axes are those of a language model."""
        axes = {axis_name(axis) for spec in specs for axis in spec.shape if isinstance(axis, str)}
        floats = [spec for spec in specs if spec.floating]
        return (
            any(spec.name == "input_ids" and len(spec.shape) == 2 for spec in specs)
            and axes <= _TOKEN_AXES
            and all(spec.name.startswith("past_key_values.") for spec in floats)
        )

    def draw(self, sizes: Sizes, mask: NDArray[np.int64]) -> Arrays:
        """Draw one sample.

        Args:
            sizes: sizes of the axes.
            mask: 0 at padded positions (batch, past + sequence).
        """
        arrays: Arrays = {}
        for spec in self.specs:
            shape = sizes.of(spec)
            if spec.floating:
                arrays[spec.name] = self.rng.standard_normal(shape, dtype=np.float32)
            elif spec.name.endswith("mask"):
                arrays[spec.name] = mask
            elif spec.name == "position_ids":
                arrays[spec.name] = positions(mask)[:, sizes.past :]
            else:
                if spec.name not in self._ids:
                    self._ids[spec.name] = _Ids(self.rng, self.limits.vocabulary.get(spec.name, 2))
                arrays[spec.name] = self._ids[spec.name].draw(mask[:, -shape[1] :])
        return arrays


def ones(sizes: Sizes) -> NDArray[np.int64]:
    """A mask (batch, past + sequence) without padding."""
    return np.ones((sizes.batch, sizes.past + sizes.sequence), dtype=np.int64)


def mask_rows(mask: NDArray[np.int64], *, padding: int, left_only: bool) -> NDArray[np.int64]:
    """Pad every second row on the left and, if `left_only` is false, every fourth on the right; row 0 stays whole."""
    room = mask.shape[1] - 1
    for row in range(1, len(mask)):
        count = min(1 + (padding + row) % max(1, padding) if row > 1 else padding, room)
        if row % 4 == 2 and not left_only:
            mask[row, mask.shape[1] - count :] = 0
        elif row % 2:
            mask[row, :count] = 0
    return mask


def mask_holes(mask: NDArray[np.int64]) -> NDArray[np.int64]:
    """Mask single tokens, more and more seldom; the last token stays, so that its position is compared."""
    index, step = 5, 7
    while index < mask.shape[1] - 2:
        mask[0, index] = 0
        index, step = index + step, step + 3
    return mask


def mask_patterns(mask: NDArray[np.int64], *, columns: int = 5) -> NDArray[np.int64]:
    """Mask the first tokens of each row in another pattern; row 0 stays whole, and a token of each row stays.

    With 2^columns rows, every pattern of them is there. A single row loses its first token and the third, and the last
    one if there are many.
    """
    total = mask.shape[1]
    if len(mask) == 1:
        mask[0, [place for place in (0, 2) if place < total - 1]] = 0
        mask[0, total - (total > columns) :] = 0
        return mask
    places = min(columns, total)
    for row in range(1, len(mask)):
        hidden = [place for place in range(places) if row >> place & 1]
        mask[row, hidden if len(hidden) < total else hidden[:-1]] = 0
    return mask
