"""Any encoder of transformers that reads text, such as BERT, with the head that the checkpoint names."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ibnorm_export.artifacts.axes import BATCH, SEQUENCE
from ibnorm_export.artifacts.tensors import Arrays, InputSpec
from ibnorm_export.errors import CheckpointError
from ibnorm_export.models.families.architectures import Head, check_rotary
from ibnorm_export.models.families.found_family import FoundFamily
from ibnorm_export.models.families.texts import texts

if TYPE_CHECKING:
    pass

__all__ = ["Encoder"]

#: Outputs with one value for each token; padding has none that is defined.
_PER_TOKEN: Final = ("last_hidden_state", "start_logits", "end_logits")


class Encoder(FoundFamily):
    """An encoder: input_ids, attention_mask and, where the model has them, token_type_ids -> the outputs of its head.

    Without a head the outputs are last_hidden_state and, where the model has a pooler, pooler_output; otherwise logits,
    or start_logits and end_logits.
    """

    opset = 23  # the first with a standard Attention, which takes a padding mask

    def check(self, config: Mapping[str, Any]) -> None:
        settings = self.settings(config)
        for key in ("is_encoder_decoder", "is_decoder", "add_cross_attention"):
            if getattr(settings, key, False):
                raise CheckpointError(
                    f"config.json has {key}: true; of the {self.name} models, this version exports encoders"
                )
        check_rotary(settings)

    def output_names(self, module: nn.Module) -> tuple[str, ...]:
        match self.head:
            case Head.BASE:
                pooled = getattr(module, "pooler", None) is not None
                return ("last_hidden_state", "pooler_output") if pooled else ("last_hidden_state",)
            case Head.QUESTION:
                return ("start_logits", "end_logits")
            case _:
                return ("logits",)

    def inputs(self, module: nn.Module) -> tuple[InputSpec, ...]:
        config: Any = module.config
        names = ["input_ids", "attention_mask"]
        takes_types = "token_type_ids" in inspect.signature(self._class.forward).parameters
        if takes_types and int(getattr(config, "type_vocab_size", 0) or 0) > 1:
            names.append("token_type_ids")
        return tuple(InputSpec(name, (BATCH, SEQUENCE), floating=False) for name in names)

    def call(self, module: nn.Module, *tensors: Tensor) -> tuple[Tensor, ...]:
        named = {spec.name: tensor for spec, tensor in zip(self.inputs(module), tensors, strict=True)}
        config: Any = module.config
        if getattr(config, "rope_parameters", None):  # RotaryEmbedding of opset 23 needs positions for every row
            ids = named["input_ids"]
            named["position_ids"] = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        result = module(**named, return_dict=True)
        return tuple(result[name] for name in self.output_names(module))

    def longest(self, module: nn.Module) -> int:
        """The longest text in tokens; RoBERTa's positions start after the one of padding."""
        config: Any = module.config
        positions = int(getattr(config, "max_position_embeddings", 0) or 0)
        embeddings = next((m for name, m in module.named_modules() if name.endswith("position_embeddings")), None)
        padding = getattr(embeddings, "padding_idx", None)
        return positions if padding is None or positions <= 0 else positions - padding - 1

    def sample(self, module: nn.Module, rng: np.random.Generator, *, index: int) -> Arrays:
        config: Any = module.config
        ids, mask = texts(rng, vocabulary=config.vocab_size, longest=self.longest(module), index=index)
        arrays: Arrays = {"input_ids": ids, "attention_mask": mask}
        if any(spec.name == "token_type_ids" for spec in self.inputs(module)):
            arrays["token_type_ids"] = rng.integers(0, config.type_vocab_size, ids.shape, dtype=np.int64)
        return arrays

    def valid(self, arrays: Arrays) -> dict[str, NDArray[np.bool_]]:
        mask = arrays["attention_mask"] != 0
        per_token = dict.fromkeys(_PER_TOKEN, mask)
        return {**per_token, "logits": mask} if self.head in (Head.MASKED, Head.TOKENS) else per_token
