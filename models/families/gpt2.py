"""GPT-2 of transformers: learned positions, norms with a bias."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from ibnorm_export.errors import CheckpointError
from ibnorm_export.models.families.causal import CausalFamily

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["GPT2"]


def _preset(hidden: int, heads: int, *, layers: int) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "n_embd": hidden,
        "n_head": heads,
        "n_layer": layers,
        "n_positions": 1024,
        "vocab_size": 50257,
    }


class GPT2(CausalFamily):
    """`GPT2LMHeadModel`, with the inputs and outputs of `CausalFamily`."""

    name = "gpt2"
    blocks = "transformer.h"
    opset = 23  # see Llama
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "124m": _preset(768, 12, layers=12),
        "355m": _preset(1024, 16, layers=24),
    }

    @property
    def architecture(self) -> type[PreTrainedModel]:
        from transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel

        found: type[PreTrainedModel] = GPT2LMHeadModel
        return found

    def check(self, config: Mapping[str, Any]) -> None:
        if config.get("add_cross_attention"):
            raise CheckpointError(
                "config.json enables cross-attention (add_cross_attention); this version only exports decoders"
            )

    def make_exact(self, module: nn.Module) -> None:
        """Do nothing: the architecture forces no type."""
