"""Any image classifier of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from torch import Tensor, nn

from ibnorm_export.artifacts.axes import BATCH
from ibnorm_export.artifacts.tensors import Arrays, InputSpec
from ibnorm_export.errors import CheckpointError
from ibnorm_export.models.families.found_family import FoundFamily
from ibnorm_export.models.families.images import images, unmasked_attention

if TYPE_CHECKING:
    pass

__all__ = ["ImageClassifier"]

#: Side of an image, in pixels, where config.json does not state one: that of ImageNet's classifiers.
_SIDE: Final = 224


def _sides(config: Any) -> tuple[int, int]:
    """Height and width of an image."""
    size = getattr(config, "image_size", None) or _SIDE
    sides = [size, size] if isinstance(size, int) else list(size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise CheckpointError(
            f"config.json has the image_size {size!r}; it must be a number of pixels or [height, width]"
        )
    return sides[0], sides[1]


class ImageClassifier(FoundFamily):
    """An image classifier: pixel_values (batch, channels, height, width) -> logits (batch, classes).

    Height and width are `image_size` of config.json, 224 by default.
    """

    opset = 20  # see ViT

    def check(self, config: Mapping[str, Any]) -> None:
        _sides(self.settings(config))

    def prepare(self, module: nn.Module) -> None:
        if self.attention == "sdpa":
            unmasked_attention(module)

    def inputs(self, module: nn.Module) -> tuple[InputSpec, ...]:
        config: Any = module.config
        return (InputSpec("pixel_values", (BATCH, int(config.num_channels), *_sides(config)), floating=True),)

    def call(self, module: nn.Module, *tensors: Tensor) -> tuple[Tensor, ...]:
        return (module(pixel_values=tensors[0]).logits,)

    def sample(self, module: nn.Module, rng: np.random.Generator, *, index: int) -> Arrays:
        (spec,) = self.inputs(module)
        return {"pixel_values": images(spec, rng, index=index)}
