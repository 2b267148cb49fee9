"""Inputs of a language model with a cache: it takes past_key_values.* and returns present.*."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.tensors import Arrays, DType, InputSpec

__all__ = ["input_specs", "positions", "without_padding"]


def positions(mask: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the position of every token in its row.

    Args:
        mask: (batch, total), 0 if a token is padding.

    Returns:
        (batch, total); padding on the left has position 0.
    """
    counted: NDArray[np.int64] = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    return counted


def without_padding(inputs: Arrays) -> Arrays:
    """Return the same tokens and cache without padding, as the kernel of GroupQueryAttention requires.

    If several tokens follow a past, only the first row is kept: the kernel supports only one row in that case.
    """
    tokens, total = inputs["input_ids"].shape[1], inputs["attention_mask"].shape[1]
    if tokens > 1 and total > tokens:
        inputs = {name: array[:1] for name, array in inputs.items()}
    mask = np.ones_like(inputs["attention_mask"])
    return {
        **inputs,
        "attention_mask": mask,
        "position_ids": positions(mask)[:, total - tokens :],
    }


def input_specs(exported: ExportedModel) -> tuple[InputSpec, ...]:
    """Return the inputs of an exported file as specifications."""
    return tuple(InputSpec(t.name, t.shape, t.dtype in tuple(DType)) for t in exported.inputs)
