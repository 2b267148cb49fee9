"""Random texts, for the families that take tokens."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["texts"]

#: (rows, tokens): one text; padding on the left; a single token; padding on the right.
_SIZES: Final = ((1, 64), (3, 33), (1, 1), (2, 48))


def texts(
    rng: np.random.Generator, *, vocabulary: int, longest: int, index: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Draw token ids (batch, sequence), and their attention mask (batch, sequence).

    Args:
        rng: generator to draw with.
        vocabulary: number of tokens.
        longest: the most tokens that the model takes; 0 if there is no limit.
        index: successive values give the sizes and kinds of padding that matter.
    """
    batch, sequence = _SIZES[index % 4]
    sequence = min(sequence, longest or sequence)
    ids = rng.integers(0, vocabulary, (batch, sequence), dtype=np.int64)
    mask = np.ones((batch, sequence), dtype=np.int64)
    if index % 4 == 1:
        for row in range(1, batch):
            mask[row, : min(7 * row, sequence - 1)] = 0
    elif index % 4 == 3 and sequence > 5:
        mask[1, -5:] = 0
    return ids, mask
