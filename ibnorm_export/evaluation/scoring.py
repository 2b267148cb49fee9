"""Log-probabilities of tokens, from logits."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ibnorm_export.evaluation.samples import TokenScores

__all__ = ["score_tokens"]

#: Logits that are worked on at a time, which then stay in the processor's caches.
_CHUNK: Final = 1 << 18


def score_tokens(logits: NDArray[Any], tokens: NDArray[np.int64]) -> TokenScores:
    """Score tokens by the logits that predict them.

    Args:
        logits: (n, vocabulary), of any floating-point type.
        tokens: (n,).
    """
    count, vocabulary = logits.shape
    found = np.empty(count, dtype=np.float64)
    greedy = np.empty(count, dtype=np.bool_)
    step = max(1, _CHUNK // max(1, vocabulary))
    for start in range(0, count, step):
        rows = slice(start, start + step)
        piece = logits[rows].astype(np.float32)  # a copy, which is changed below
        chosen = tokens[rows, None]
        greedy[rows] = piece.argmax(axis=1) == chosen[:, 0]
        piece -= piece.max(axis=1, keepdims=True)
        own = np.take_along_axis(piece, chosen, axis=1)[:, 0].astype(np.float64)
        np.exp(piece, out=piece)
        found[rows] = own - np.log(piece.sum(axis=1, dtype=np.float64))
    return TokenScores(found, greedy)
