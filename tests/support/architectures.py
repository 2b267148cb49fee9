"""Tiny checkpoints of stock architectures of transformers, in which a stranger's norms are in place.

The stranger's classes share no code with this package: they are what a user trains with.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 130,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
GROUPED = {**TEXT, "num_key_value_heads": 2}
WINDOW = {"sliding_window": 4}
LAYERS = {"layer_types": ["sliding_attention", "full_attention"]}
PATCHES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
    "num_channels": 3,
    "num_labels": 5,
}


@dataclass(frozen=True)
class Case:
    """An architecture: its config.json, and what a norm of it has."""

    config: dict[str, Any]
    bias: bool = False
    offset: float | None = None


def _text(model_type: str, base: dict[str, Any] = GROUPED, **more: Any) -> dict[str, Any]:
    return {**base, "model_type": model_type, **more}


CAUSAL: dict[str, Case] = {
    "llama": Case(_text("llama")),
    "mistral": Case(_text("mistral", **WINDOW)),
    "qwen2": Case(_text("qwen2", use_sliding_window=True, tie_word_embeddings=True, **WINDOW, **LAYERS)),
    "qwen3": Case(_text("qwen3", head_dim=16)),
    "gemma": Case(_text("gemma", head_dim=16), offset=1.0),
    "gemma2": Case(
        _text("gemma2", head_dim=16, attn_logit_softcapping=5.0, final_logit_softcapping=3.0, **WINDOW, **LAYERS),
        offset=1.0,
    ),
    "gemma3_text": Case(_text("gemma3_text", head_dim=16, **WINDOW, **LAYERS), offset=1.0),
    "olmo2": Case(_text("olmo2")),
    "phi3": Case(_text("phi3", partial_rotary_factor=0.5, **WINDOW)),
    "gpt_neox": Case(_text("gpt_neox", TEXT, rotary_pct=0.5), bias=True),
    "opt": Case(_text("opt", TEXT, ffn_dim=48, word_embed_proj_dim=32), bias=True),
    "bloom": Case(_text("bloom", TEXT, n_layer=2, n_head=4), bias=True),
    "falcon": Case(_text("falcon", TEXT), bias=True),  # by default in parallel, with one head of keys and values
    "gpt2": Case({**TEXT, "model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}, bias=True),
}
ENCODERS: dict[str, Case] = {
    "bert": Case(_text("bert", TEXT), bias=True),
    "roberta": Case(_text("roberta", TEXT, type_vocab_size=1, architectures=["RobertaForMaskedLM"]), bias=True),
    "distilbert": Case(
        {
            "model_type": "distilbert",
            "architectures": ["DistilBertForSequenceClassification"],
            "dim": 32,
            "hidden_dim": 48,
            "n_layers": 2,
            "n_heads": 4,
            "vocab_size": 130,
            "max_position_embeddings": 64,
        },
        bias=True,
    ),
    "electra": Case(
        _text("electra", TEXT, embedding_size=32, architectures=["ElectraForQuestionAnswering"]), bias=True
    ),
    "modernbert": Case(
        _text(
            "modernbert",
            TEXT,
            architectures=["ModernBertForTokenClassification"],
            local_attention=8,
            global_attn_every_n_layers=2,
            cls_token_id=1,
            sep_token_id=2,
        )
    ),
}
IMAGES: dict[str, Case] = {
    "vit": Case({**PATCHES, "model_type": "vit"}, bias=True),
    "deit": Case({**PATCHES, "model_type": "deit", "architectures": ["DeiTForImageClassification"]}, bias=True),
    "swin": Case(
        {
            "model_type": "swin",
            "image_size": 32,
            "patch_size": 4,
            "num_channels": 3,
            "num_labels": 5,
            "embed_dim": 16,
            "depths": [1, 2],
            "num_heads": [2, 4],
            "window_size": 2,
        },
        bias=True,
    ),
    "convnext": Case(
        {
            "model_type": "convnext",
            "image_size": 32,
            "patch_size": 4,
            "num_channels": 3,
            "num_labels": 5,
            "num_stages": 2,
            "hidden_sizes": [16, 32],
            "depths": [1, 1],
        },
        bias=True,
    ),
}
ARCHITECTURES: dict[str, Case] = {**CAUSAL, **ENCODERS, **IMAGES}

#: g(r) of each compression, for r >= 0.
_COMPRESSIONS: dict[str, Callable[[Tensor], Tensor]] = {"S": lambda r: r, "L": torch.log1p, "T": torch.tanh}

LAMBDA, EPSILON = 2.0, 1e-5


class TheirNorm(nn.Module):
    """A stranger's norm: f(r) = g(r / lambda) around the mean, then standardise."""

    def __init__(self, kind: str, size: int, *, bias: bool, offset: float, channels_first: bool) -> None:
        super().__init__()
        self.kind, self.offset, self.channels_first, self.lambd = kind, offset, channels_first, LAMBDA
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1) if self.channels_first else x
        centre = x.mean(-1, keepdim=True)
        s = centre + torch.sign(x - centre) * _COMPRESSIONS[self.kind]((x - centre).abs() / self.lambd)
        s = s - s.mean(-1, keepdim=True)
        y = s / torch.sqrt(s.square().mean(-1, keepdim=True) + EPSILON) * (self.offset + self.weight)
        y = y if self.bias is None else y + self.bias
        return y.permute(0, 3, 1, 2) if self.channels_first else y


def section(case: Case, kind: str) -> dict[str, Any]:
    """The ibnorm section that states what `TheirNorm` computes."""
    offset = {} if case.offset is None else {"offset": case.offset}
    return {
        "compression": kind,
        "lambda": LAMBDA,
        "epsilon": EPSILON,
        "convention": "divide",
        "scale": True,
        "bias": case.bias,
        **offset,
    }


def _stock_class(config: dict[str, Any]) -> Any:
    """The class of a checkpoint, found by hand."""
    import transformers

    if "architectures" in config:
        return getattr(transformers, config["architectures"][0])
    kind = config["model_type"]
    if kind in CAUSAL:
        return transformers.AutoModelForCausalLM
    return transformers.AutoModelForImageClassification if kind in IMAGES else transformers.AutoModel


def save_theirs(name: str, kind: str, folder: Path, **changes: Any) -> Any:
    """Write a checkpoint with random weights to `folder`, and return the stranger's module of it in float64.

    `changes` are further settings of config.json.

    Every parameter is random, also those that a new model has at zero or one: a bias of zero hides that it was dropped.
    """
    import transformers

    case = ARCHITECTURES[name]
    settings = {key: value for key, value in case.config.items() if key not in ("model_type", "architectures")}
    config: Any = transformers.AutoConfig.for_model(case.config["model_type"], **{**settings, **changes})
    config.ibnorm = section(case, kind)
    stock = _stock_class(case.config)
    torch.manual_seed(0)
    module: nn.Module = stock.from_config(config) if hasattr(stock, "from_config") else stock(config)
    for path, norm in list(module.named_modules()):
        if type(norm).__name__.endswith(("RMSNorm", "LayerNorm")):
            assert isinstance(norm.weight, Tensor)
            first = getattr(norm, "data_format", None) == "channels_first"
            own = TheirNorm(kind, len(norm.weight), bias=case.bias, offset=case.offset or 0.0, channels_first=first)
            module.set_submodule(path, own)
    for index, (path, parameter) in enumerate(module.named_parameters()):
        waves = torch.sin(0.7 * torch.arange(parameter.numel(), dtype=torch.float32) + index).reshape(parameter.shape)
        if parameter.dim() == 1:
            centred = path.endswith("norm.weight") and case.offset is None
            parameter.data = waves * 0.3 + (1.0 if centred else 0.1)
        else:
            parameter.data += 0.02 * waves
    saved: Any = module
    saved.save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    assert written["ibnorm"] == config.ibnorm
    return module.double().eval()
