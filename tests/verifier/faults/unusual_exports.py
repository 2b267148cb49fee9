"""Right exports that are unusual: other architectures, code of users, opsets, sizes, tables and settings.

Verification must pass all of them, as it must pass the random ones of `right_exports`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, Final

import onnx
import onnx.helper
import torch
from torch import Tensor, nn

from ibnorm_export import NormConfig, models
from ibnorm_export.api import export
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.metadata import CacheKind, Task
from ibnorm_export.artifacts.tokenizer import write_byte_tokenizer
from ibnorm_export.exporter.export import ExportOptions
from ibnorm_export.graph.quantization import Quantization
from ibnorm_export.verifier.verify import VerifyOptions, verify
from tests.support.architectures import ARCHITECTURES
from tests.support.checkpoints import GPT2, RESNET
from tests.verifier.faults.right_exports import false_alarms, sharpen

__all__ = ["UNUSUAL", "UnusualExport", "unusual_alarms"]

_NORMS: Final[dict[str, Any]] = {"compression": "L", "lambda": 2.0, "epsilon": 1e-5, "convention": "divide"}

_LLAMA: Final[dict[str, Any]] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 130,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_WIDE: Final = {"hidden_size": 64, "initializer_range": 0.2, "vocab_size": 256}
_GPT2: Final[dict[str, Any]] = {**GPT2, "n_embd": 16, "n_head": 2, "vocab_size": 130}
_VIT: Final[dict[str, Any]] = {
    "model_type": "vit",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 3,
    "num_labels": 5,
}
_RESNET: Final[dict[str, Any]] = {**RESNET, "num_labels": 5}

_DEBERTA: Final[dict[str, Any]] = {
    "model_type": "deberta-v2",
    "architectures": ["DebertaV2ForSequenceClassification"],
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 130,
    "max_position_embeddings": 64,
    "relative_attention": True,
    "pos_att_type": ["c2p", "p2c"],
    "max_relative_positions": 16,
    "position_biased_input": False,
    "type_vocab_size": 0,
}

# ---- code of users ----


class _Norm(nn.Module):
    """A user's norm: lambda multiplies, and the variance is unbiased."""

    def __init__(self, size: int, lambd: float = 3.0, epsilon: float = 1e-3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(1.0 + 0.1 * torch.randn(size))
        self.beta = nn.Parameter(0.1 * torch.randn(size))
        self.lambd, self.epsilon = lambd, epsilon

    def forward(self, x: Tensor) -> Tensor:
        d = x - x.mean(-1, keepdim=True)
        c = d.sign() * torch.log1p(self.lambd * d.abs())
        c = c - c.mean(-1, keepdim=True)
        return self.gamma * c / (c.var(-1, keepdim=True) + self.epsilon).sqrt() + self.beta


class _TwoTowers(nn.Module):
    """Two inputs of different sizes, joined; three outputs in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.norm = nn.Linear(7, 12), nn.Linear(5, 12), _Norm(12)

    def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
        a, b = self.norm(self.left(left)), self.norm(self.right(right))
        return {"a": a, "b": b, "similarity": (a * b).sum(-1) / 12.0}


class _MeanOfTokens(nn.Module):
    """A mask of bool, and a mean over the tokens that it leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(50, 16), _Norm(16), nn.Linear(16, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.norm(self.embed(ids))
        weights = mask[..., None].to(hidden.dtype)
        return self.head((hidden * weights).sum(1) / weights.sum(1).clamp(min=1.0))


class _Convolutions(nn.Module):
    """A signal of any length: convolutions, a norm over channels, and a strided pool."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(2, 12, 5, padding=2), nn.Conv1d(12, 12, 3, padding=1, groups=4)
        self.norm = _Norm(12)

    def forward(self, signal: Tensor) -> Tensor:
        hidden = nn.functional.gelu(self.first(signal))
        hidden = self.norm(hidden.transpose(1, 2)).transpose(1, 2)
        return nn.functional.avg_pool1d(self.second(hidden), 2)


class _CrossAttention(nn.Module):
    """Attention of one sequence to another, with nn.MultiheadAttention and a residual norm."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm = nn.MultiheadAttention(16, 4, batch_first=True), _Norm(16, lambd=0.5)

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        seen, _ = self.attention(queries, context, context, need_weights=False)
        return self.norm(queries + seen)


class _Gates(nn.Module):
    """Experts that are weighted, a clamp, a where, and a sum over an einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.gate, self.norm = nn.Parameter(0.3 * torch.randn(3, 10, 10)), nn.Linear(10, 3), _Norm(10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        share = self.gate(x).softmax(-1)
        mixed = torch.einsum("...i,eij,...e->...j", x, self.experts, share)
        kept = torch.where(mixed > 0, mixed, 0.1 * mixed).clamp(-20, 20)
        return self.norm(kept), share


class _Recurrent(nn.Module):
    """The same weights and the same norm five times."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.norm = nn.Linear(9, 9), _Norm(9, epsilon=1e-8)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(5):
            x = x + torch.tanh(self.step(self.norm(x)))
        return x


class _Casts(nn.Module):
    """A user's code that computes its norm in float32 and returns a scaled integer feature too."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm = nn.Linear(6, 20), _Norm(20)

    def forward(self, x: Tensor, kind: Tensor) -> Tensor:
        hidden = self.norm(self.body(x).float()).to(x.dtype)
        return hidden * (1.0 + 0.25 * kind[:, None].to(x.dtype))


class _Fixed(nn.Module):
    """A norm of 300 features, so wide that a function adds up in blocks, without a dynamic axis."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm = nn.Linear(4, 300), _Norm(300)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.body(x)).flatten(1)


class _TimeFirst(nn.Module):
    """Ids by batch and time, and logits by time and batch, as losses of speech take them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(50, 16), _Norm(16), nn.Linear(16, 3)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.norm(self.embed(input_ids))).transpose(0, 1)}


#: The module, example inputs, and dynamic axes of each code; None makes the first axis the batch.
_CODE: Final[dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]], Any]]] = {
    "two towers": (_TwoTowers, lambda: {"left": torch.randn(3, 7), "right": torch.randn(3, 5)}, None),
    "mean of tokens": (
        _MeanOfTokens,
        lambda: {"ids": torch.arange(12).reshape(2, 6), "mask": torch.tensor([[True] * 6, [True] * 4 + [False] * 2])},
        {0: "batch_size", 1: "length"},
    ),
    "convolutions": (
        _Convolutions,
        lambda: {"signal": torch.randn(2, 2, 24)},
        {"signal": {0: "batch_size", 2: "time"}},
    ),
    "cross-attention": (
        _CrossAttention,
        lambda: {"queries": torch.randn(2, 3, 16), "context": torch.randn(2, 7, 16)},
        {"queries": {0: "batch_size", 1: "queries"}, "context": {0: "batch_size", 1: "keys"}},
    ),
    "gates": (_Gates, lambda: {"x": torch.randn(2, 4, 10)}, None),
    "recurrent": (_Recurrent, lambda: {"x": torch.randn(4, 9)}, None),
    "casts": (_Casts, lambda: {"x": torch.randn(3, 6), "kind": torch.tensor([0, 1, 2])}, None),
    "fixed sizes": (_Fixed, lambda: {"x": torch.randn(2, 3, 4)}, {}),
    "time first": (_TimeFirst, lambda: {"input_ids": torch.arange(10).reshape(2, 5)}, {0: "batch_size", 1: "time"}),
}


# ---- the table ----


@dataclass(frozen=True)
class UnusualExport:
    """One right export.

    Args:
        name: what is unusual.
        config: config.json without the norms; a key of `_CODE` for a user's module.
        norms: its `ibnorm` section, where it differs from the usual one.
        task: what it is exported for.
        target: of language models: "portable" or "ort-genai".
        options: how it is exported.
        change: changes the weights of the model.
        rewrite: changes the file as a tool does.
    """

    name: str
    config: dict[str, Any] | str
    _: KW_ONLY
    norms: dict[str, Any] = field(default_factory=dict)
    task: Task = Task.FORWARD
    target: str = "portable"
    options: dict[str, Any] = field(default_factory=dict)
    change: Callable[[nn.Module], object] | None = None
    rewrite: Callable[[onnx.ModelProto], object] | None = None


def _sure(model: nn.Module) -> None:
    sharpen(model, torch.Generator().manual_seed(0))


def _double_precision_of_biases(model: nn.Module) -> None:
    """Biases as large as the values that they are added to."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data += torch.linspace(-3, 3, parameter.numel()).reshape(parameter.shape)


def _weights_as_inputs(proto: onnx.ModelProto) -> None:
    """Every weight is an input with a default, as in old files."""
    for tensor in proto.graph.initializer:
        proto.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))


def _written_sigmoids(proto: onnx.ModelProto) -> None:
    """A sigmoid as 1 / (1 + exp(-x))."""
    make, one = onnx.helper.make_node, onnx.helper.make_tensor("one", onnx.TensorProto.FLOAT, [], [1.0])
    proto.graph.initializer.append(one)
    for node in [node for node in proto.graph.node if node.op_type == "Sigmoid"]:
        place, (name,) = list(proto.graph.node).index(node), node.output
        proto.graph.node.remove(node)
        made = [
            make("Neg", [node.input[0]], [f"{name}/negative"]),
            make("Exp", [f"{name}/negative"], [f"{name}/power"]),
            make("Add", [f"{name}/power", "one"], [f"{name}/sum"]),
            make("Div", ["one", f"{name}/sum"], [name]),
        ]
        for index, new in enumerate(made):
            proto.graph.node.insert(place + index, new)


def _of(name: str, **changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and norms of a stock architecture."""
    case = ARCHITECTURES[name]
    norms = {"bias": case.bias, **({} if case.offset is None else {"offset": case.offset})}
    return {**case.config, "eos_token_id": 2, **changes} if "bos_token_id" in case.config else case.config, norms


def _architecture(name: str, what: str = "", **more: Any) -> UnusualExport:
    config, norms = _of(name, **more.pop("config", {}))
    return UnusualExport(f"{name}{what and ', '}{what}", config, norms={**norms, **more.pop("norms", {})}, **more)


_TEXT: Final = Task.TEXT_GENERATION

UNUSUAL: Final = (
    UnusualExport("opset 18", _LLAMA, norms={"bias": False}, options={"opset": 18}),
    UnusualExport("opset 26", {**_LLAMA, "tie_word_embeddings": True}, norms={"bias": False}, options={"opset": 26}),
    UnusualExport("70,001 tokens", {**_LLAMA, "hidden_size": 8, "vocab_size": 70001}, norms={"bias": False}),
    UnusualExport("lambda 1/1024", _LLAMA, norms={"bias": False, "lambda": 2.0**-10, "epsilon": 1e-12}),
    UnusualExport("lambda 1000, tanh", _LLAMA, norms={"bias": False, "compression": "T", "lambda": 1000.0}),
    UnusualExport("epsilon 0.3", _GPT2, norms={"compression": "S", "epsilon": 0.3, "convention": "multiply"}),
    UnusualExport("neither scale nor bias", _GPT2, norms={"scale": False, "bias": False}, options={"dtype": "fp16"}),
    UnusualExport("twelve layers of 8", {**_GPT2, "n_embd": 8, "n_layer": 12}, options={"dtype": "bf16"}),
    UnusualExport("Relu for GELU", {**_GPT2, "activation_function": "relu"}, task=_TEXT),
    UnusualExport("quick GELU", {**_GPT2, "activation_function": "quick_gelu"}, options={"inline": True}),
    UnusualExport(
        "biases everywhere",
        {**_LLAMA, "attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"},
        norms={"bias": True},
        task=_TEXT,
        change=_double_precision_of_biases,
    ),
    UnusualExport("heads of 10", {**_LLAMA, "head_dim": 10}, norms={"bias": False}, task=_TEXT),
    UnusualExport(
        "llama3 rotary scaling",
        {
            **_LLAMA,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
        norms={"bias": False},
        task=_TEXT,
    ),
    UnusualExport(
        "yarn rotary scaling, bf16",
        {
            **_LLAMA,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
        norms={"bias": False},
        options={"dtype": "bf16"},
    ),
    UnusualExport(
        "fixed batch and sequence",
        _LLAMA,
        norms={"bias": False},
        options={"shape": {"batch_size": 1, "sequence_length": 16}},
    ),
    UnusualExport("a batch of 3 with a cache", _GPT2, task=_TEXT, options={"shape": {"batch_size": 3}}),
    UnusualExport(
        "int8 in blocks of 16",
        {**_LLAMA, **_WIDE},
        norms={"bias": False},
        task=_TEXT,
        options={"quantization": Quantization(8, 16, head_bits=8)},
        change=_sure,
    ),
    UnusualExport(
        "int4 with a head of int8 in blocks of 64",
        {**_LLAMA, **_WIDE},
        norms={"bias": False},
        task=_TEXT,
        options={"quantization": Quantization(4, 64, head_bits=8)},
        change=_sure,
    ),
    UnusualExport(
        "int8, whose head is not quantised",
        {**_GPT2, "n_embd": 64, "vocab_size": 256, "initializer_range": 0.2},
        task=_TEXT,
        options={"quantization": Quantization(8, 32, head_bits=None)},
        change=_sure,
    ),
    UnusualExport(
        "GenAI with a tied head",
        {**_LLAMA, **_WIDE, "tie_word_embeddings": True},
        norms={"bias": False},
        task=_TEXT,
        target="ort-genai",
    ),
    UnusualExport(
        "GenAI in fp16, one head of keys",
        {**_LLAMA, **_WIDE, "num_key_value_heads": 1},
        norms={"bias": False, "lambda": 64.0},
        task=_TEXT,
        target="ort-genai",
        options={"dtype": "fp16", "fuse_skip": False},
    ),
    UnusualExport(
        "a cache in place, fp16",
        {**_LLAMA, "num_hidden_layers": 1},
        norms={"bias": False},
        task=_TEXT,
        options={"dtype": "fp16", "cache": CacheKind.STATIC, "opset": 24},
    ),
    UnusualExport("one patch for the whole image", {**_VIT, "patch_size": 8}, options={"opset": 20}),
    UnusualExport(
        "no bias in queries, SiLU, bf16", {**_VIT, "qkv_bias": False, "hidden_act": "silu"}, options={"dtype": "bf16"}
    ),
    UnusualExport("inlined at opset 19 in fp16", _VIT, options={"dtype": "fp16", "inline": True, "opset": 19}),
    UnusualExport(
        "smaller images in the first stage",
        {**_RESNET, "downsample_in_first_stage": True, "hidden_act": "silu"},
        norms={"grouping": "axes", "axis": 1},
        options={"inline": True},
    ),
    UnusualExport(
        "LayerNorm in the first layer",
        _LLAMA,
        norms={
            "bias": False,
            "layers": [{"match": "*.layers.0.*", "norm": "rmsnorm"}, {"match": "model.norm", "lambda": 9.0}],
        },
    ),
    _architecture("mistral", "a window of 4", task=_TEXT),
    _architecture("gemma2", "capped scores", options={"dtype": "bf16"}),
    _architecture("qwen3", "norms of queries", task=_TEXT),
    _architecture("gpt_neox", "half of each head rotated, fp16", options={"dtype": "fp16"}),
    _architecture("bloom", "slopes for positions", task=_TEXT),
    _architecture("bert", "opset 20", options={"opset": 20}),
    _architecture("modernbert", "local attention"),
    _architecture("swin", "shifted windows", options={"dtype": "fp16"}),
    _architecture("convnext", "norms of channels, inlined", options={"inline": True}),
    *(UnusualExport(f"code: {name}", name) for name in _CODE),
    UnusualExport("code: gates, fp16 and inlined", "gates", options={"dtype": "fp16", "inline": True}),
    UnusualExport("code: cross-attention at opset 18", "cross-attention", options={"opset": 18}),
    _architecture(
        "modernbert",
        "a mean over tokens",
        config={"architectures": ["ModernBertForSequenceClassification"], "classifier_pooling": "mean"},
    ),
    UnusualExport("deberta-v2, relative positions", _DEBERTA),
    UnusualExport("weights that are inputs with a default", _VIT, rewrite=_weights_as_inputs),
    UnusualExport("sigmoids of several nodes", _LLAMA, norms={"bias": False}, rewrite=_written_sigmoids),
)


def _save(case: UnusualExport, folder: Path) -> None:
    """Write a checkpoint with random weights, no scale or bias of which is constant."""
    assert isinstance(case.config, dict)
    norms = {**_NORMS, "scale": True, "bias": True, **case.norms}
    model = models.new_model(case.config, NormConfig.from_config(norms))
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    if case.change is not None:
        case.change(model)
    models.save(model, folder)
    if case.task is Task.TEXT_GENERATION and case.config.get("vocab_size", 0) >= 256:  # it has that many tokens
        write_byte_tokenizer(folder)


def _code(name: str, folder: Path) -> LoadedModel:
    """A user's module, whose weights are the same on every processor."""
    make, inputs, dynamic = _CODE[name]
    weights = folder / "weights.pt"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        module, examples = make(), inputs()
    if weights.is_file():
        module.load_state_dict(torch.load(weights))
    else:
        torch.save(module.state_dict(), weights)
    return models.from_module(module, examples, dynamic=dynamic)


def _made(case: UnusualExport, folder: Path) -> tuple[ExportedModel, LoadedModel]:
    """The file, which is exported unless it is in `folder`, and its model."""
    made = folder / "made.json"
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(case.config, dict) and not (folder / "checkpoint").is_dir():
        _save(case, folder / "checkpoint")
    code = isinstance(case.config, str)
    model = _code(str(case.config), folder) if code else models.load(folder / "checkpoint", task=case.task)
    if not made.is_file():
        single = case.task is Task.FORWARD
        path = folder / ("right.onnx" if single else "out")
        exported = export(model, path, options=ExportOptions(**case.options), target=case.target)
        if case.rewrite is not None:
            proto = onnx.load(exported.path)
            case.rewrite(proto)
            onnx.save(proto, exported.path)
        made.write_text(json.dumps(str(exported.path.relative_to(folder))))
    return ExportedModel(folder / str(json.loads(made.read_text()))), model


def unusual_alarms(case: UnusualExport, folder: Path) -> tuple[tuple[str, ...], bool]:
    """Findings of verification, each a false alarm; and whether the model does not fit its dtype."""
    exported, model = _made(case, folder)
    report = verify(exported, model, options=VerifyOptions(seed=11))
    return false_alarms(report, exported.dtype, quantised="quantization" in case.options)
