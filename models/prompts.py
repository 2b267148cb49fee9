"""Drawn prompts, for language models without a cache."""

from __future__ import annotations

import numpy as np

from ibnorm_export.loaded import Arrays

__all__ = ["prompts"]


def prompts(vocabulary: int, longest: int, rng: np.random.Generator, index: int) -> Arrays:
    """input_ids and attention_mask (batch, sequence).

    Args:
        vocabulary: tokens are below it.
        longest: sequence that the model takes.
        rng: to draw with.
        index: walks through one prompt, padding on the left, a single token, padding on the right.
    """
    batch, sequence = ((1, 64), (3, 33), (1, 1), (2, 48))[index % 4]
    sequence = min(sequence, longest)
    ids = rng.integers(0, vocabulary, (batch, sequence), dtype=np.int64)
    mask = np.ones((batch, sequence), dtype=np.int64)
    if index % 4 == 1:
        for row in range(1, batch):
            mask[row, : min(7 * row, sequence - 1)] = 0
    elif index % 4 == 3 and sequence > 5:
        mask[1, -5:] = 0
    return {"input_ids": ids, "attention_mask": mask}
