"""Log-probabilities of tokens, from logits."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ibnorm_export.evaluation.samples import TokenScores

__all__ = ["score_tokens"]

#: Logits that are worked on at a time, which then stay in the processor's caches.
_CHUNK: Final = 1 << 18

#: Columns that exponentials are added up in, first in float32, which is faster than in float64. The column of a
#: vocabulary of 128k tokens adds up 125 values, and has rounding errors of 1e-6 at most.
_WIDTH: Final = 1024


def score_tokens(logits: NDArray[Any], tokens: NDArray[np.int64], *, threads: int = 1) -> TokenScores:
    """Score tokens by the logits that predict them.

    Args:
        logits: (n, vocabulary), of any floating-point type.
        tokens: (n,).
        threads: threads that share the rows.
    """
    threads = min(threads, logits.size // _CHUNK)
    if threads < 2:
        return _score(logits, tokens)
    with ThreadPoolExecutor(threads) as pool:
        parts = list(pool.map(_score, np.array_split(logits, threads), np.array_split(tokens, threads)))
    return TokenScores(
        np.concatenate([part.log_probabilities for part in parts]), np.concatenate([part.greedy for part in parts])
    )


def _score(logits: NDArray[Any], tokens: NDArray[np.int64]) -> TokenScores:
    count, vocabulary = logits.shape
    found = np.empty(count, dtype=np.float64)
    greedy = np.empty(count, dtype=np.bool_)
    step = max(1, _CHUNK // max(1, vocabulary))
    padded = np.zeros((min(step, count), -(-vocabulary // _WIDTH) * _WIDTH), dtype=np.float32)  # zeros add nothing
    for start in range(0, count, step):
        rows = logits[start : start + step]
        piece = padded[: len(rows), :vocabulary]
        chosen = tokens[start : start + step, None]
        largest = rows.argmax(axis=1, keepdims=True)
        np.subtract(rows, np.take_along_axis(rows, largest, axis=1), out=piece, dtype=np.float32)
        own = np.take_along_axis(piece, chosen, axis=1)[:, 0].astype(np.float64)
        np.exp(piece, out=piece)
        columns = padded[: len(rows)].reshape(len(rows), -1, _WIDTH).sum(axis=1)
        found[start : start + step] = own - np.log(columns.sum(axis=1, dtype=np.float64))
        greedy[start : start + step] = (largest == chosen)[:, 0]
    return TokenScores(found, greedy)
