"""The reference load: a fixed amount of work that is timed in turns with a model."""

from __future__ import annotations

from typing import Final

import torch

from ibnorm_export.artifacts.tensors import Arrays
from ibnorm_export.benchmark.baseline import REFERENCE_LOAD

__all__ = ["REFERENCE_LOAD", "ReferenceLoad"]

_SIZE: Final = 384
_PRODUCTS: Final = 6


class ReferenceLoad:
    """A runner that ignores its inputs and multiplies matrices in PyTorch for some milliseconds."""

    name = REFERENCE_LOAD
    thread_pool = "torch"

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self._matrix = torch.randn((_SIZE, _SIZE), generator=generator) / _SIZE**0.5

    def run(self, inputs: Arrays) -> Arrays:
        with torch.inference_mode():
            product = self._matrix
            for _ in range(_PRODUCTS):
                product = product @ self._matrix
        return {"product": product.numpy()}
