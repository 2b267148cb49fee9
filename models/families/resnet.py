"""ResNet of transformers, as an image classifier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from torch import Tensor, nn

from ibnorm_export.artifacts.axes import BATCH
from ibnorm_export.artifacts.tensors import Arrays, InputSpec
from ibnorm_export.models.families.family import Family
from ibnorm_export.models.families.images import images

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["ResNet"]


def _preset(layer_type: str, depths: Sequence[int], *, hidden_sizes: Sequence[int]) -> dict[str, Any]:
    return {
        "model_type": "resnet",
        "layer_type": layer_type,
        "depths": list(depths),
        "hidden_sizes": list(hidden_sizes),
        "embedding_size": 64,
        "num_channels": 3,
        "image_size": 224,
        "num_labels": 1000,
    }


class ResNet(Family):
    """`ResNetForImageClassification`: pixel_values -> logits. `image_size` of config.json is 224 by default."""

    name = "resnet"
    attention = "eager"
    opset = 20
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "18": _preset("basic", (2, 2, 2, 2), hidden_sizes=(64, 128, 256, 512)),
        "50": _preset("bottleneck", (3, 4, 6, 3), hidden_sizes=(256, 512, 1024, 2048)),
    }

    @property
    def architecture(self) -> type[PreTrainedModel]:
        from transformers.models.resnet.modeling_resnet import ResNetForImageClassification

        found: type[PreTrainedModel] = ResNetForImageClassification
        return found

    def make_exact(self, module: nn.Module) -> None:
        """Do nothing: the architecture forces no type."""

    def inputs(self, module: nn.Module) -> tuple[InputSpec, ...]:
        config: Any = module.config
        size = getattr(config, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else size
        return (InputSpec("pixel_values", (BATCH, config.num_channels, height, width), floating=True),)

    def call(self, module: nn.Module, *tensors: Tensor) -> tuple[Tensor, ...]:
        return (module(pixel_values=tensors[0]).logits,)

    def sample(self, module: nn.Module, rng: np.random.Generator, *, index: int) -> Arrays:
        (spec,) = self.inputs(module)
        return {"pixel_values": images(spec, rng, index=index)}
