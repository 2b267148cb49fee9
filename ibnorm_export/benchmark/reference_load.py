"""The work beside which a baseline times a model: the same on every day and machine."""

from __future__ import annotations

from typing import Final

import torch

from ibnorm_export.artifacts.tensors import Arrays
from ibnorm_export.benchmark.baseline import YARDSTICK

__all__ = ["Yardstick"]

_SIZE: Final = 384
_PRODUCTS: Final = 6


class Yardstick:
    """A fixed piece of work as a runner: products of matrices in torch, some milliseconds long."""

    name = YARDSTICK

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self._matrix = torch.randn((_SIZE, _SIZE), generator=generator) / _SIZE**0.5

    def run(self, inputs: Arrays) -> Arrays:
        with torch.inference_mode():
            product = self._matrix
            for _ in range(_PRODUCTS):
                product = product @ self._matrix
        return {"product": product.numpy()}
