"""Vision transformer of transformers, as an image classifier."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from torch import Tensor, nn

from ibnorm_export.artifacts.axes import BATCH
from ibnorm_export.artifacts.tensors import Arrays, InputSpec
from ibnorm_export.errors import CheckpointError
from ibnorm_export.models.families.family import Family
from ibnorm_export.models.families.images import images, unmasked_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["ViT"]


def _preset(hidden: int, intermediate: int, *, heads: int) -> dict[str, Any]:
    return {
        "model_type": "vit",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_hidden_layers": 12,
        "image_size": 224,
        "patch_size": 16,
        "num_channels": 3,
        "num_labels": 1000,
    }


class ViT(Family):
    """`ViTForImageClassification`: pixel_values -> logits."""

    name = "vit"
    blocks = "vit.layers"
    # The first with Gelu, for older runtimes; `--for ort` sets 23, which is faster on a CPU.
    opset = 20
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "s16": _preset(384, 1536, heads=6),
        "b16": _preset(768, 3072, heads=12),
    }

    @property
    def architecture(self) -> type[PreTrainedModel]:
        from transformers.models.vit.modeling_vit import ViTForImageClassification

        found: type[PreTrainedModel] = ViTForImageClassification
        return found

    def check(self, config: Mapping[str, Any]) -> None:
        size = config.get("image_size", 224)
        sides = size if isinstance(size, list) else [size, size]
        if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
            raise CheckpointError(
                f"config.json has the image_size {size!r}; it must be a number of pixels or [height, width]"
            )

    def prepare(self, module: nn.Module) -> None:
        unmasked_attention(module)

    def make_exact(self, module: nn.Module) -> None:
        """Do nothing: the architecture forces no type."""

    def inputs(self, module: nn.Module) -> tuple[InputSpec, ...]:
        config: Any = module.config
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return (InputSpec("pixel_values", (BATCH, config.num_channels, height, width), floating=True),)

    def call(self, module: nn.Module, *tensors: Tensor) -> tuple[Tensor, ...]:
        return (module(pixel_values=tensors[0]).logits,)

    def sample(self, module: nn.Module, rng: np.random.Generator, *, index: int) -> Arrays:
        (spec,) = self.inputs(module)
        return {"pixel_values": images(spec, rng, index=index)}
