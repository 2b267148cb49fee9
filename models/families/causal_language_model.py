"""Any decoder of transformers with attention and a cache of keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ibnorm_export.errors import CheckpointError, quoted
from ibnorm_export.models.families.architectures import check_causal
from ibnorm_export.models.families.causal import CausalFamily, cache_argument
from ibnorm_export.models.families.found_family import FoundFamily

if TYPE_CHECKING:
    pass

__all__ = ["CausalLanguageModel"]


class CausalLanguageModel(FoundFamily, CausalFamily):
    """A causal language model of transformers, with the inputs and outputs of `CausalFamily`."""

    opset = 23  # see Llama

    def attention_of(self, config: Mapping[str, Any]) -> str:
        """Eager for a Falcon with one head of keys and values, which its call of PyTorch's attention broadcasts."""
        settings = self.settings(config)
        shared = getattr(settings, "multi_query", False) and not getattr(settings, "new_decoder_architecture", False)
        return "eager" if self.name == "falcon" and shared else self.attention

    def check(self, config: Mapping[str, Any]) -> None:
        check_causal(self._class, self.settings(config))

    def cache_size(self, module: nn.Module) -> tuple[int, int, int]:
        """The number of layers, of heads of keys and values, and the size of a head, as a run without weights shows.

        Raises:
            CheckpointError: layers, or keys and values, differ in size.
        """
        from transformers.cache_utils import DynamicCache

        config: Any = module.config
        with torch.device("meta"), torch.no_grad():
            blank: Any = self._class(config)
            cached = {cache_argument(self._class): DynamicCache()}
            cache = blank(torch.zeros((1, 2), dtype=torch.int64), use_cache=True, **cached)
        shapes = [tuple(t.shape) for layer in cache.past_key_values.layers for t in (layer.keys, layer.values)]
        if len(set(shapes)) != 1:
            raise CheckpointError(
                f"the keys and values of {self._class.__name__} have the shapes {quoted(sorted(set(shapes)))}; text "
                "generation needs the same shape in every layer. --task forward exports the model without a cache"
            )
        _, heads, _, head = shapes[0]
        return len(shapes) // 2, int(heads), int(head)
