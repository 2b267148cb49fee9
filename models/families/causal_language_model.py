"""Any decoder of transformers with attention and a cache of keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ibnorm_export.errors import CheckpointError
from ibnorm_export.models.families.architectures import Architecture, check_causal
from ibnorm_export.models.families.causal import CausalFamily

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["CausalLanguageModel"]


class CausalLanguageModel(CausalFamily):
    """A causal language model of transformers, with the inputs and outputs of `CausalFamily`.

    Args:
        architecture: the class of transformers.
    """

    opset = 23  # see Llama

    def __init__(self, architecture: Architecture) -> None:
        self.name = architecture.model_type
        self._class = architecture.load()
        # An architecture that transforms attention scores (soft-capping) has no scaled_dot_product_attention.
        self.attention = "sdpa" if self._class._supports_sdpa else "eager"

    @property
    def architecture(self) -> type[PreTrainedModel]:
        return self._class

    def check(self, config: Mapping[str, Any]) -> None:
        settings = {key: value for key, value in config.items() if key != "model_type"}
        check_causal(self._class, self._class.config_class(**settings))

    def cache_size(self, module: nn.Module) -> tuple[int, int, int]:
        """The number of layers, of heads of keys and values, and the size of a head, as a run without weights shows.

        Raises:
            CheckpointError: layers, or keys and values, differ in size.
        """
        from transformers.cache_utils import DynamicCache

        config: Any = module.config
        with torch.device("meta"), torch.no_grad():
            blank: Any = self._class(config)
            cache = blank(torch.zeros((1, 2), dtype=torch.int64), past_key_values=DynamicCache(), use_cache=True)
        shapes = [tuple(t.shape) for layer in cache.past_key_values.layers for t in (layer.keys, layer.values)]
        if len(set(shapes)) != 1:
            raise CheckpointError(
                f"the keys and values of {self._class.__name__} have the shapes {str(sorted(set(shapes)))[:200]}; text "
                "generation needs the same shape in every layer. --task forward exports the model without a cache"
            )
        _, heads, _, head = shapes[0]
        return len(shapes) // 2, int(heads), int(head)
