"""LLaMA of transformers, as a map from tokens to logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ibnorm_export.errors import CheckpointError
from ibnorm_export.loaded import Arrays, InputSpec
from ibnorm_export.models.causal import CausalFamily
from ibnorm_export.models.prompts import prompts

__all__ = ["Llama"]


def _preset(hidden: int, intermediate: int, heads: int, layers: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "num_hidden_layers": layers,
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    }


class _ExactRotary(nn.Module):
    """Rotary tables computed in float64 from the config (default rotary embedding)."""

    def __init__(self, rotary: LlamaRotaryEmbedding) -> None:
        super().__init__()
        config = rotary.config
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        theta = config.rope_parameters["rope_theta"]
        exponent = torch.arange(0, head, 2, dtype=torch.float64) / head
        self.register_buffer("inv_freq", float(theta) ** -exponent, persistent=False)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        assert isinstance(self.inv_freq, Tensor)
        angle = position_ids[..., None].to(torch.float64) * self.inv_freq  # (batch, sequence, head / 2)
        angle = torch.cat((angle, angle), dim=-1)
        return angle.cos(), angle.sin()


class Llama(CausalFamily):
    """`LlamaForCausalLM`: (input_ids, attention_mask) -> logits, or with a cache as `CausalFamily` says."""

    name = "llama"
    architecture = LlamaForCausalLM
    # Attention and RotaryEmbedding are standard operators from opset 23; at 18 and 20 the exported
    # attention differs from torch on rows that are masked throughout.
    opset = 23
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "60m": _preset(512, 1376, 8, 8),
        "130m": _preset(768, 2048, 12, 12),
        "350m": _preset(1024, 2736, 16, 24),
        "1b": _preset(2048, 5461, 32, 24),
    }

    def check(self, config: Mapping[str, Any]) -> None:
        kind = LlamaConfig(**config).rope_parameters.get("rope_type", "default")
        if kind != "default":
            raise CheckpointError(f"config.json asks for rotary scaling {kind!r}; this version exports 'default' only")

    def make_exact(self, module: nn.Module) -> None:
        assert isinstance(module, LlamaForCausalLM)
        module.model.rotary_emb = _ExactRotary(module.model.rotary_emb)

    def inputs(self, module: nn.Module) -> tuple[InputSpec, ...]:
        return (
            InputSpec("input_ids", ("batch", "sequence"), floating=False),
            InputSpec("attention_mask", ("batch", "sequence"), floating=False),
        )

    def call(self, module: nn.Module, *tensors: Tensor) -> tuple[Tensor, ...]:
        input_ids, attention_mask = tensors
        # The stock model's own positions, with the batch axis that RotaryEmbedding of opset 23 asks for.
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand(input_ids.shape)
        return (
            module(input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, use_cache=False).logits,
        )

    def sample(self, module: nn.Module, rng: np.random.Generator, index: int) -> Arrays:
        assert isinstance(module, LlamaForCausalLM)
        return prompts(module.config.vocab_size, module.config.max_position_embeddings, rng, index)

    def valid(self, arrays: Arrays) -> dict[str, NDArray[np.bool_]]:
        return {"logits": arrays["attention_mask"] != 0}
