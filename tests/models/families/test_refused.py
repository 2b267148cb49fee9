"""Folders that cannot be exported are refused in one line, which names the reason and what is legal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ibnorm_export import NormConfig, models
from ibnorm_export.errors import CheckpointError, SpecError
from ibnorm_export.op.spec import IBNormSpec

SECTION = {"compression": "L", "lambda": 2.0, "epsilon": 1e-5, "convention": "divide", "bias": False}
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 16,
    "max_position_embeddings": 32,
}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}


def folder(where: Path, **config: Any) -> Path:
    """A checkpoint with these settings; None removes one."""
    settings = {name: value for name, value in {"ibnorm": SECTION, **SMALL, **config}.items() if value is not None}
    (where / "config.json").write_text(json.dumps(settings))
    save_file({"a": torch.zeros(1)}, where / "model.safetensors")
    return where


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "whale"}, ("'whale'", "causal language models (llama,", "encoders (bert,", "--model")),
        ({"model_type": "whale", "auto_map": {"AutoModel": "code.Whale"}}, ("auto_map", "never runs code")),
        ({"model_type": "t5", "is_encoder_decoder": True}, ("encoder with a decoder",)),
        ({"model_type": "mamba"}, ("not a cache of keys and values",)),
        ({"model_type": "qwen3_next"}, ("not a cache of keys and values",)),
        ({"model_type": "mixtral"}, ("some of 8 experts", "dense models")),
        ({"model_type": "mistral", "rope_parameters": DYNAMIC}, ("'dynamic'", "default, linear, llama3, yarn")),
        ({"model_type": "mistral", "quantization_config": {"bits": 4}}, ("quantization_config", "dequantize")),
        ({"model_type": "mistral", "architectures": ["MistralForTokenClassification"]}, ("MistralForCausalLM",)),
        (
            {"model_type": "falcon", "alibi": True, "head_dim": None},  # Falcon derives it
            ("bfloat16 (alibi: true)", "Falcon with rotary positions"),
        ),
        ({"model_type": "bert", "is_decoder": True}, ("is_decoder: true", "encoders")),
        ({"model_type": "gemma2"}, ("Gemma2RMSNorm) multiplies by 1 + weight", '"offset": 1', '"offset": 0')),
    ],
)
def test_reason_in_one_line(config: dict[str, Any], words: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as raised:
        models.load(folder(tmp_path, **config))
    message = str(raised.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_an_encoder_does_not_generate_text(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="bert model, not a causal language model"):
        models.load(folder(tmp_path, model_type="bert"), task="text-generation")


@pytest.mark.parametrize("offset", ["1", True, float("inf")])
def test_an_offset_is_a_finite_number(offset: Any) -> None:
    with pytest.raises(SpecError, match="offset is"):
        NormConfig.from_config({**SECTION, "offset": offset})


def test_an_offset_is_for_the_last_axis() -> None:
    with pytest.raises(SpecError, match="offset is 1 with grouping 'batch'"):
        IBNormSpec("L", offset=1.0, grouping="batch")
    assert NormConfig.from_config({**SECTION, "offset": 1}).to_config()["offset"] == 1.0
    assert "offset" not in NormConfig.from_config(SECTION).to_config()
