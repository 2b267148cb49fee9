"""LLaMA of transformers: tokens to logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Final

import torch
from torch import Tensor, nn

from ibnorm_export.errors import CheckpointError
from ibnorm_export.models.families.causal import CausalFamily

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

__all__ = ["Llama"]


#: Kinds of rotary embedding whose frequencies do not depend on the input.
_ROTARY: Final = ("default", "linear", "llama3", "yarn")


def _preset(hidden: int, intermediate: int, *, heads: int, layers: int) -> dict[str, Any]:
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
    """Rotary tables in float64. Frequencies are computed from the config, or taken from transformers if scaled."""

    def __init__(self, rotary: LlamaRotaryEmbedding) -> None:
        super().__init__()
        config = rotary.config
        self._scaling = float(rotary.attention_scaling)
        if config.rope_parameters.get("rope_type", "default") == "default":
            head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            exponent = torch.arange(0, head, 2, dtype=torch.float64) / head
            frequencies = float(config.rope_parameters["rope_theta"]) ** -exponent
        else:
            frequencies = rotary.inv_freq.to(torch.float64)
        self.register_buffer("inv_freq", frequencies, persistent=False)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        assert isinstance(self.inv_freq, Tensor)
        angle = position_ids[..., None].to(torch.float64) * self.inv_freq  # (batch, sequence, head / 2)
        angle = torch.cat((angle, angle), dim=-1)
        return angle.cos() * self._scaling, angle.sin() * self._scaling


class Llama(CausalFamily):
    """`LlamaForCausalLM`, with the inputs and outputs of `CausalFamily`."""

    name = "llama"
    blocks = "model.layers"
    # From opset 23, Attention and RotaryEmbedding are standard operators. At 18 and 20, the exported attention differs
    # from PyTorch on rows that are completely masked.
    opset = 23
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "60m": _preset(512, 1376, heads=8, layers=8),
        "130m": _preset(768, 2048, heads=12, layers=12),
        "350m": _preset(1024, 2736, heads=16, layers=24),
        "1b": _preset(2048, 5461, heads=32, layers=24),
    }

    @property
    def architecture(self) -> type[PreTrainedModel]:
        from transformers.models.llama.modeling_llama import LlamaForCausalLM

        found: type[PreTrainedModel] = LlamaForCausalLM
        return found

    def check(self, config: Mapping[str, Any]) -> None:
        from transformers.models.llama.configuration_llama import LlamaConfig

        kind = LlamaConfig(**config).rope_parameters.get("rope_type", "default")
        if kind not in _ROTARY:
            raise CheckpointError(
                f"rotary scaling in config.json is {kind!r}, whose frequencies change with the length of the text; "
                f"it must be one of {', '.join(_ROTARY)}"
            )

    def make_exact(self, module: nn.Module) -> None:
        decoder: Any = module.model
        decoder.rotary_emb = _ExactRotary(decoder.rotary_emb)
