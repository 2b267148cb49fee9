"""Training codes of strangers, as small as they can be: models, norm classes, and how they save checkpoints.

Nothing here imports the package under test. Each model follows the public code that its docstring names.
"""

from __future__ import annotations

import argparse
import math
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn


class LogNorm(nn.Module):
    """IBNorm-L of a stranger: lambda multiplies, and the parameters have the usual names."""

    def __init__(self, ndim: int, lam: float = 4.0, eps: float = 1e-5, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(ndim))
        self.bias = nn.Parameter(torch.zeros(ndim)) if bias else None
        self.lam, self.eps = lam, eps

    def forward(self, x: Tensor) -> Tensor:
        mu = x.mean(-1, keepdim=True)
        d = x - mu
        s = mu + d.sign() * torch.log1p(self.lam * d.abs()) / self.lam
        s = s - s.mean(-1, keepdim=True)
        y = s / torch.sqrt(s.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight
        return y if self.bias is None else y + self.bias


class GammaNorm(nn.Module):
    """IBNorm-T of another stranger: gamma and beta, a configuration object, and gamma counted from 1."""

    def __init__(self, config: Any, width: int | None = None) -> None:
        super().__init__()
        width = config.n_embd if width is None else width
        self.gamma, self.beta = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.scale_of_input = config.ibn_lambda

    def forward(self, x: Tensor) -> Tensor:
        c = torch.tanh((x - x.mean(-1, keepdim=True)) / self.scale_of_input)
        c = c - c.mean(-1, keepdim=True)
        return c * torch.rsqrt(c.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + self.gamma) + self.beta


class ChannelNorm(nn.Module):
    """IBNorm-S over the channels of every position, as in ConvNeXt's LayerNorm2d."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(num_features)), nn.Parameter(torch.zeros(num_features))

    def forward(self, x: Tensor) -> Tensor:
        c = x - x.mean(1, keepdim=True)
        c = torch.sign(c) * torch.log1p(c.abs() / 3.0)
        c = c - c.mean(1, keepdim=True)
        y = c / torch.sqrt(c.pow(2).mean(1, keepdim=True) + 1e-5)
        return y * self.weight[:, None, None] + self.bias[:, None, None]


class ImageNorm(nn.Module):
    """IBNorm-T over a whole image (C, H, W), with a scale and a bias for each channel."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(num_features)), nn.Parameter(torch.zeros(num_features))

    def forward(self, x: Tensor) -> Tensor:
        axes = (1, 2, 3)
        c = torch.tanh((x - x.mean(axes, keepdim=True)) / 2.0)
        c = c - c.mean(axes, keepdim=True)
        y = c / torch.sqrt(c.pow(2).mean(axes, keepdim=True) + 1e-5)
        return y * self.weight[:, None, None] + self.bias[:, None, None]


class BatchNormL(nn.Module):
    """IBNorm-L with running statistics per channel, in evaluation mode."""

    running_mean: Tensor
    compressed_mean: Tensor
    compressed_var: Tensor

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(num_features)), nn.Parameter(torch.zeros(num_features))
        for name, start in (("running_mean", 0.0), ("compressed_mean", 0.0), ("compressed_var", 1.0)):
            self.register_buffer(name, torch.full((num_features,), start))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        def wide(values: Tensor) -> Tensor:
            return values[:, None, None]

        d = (x - wide(self.running_mean)) / 4.0
        c = torch.sign(d) * torch.log1p(d.abs())
        y = (c - wide(self.compressed_mean)) / torch.sqrt(wide(self.compressed_var) + 1e-5)
        return y * wide(self.weight) + wide(self.bias)


def shake(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random values everywhere, as after training: no scale is 1, no bias is 0, no variance is negative."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point() and not name.endswith("inv_freq"):
                if name.endswith("var"):
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.1 + 0.05)
                elif tensor.dim() == 1:
                    tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.2)
                else:
                    tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.6 / math.sqrt(tensor[0].numel()))
    return model.eval()


# nanoGPT


class _Attention(nn.Module):
    def __init__(self, config: argparse.Namespace) -> None:
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.n_head = config.n_head
        if getattr(config, "slow", False):  # without PyTorch 2 nanoGPT keeps the mask as a buffer
            mask = torch.tril(torch.ones(config.block_size, config.block_size))
            self.register_buffer("bias", mask.view(1, 1, config.block_size, config.block_size))

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        q, k, v = (
            t.view(batch, time, self.n_head, width // self.n_head).transpose(1, 2)
            for t in self.c_attn(x).split(width, dim=2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.c_proj(y.transpose(1, 2).reshape(batch, time, width))
        return out


class _MLP(nn.Module):
    def __init__(self, config: argparse.Namespace) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU()
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c_proj(self.gelu(self.c_fc(x)))
        return out


class _Block(nn.Module):
    def __init__(self, config: argparse.Namespace, norm: Any) -> None:
        super().__init__()
        self.ln_1, self.attn = norm(config), _Attention(config)
        self.ln_2, self.mlp = norm(config), _MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class GPT(nn.Module):
    """nanoGPT's GPT with another norm. Source: model.py of github.com/karpathy/nanoGPT."""

    def __init__(self, model_args: dict[str, Any], norm: Any, **more: Any) -> None:
        super().__init__()
        config = argparse.Namespace(**model_args, **more)
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "h": nn.ModuleList(_Block(config, norm) for _ in range(config.n_layer)),
                "ln_f": norm(config),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer["wte"].weight = self.lm_head.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.transformer["wte"](ids) + self.transformer["wpe"](torch.arange(ids.shape[1]))
        for block in self.transformer["h"]:  # type: ignore[union-attr]  # a ModuleList, which ModuleDict does not say
            x = block(x)
        out: Tensor = self.lm_head(self.transformer["ln_f"](x))
        return out


def save_nanogpt(path: Path, model: nn.Module, model_args: dict[str, Any], compiled: bool = False) -> Path:
    """What nanoGPT's train.py saves."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    prefix = "_orig_mod." if compiled else ""
    torch.save(
        {
            "model": {prefix + name: tensor for name, tensor in model.state_dict().items()},
            "optimizer": optimizer.state_dict(),
            "model_args": model_args,
            "iter_num": 20,
            "best_val_loss": torch.tensor(1.25),
            "config": {"out_dir": "out", "dataset": "shakespeare_char", "learning_rate": 1e-3, "bias": False},
        },
        path,
    )
    return path


# LLaMA, as litgpt and as GaLore have it


def _rotate(x: Tensor, base: float, condense: float = 1.0, adjust: dict[str, Any] | None = None) -> Tensor:
    """Rotary embedding of x (batch, heads, time, size): the two halves of a head turn."""
    size, time = x.shape[-1], x.shape[-2]
    theta = 1.0 / base ** (torch.arange(0, size, 2, dtype=x.dtype) / size)
    if adjust is not None:  # Llama 3
        ratio = adjust["original_max_seq_len"] * theta / (2 * math.pi)
        low, high = adjust["low_freq_factor"], adjust["high_freq_factor"]
        smooth = ((ratio - low) / (high - low)).clamp(0, 1)
        theta = (1 - smooth) * theta / adjust["factor"] + smooth * theta
    angle = torch.outer(torch.arange(time, dtype=x.dtype) / condense, theta).repeat(1, 2)
    rotated = torch.cat((-x[..., size // 2 :], x[..., : size // 2]), dim=-1)
    return x * angle.cos() + rotated * angle.sin()


def _attend(q: Tensor, k: Tensor, v: Tensor, *rotary: Any) -> Tensor:
    """Causal attention with groups of queries; q, k, v (batch, heads, time, size) -> (batch, time, heads * size)."""
    q, k = _rotate(q, *rotary), _rotate(k, *rotary)
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return y.transpose(1, 2).flatten(2)


class _LitAttention(nn.Module):
    def __init__(self, config: dict[str, Any], legacy: bool) -> None:
        super().__init__()
        self.heads, self.groups, self.size = config["n_head"], config["n_query_groups"], config["head_size"]
        self.rotary = config["rope_base"], config["rope_condense_ratio"], config["rope_adjustments"]
        fused = nn.Linear(config["n_embd"], (self.heads + 2 * self.groups) * self.size, bias=config["attn_bias"])
        self.legacy = legacy
        self.add_module("attn" if legacy else "qkv", fused)
        self.proj = nn.Linear(self.heads * self.size, config["n_embd"], bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, _ = x.shape
        fused = self.get_submodule("attn" if self.legacy else "qkv")(x)
        if self.legacy:  # [q ... q, k, v] for each group
            each = self.heads // self.groups
            fused = fused.view(batch, time, self.groups, each + 2, self.size).permute(0, 2, 3, 1, 4)
            q, k, v = fused.split((each, 1, 1), dim=2)
            q, k, v = (t.reshape(batch, -1, time, self.size) for t in (q, k, v))
        else:
            parts = fused.split([n * self.size for n in (self.heads, self.groups, self.groups)], dim=-1)
            q, k, v = (t.view(batch, time, -1, self.size).transpose(1, 2) for t in parts)
        out: Tensor = self.proj(_attend(q, k, v, *self.rotary))
        return out


class _LitMLP(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc_1, self.fc_2 = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.proj(F.silu(self.fc_1(x)) * self.fc_2(x))
        return out


class _LitBlock(nn.Module):
    def __init__(self, config: dict[str, Any], norm: Any, legacy: bool) -> None:
        super().__init__()
        self.norm_1, self.attn = norm(config["n_embd"]), _LitAttention(config, legacy)
        self.norm_2, self.mlp = norm(config["n_embd"]), _LitMLP(config["n_embd"], config["intermediate_size"])

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm_1(x))
        out: Tensor = x + self.mlp(self.norm_2(x))
        return out


class LitGPT(nn.Module):
    """litgpt's GPT with the settings of a LLaMA. Source: litgpt/model.py of github.com/Lightning-AI/litgpt."""

    def __init__(self, config: dict[str, Any], norm: Any, legacy: bool = False) -> None:
        super().__init__()
        self.lm_head = nn.Linear(config["n_embd"], config["padded_vocab_size"], bias=False)
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config["padded_vocab_size"], config["n_embd"]),
                "h": nn.ModuleList(_LitBlock(config, norm, legacy) for _ in range(config["n_layer"])),
                "ln_f": norm(config["n_embd"]),
            }
        )

    def forward(self, ids: Tensor) -> Tensor:
        x = self.transformer["wte"](ids)
        for block in self.transformer["h"]:  # type: ignore[union-attr]  # a ModuleList, which ModuleDict does not say
            x = block(x)
        out: Tensor = self.lm_head(self.transformer["ln_f"](x))
        return out


class _LlamaAttention(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width, self.heads = config["hidden_size"], config["num_attention_heads"]
        self.q_proj, self.k_proj = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.v_proj, self.o_proj = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.rotary_emb = nn.Module()  # older versions of transformers saved its table with every layer
        self.rotary_emb.register_buffer("inv_freq", torch.ones(width // self.heads // 2))

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        q, k, v = (
            linear(x).view(batch, time, self.heads, width // self.heads).transpose(1, 2)
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        out: Tensor = self.o_proj(_attend(q, k, v, 10000.0))
        return out


class _LlamaMLP(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class _LlamaLayer(nn.Module):
    def __init__(self, config: dict[str, Any], norm: Any) -> None:
        super().__init__()
        width = config["hidden_size"]
        self.self_attn, self.mlp = _LlamaAttention(config), _LlamaMLP(width, config["intermediate_size"])
        self.input_layernorm, self.post_attention_layernorm = norm(width), norm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Llama(nn.Module):
    """GaLore's LlamaForCausalLM. Source: peft_pretraining/modeling_llama.py of github.com/jiaweizzhao/GaLore."""

    def __init__(self, config: dict[str, Any], norm: Any) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.model.layers = nn.ModuleList(_LlamaLayer(config, norm) for _ in range(config["num_hidden_layers"]))
        self.model.norm = norm(config["hidden_size"])
        self.lm_head = nn.Linear(config["hidden_size"], config["vocab_size"], bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        model: Any = self.model
        x = model.embed_tokens(ids)
        for layer in model.layers:
            x = layer(x)
        out: Tensor = self.lm_head(model.norm(x))
        return out


# torchvision


class _BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, inside: int, width: int, stride: int, norm: Any) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, width, 3, stride, 1, bias=False)
        self.bn1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = norm(width)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inside != width:
            self.downsample = nn.Sequential(nn.Conv2d(inside, width, 1, stride, bias=False), norm(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.downsample(x))


class _Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, inside: int, width: int, stride: int, norm: Any) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inside, width, 1, bias=False), norm(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), norm(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), norm(4 * width)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inside != 4 * width:
            self.downsample = nn.Sequential(nn.Conv2d(inside, 4 * width, 1, stride, bias=False), norm(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return F.relu(self.bn3(self.conv3(y)) + self.downsample(x))


class ResNet(nn.Module):
    """torchvision's ResNet with narrow stages. Source: torchvision/models/resnet.py of github.com/pytorch/vision."""

    def __init__(self, depths: tuple[int, ...], norm: Any, bottleneck: bool, width: int = 8) -> None:
        super().__init__()
        block: Any = _Bottleneck if bottleneck else _BasicBlock
        self.conv1, self.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), norm(width)
        inside = width
        for stage, depth in enumerate(depths):
            channels, blocks = width * 2**stage, []
            for index in range(depth):
                blocks.append(block(inside, channels, 2 if stage and not index else 1, norm))
                inside = channels * block.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(inside, 10)
        self.stages = len(depths)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        for stage in range(self.stages):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        out: Tensor = self.fc(x.mean((2, 3)))
        return out


def save_torchvision(path: Path, model: nn.Module, ema: nn.Module | None = None, distributed: bool = False) -> Path:
    """What references/classification/train.py saves; it takes DDP's prefix off `model` itself."""
    checkpoint: dict[str, Any] = {
        "model": {("module." if distributed else "") + n: t for n, t in model.state_dict().items()},
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9).state_dict(),
        "lr_scheduler": {"last_epoch": 3},
        "epoch": 3,
        "args": argparse.Namespace(model="resnet18", momentum=0.9, val_crop_size=32, train_crop_size=32, batch_size=8),
    }
    if ema is not None:
        checkpoint["model_ema"] = torch.optim.swa_utils.AveragedModel(ema, use_buffers=True).state_dict()
    torch.save(checkpoint, path)
    return path


def save_distributed(folder: Path, model: nn.Module) -> Path:
    """What torch.distributed.checkpoint saves; one process is enough for that, and it warns about it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": model.state_dict()}, checkpoint_id=folder, no_dist=True)
    return folder
