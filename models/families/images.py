"""What the families that take images share: random images, and attention without a mask."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from torch import nn

from ibnorm_export.artifacts.tensors import InputSpec

__all__ = ["images", "unmasked_attention"]

# Every patch attends to every other. Under torch.export, transformers still builds a mask of ones for that, which costs
# each layer four passes over its attention scores. It builds none for an attention whose name it does not know.
_UNMASKED: Final = "sdpa_unmasked"


def unmasked_attention(module: nn.Module) -> None:
    """Let a model whose patches all attend to each other build no attention mask."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(_UNMASKED, sdpa_attention_forward)
    config: Any = module.config
    config._attn_implementation = _UNMASKED


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
