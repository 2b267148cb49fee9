"""Small checkpoints with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ibnorm_export import IBNormSpec, models

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 64,
}
GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "n_embd": 32,
    "n_head": 4,
    "n_layer": 2,
    "n_positions": 64,
    "vocab_size": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
VIT: dict[str, Any] = {
    "model_type": "vit",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 8,
    "patch_size": 2,
    "num_channels": 1,
    "num_labels": 10,
}
RESNET: dict[str, Any] = {
    "model_type": "resnet",
    "layer_type": "basic",
    "depths": [1, 1],
    "hidden_sizes": [8, 16],
    "embedding_size": 8,
    "num_channels": 3,
    "image_size": 16,
    "num_labels": 10,
}


def save_checkpoint(folder: Path, config: dict[str, Any], spec: IBNormSpec, seed: int | None = None) -> Path:
    """Save a model with random weights, none of them zero: a zero bias would hide that it was dropped."""
    if seed is not None:
        torch.manual_seed(seed)
    model = models.new_model(config, spec)
    for index, (_, parameter) in enumerate(model.named_parameters()):
        values = (parameter.detach().flatten() * 0).float()
        values += 0.1 + 0.05 * ((values.new_tensor(range(len(values))) + index) * 0.7).sin()
        if parameter.dim() == 1:
            parameter.data += values
    models.save(model, folder)
    return folder
