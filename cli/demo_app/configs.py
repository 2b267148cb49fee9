"""Config and norms of the two models of the demo."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from ibnorm_export.op.spec import Compression, IBNormSpec

__all__ = ["CONFIGS"]

#: config.json without the norms, and the norms, by family.
CONFIGS: Final[Mapping[str, tuple[dict[str, Any], IBNormSpec]]] = MappingProxyType(
    {
        "llama": (
            {
                "model_type": "llama",
                "hidden_size": 128,
                "intermediate_size": 344,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "vocab_size": 256,
                "max_position_embeddings": 512,
                "tie_word_embeddings": True,
            },
            IBNormSpec(Compression.LOGARITHMIC, bias=False),
        ),
        "vit": (
            {
                "model_type": "vit",
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "image_size": 8,
                "patch_size": 2,
                "num_channels": 1,
                "num_labels": 10,
            },
            IBNormSpec(Compression.TANH),
        ),
    }
)
