"""GPT-2 of transformers, as a map from tokens to logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from ibnorm_export.loaded import Arrays, InputSpec
from ibnorm_export.models.family import Family
from ibnorm_export.models.prompts import prompts

__all__ = ["GPT2"]


def _preset(hidden: int, heads: int, layers: int) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "n_embd": hidden,
        "n_head": heads,
        "n_layer": layers,
        "n_positions": 1024,
        "vocab_size": 50257,
    }


class GPT2(Family):
    """`GPT2LMHeadModel`: (input_ids, attention_mask) -> logits."""

    name = "gpt2"
    architecture = GPT2LMHeadModel
    opset = 23  # as LLaMA: below it, attention differs from torch on rows that are masked throughout
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "124m": _preset(768, 12, 12),
        "355m": _preset(1024, 16, 24),
    }

    def make_exact(self, module: nn.Module) -> None:
        """Nothing in this architecture forces a type."""

    def inputs(self, module: nn.Module) -> tuple[InputSpec, ...]:
        return (
            InputSpec("input_ids", ("batch", "sequence"), floating=False),
            InputSpec("attention_mask", ("batch", "sequence"), floating=False),
        )

    def call(self, module: nn.Module, *tensors: Tensor) -> tuple[Tensor, ...]:
        input_ids, attention_mask = tensors
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand(input_ids.shape)
        return (
            module(input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, use_cache=False).logits,
        )

    def sample(self, module: nn.Module, rng: np.random.Generator, index: int) -> Arrays:
        assert isinstance(module, GPT2LMHeadModel)
        return prompts(module.config.vocab_size, module.config.n_positions, rng, index)

    def valid(self, arrays: Arrays) -> dict[str, NDArray[np.bool_]]:
        return {"logits": arrays["attention_mask"] != 0}
