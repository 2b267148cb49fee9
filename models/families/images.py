"""Random images, for the families that take images."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ibnorm_export.artifacts.tensors import InputSpec

__all__ = ["images"]


def images(spec: InputSpec, rng: np.random.Generator, *, index: int) -> NDArray[np.float32]:
    """Draw images (batch, channels, height, width) of zero mean and unit variance, with a flat region.

    Args:
        spec: the input; its first axis is the batch.
        rng: generator to draw with.
        index: successive values give different batch sizes, 1 among them.
    """
    batch = (2, 1, 5, 3)[index % 4]
    shape = (batch, *(n for n in spec.shape[1:] if isinstance(n, int)))
    pixels = rng.standard_normal(shape, dtype=np.float32)
    pixels[:, :, : shape[2] // 4] = pixels[:, :, :1, :1]
    return pixels
