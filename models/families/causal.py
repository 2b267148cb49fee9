"""What causal language models share: a cache of keys and values, whose tensors are inputs and outputs."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ibnorm_export.artifacts.axes import BATCH, PAST, SEQUENCE, TOTAL
from ibnorm_export.artifacts.kv_cache import positions
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.metadata import Task
from ibnorm_export.artifacts.tensors import Arrays, InputSpec
from ibnorm_export.models.families.family import Family
from ibnorm_export.models.families.texts import texts

__all__ = ["CausalFamily", "cache_argument"]


def cache_argument(model: nn.Module | type[nn.Module]) -> str:
    """The argument of `forward` that is the cache. Transformers 5.24 renamed it, and warns about the earlier name."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


class CausalFamily(Family):
    """A language model of transformers: (input_ids, attention_mask) -> logits.

    With a cache, the names are those of optimum and onnxruntime-genai. Inputs: input_ids and position_ids
    (batch, sequence), attention_mask (batch, total = past + sequence), past_key_values.N.key and .value
    (batch, heads, past, head). Outputs: logits, present.N.key and .value (batch, heads, total, head).
    """

    def inputs(self, module: nn.Module) -> tuple[InputSpec, ...]:
        return (
            InputSpec("input_ids", (BATCH, SEQUENCE), floating=False),
            InputSpec("attention_mask", (BATCH, SEQUENCE), floating=False),
        )

    def call(self, module: nn.Module, *tensors: Tensor) -> tuple[Tensor, ...]:
        input_ids, attention_mask = tensors
        # The positions of the stock model, with the batch axis that RotaryEmbedding of opset 23 requires.
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand(input_ids.shape)
        return (
            module(input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, use_cache=False).logits,
        )

    def sample(self, module: nn.Module, rng: np.random.Generator, *, index: int) -> Arrays:
        config: Any = module.config
        ids, mask = texts(rng, vocabulary=config.vocab_size, longest=self.longest(module), index=index)
        return {"input_ids": ids, "attention_mask": mask}

    def valid(self, arrays: Arrays) -> dict[str, NDArray[np.bool_]]:
        return {"logits": arrays["attention_mask"] != 0}

    def cache_size(self, module: nn.Module) -> tuple[int, int, int]:
        """The number of layers, of heads of keys and values, and the size of a head."""
        config: Any = module.config
        heads = int(config.num_attention_heads)
        head = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
        return int(config.num_hidden_layers), int(getattr(config, "num_key_value_heads", heads)), head

    def with_cache(self, model: LoadedModel) -> LoadedModel:
        """The same model for the task "text-generation"."""
        module = model.module
        config: Any = module.config
        size = layers, heads, head = self.cache_size(module)
        layer_names = [f"{layer}.{kind}" for layer in range(layers) for kind in ("key", "value")]
        past = [InputSpec(f"past_key_values.{n}", (BATCH, heads, PAST, head), floating=True) for n in layer_names]
        return dataclasses.replace(
            model,
            inputs=(
                InputSpec("input_ids", (BATCH, SEQUENCE), floating=False),
                InputSpec("attention_mask", (BATCH, TOTAL), floating=False),
                InputSpec("position_ids", (BATCH, SEQUENCE), floating=False),
                *past,
            ),
            outputs=("logits", *(f"present.{n}" for n in layer_names)),
            call=functools.partial(self._call_with_cache, cache_argument(module)),
            sample=lambda rng, index: self._sample_with_cache(module, rng, index=index, size=size),
            valid=_valid_with_cache,
            task=Task.TEXT_GENERATION,
            trace_sizes={BATCH: 2, SEQUENCE: 3, PAST: 5, TOTAL: 8},
            vocabulary=int(config.vocab_size),
            blocks="",  # each block adds inputs, whose sizes are not used alike
        )

    def _call_with_cache(self, argument: str, module: nn.Module, *tensors: Tensor) -> tuple[Tensor, ...]:
        input_ids, attention_mask, position_ids, *past = tensors
        from transformers.cache_utils import DynamicCache

        cache = DynamicCache(ddp_cache_data=list(zip(past[::2], past[1::2], strict=True)))
        result = module(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=True,
            **{argument: cache},
        )
        present = [t for layer in result.past_key_values.layers for t in (layer.keys, layer.values)]
        return result.logits, *present

    def _sample_with_cache(
        self, module: nn.Module, rng: np.random.Generator, *, index: int, size: tuple[int, int, int]
    ) -> Arrays:
        # a first prompt; one token for rows of unequal length; one token without a past; more prompt after a past
        config: Any = module.config
        batch, past, sequence = ((1, 0, 33), (3, 19, 1), (1, 0, 1), (2, 9, 5))[index % 4]
        if longest := self.longest(module):
            past = min(past, longest - 1)
            sequence = min(sequence, longest - past)
        layers, heads, head = size
        mask = np.ones((batch, past + sequence), dtype=np.int64)
        for row in range(1, batch):
            mask[row, : min(4 * row, past)] = 0
        arrays: Arrays = {
            "input_ids": rng.integers(0, config.vocab_size, (batch, sequence), dtype=np.int64),
            "attention_mask": mask,
            "position_ids": positions(mask)[:, past:],
        }
        for layer in range(layers):
            for kind in ("key", "value"):
                values = rng.standard_normal((batch, heads, past, head), dtype=np.float32)
                arrays[f"past_key_values.{layer}.{kind}"] = values
        return arrays


def _valid_with_cache(arrays: Arrays) -> dict[str, NDArray[np.bool_]]:
    mask = arrays["attention_mask"] != 0
    valid = {"logits": mask[:, -arrays["input_ids"].shape[1] :]}
    for name, array in arrays.items():
        if name.startswith("past_key_values."):
            shape = (len(mask), array.shape[1], mask.shape[1])
            present = f"present.{name.removeprefix('past_key_values.')}"
            valid[present] = np.broadcast_to(mask[:, None, :], shape)
    return valid
