"""Models of the sizes that the demo trains, for suites that need no trained weights."""

from __future__ import annotations

from ibnorm_export import IBNormSpec

__all__ = ["CONFIGS"]

#: Config and norm by family.
CONFIGS = {
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
        IBNormSpec("L", bias=False),
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
        IBNormSpec("T"),
    ),
}
