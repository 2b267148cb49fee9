"""The right files that faults are planted in: every family, and every form that an export takes."""

from __future__ import annotations

import json
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Final

import torch

from ibnorm_export import IBNormSpec, models
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.metadata import CacheKind, Task
from ibnorm_export.artifacts.onnx_file import MODEL_FILE
from ibnorm_export.artifacts.tensors import DType
from ibnorm_export.artifacts.tokenizer import write_byte_tokenizer
from ibnorm_export.exporter.companions import PREPROCESSOR, WEB_FILES, WEB_FOLDER
from ibnorm_export.exporter.export import ExportOptions
from ibnorm_export.exporter.genai import export_genai
from ibnorm_export.exporter.single_file import export_file
from ibnorm_export.exporter.text_folder import export_folder
from ibnorm_export.exporter.transformers_js import export_transformers_js
from ibnorm_export.graph.quantization import Quantization
from tests.support.checkpoints import GPT2, RESNET, VIT, save_checkpoint
from tests.verifier.faults.right_exports import sharpen

__all__ = ["FORMS", "Form", "form"]

#: Tokens of the longest sequence: more than the 64 tokens, 52 decoded ones and 128 numbers that tables may end at.
POSITIONS: Final = 160

_LLAMA: Final[dict[str, Any]] = {
    "model_type": "llama",
    "hidden_size": 64,  # heads of 16, the smallest that GroupQueryAttention rotates
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2: Final[dict[str, Any]] = {**GPT2, "n_layer": 1, "n_positions": POSITIONS, "initializer_range": 0.2}
_VIT: Final[dict[str, Any]] = {**VIT, "num_hidden_layers": 1, "num_channels": 3}

#: config.json and norm of each checkpoint.
_CHECKPOINTS: Final[dict[str, tuple[dict[str, Any], IBNormSpec]]] = {
    "llama": (_LLAMA, IBNormSpec("L", 4.0, epsilon=1e-5, bias=False)),
    "llama that is sure": (_LLAMA, IBNormSpec("L", 4.0, epsilon=1e-5, bias=False)),
    "gpt2": (_GPT2, IBNormSpec("T", 2.0, epsilon=1e-5)),
    "vit": (_VIT, IBNormSpec("T", 3.0, epsilon=1e-5)),
    "vit with images": (_VIT, IBNormSpec("T", 3.0, epsilon=1e-5)),
    "resnet": (RESNET, IBNormSpec("L", 2.0, epsilon=1e-5)),
    "resnet axes": (RESNET, IBNormSpec("S", 2.0, epsilon=1e-5, grouping="axes", axis=1)),
    "resnet batch": (RESNET, IBNormSpec("L", 2.0, epsilon=1e-5, grouping="batch")),
}


@dataclass(frozen=True)
class _Recipe:
    """How a form is exported from a checkpoint."""

    checkpoint: str
    dtype: DType = DType.FP32
    _: KW_ONLY
    task: Task = Task.FORWARD
    kind: str = "file"
    bits: int = 0
    options: dict[str, Any] = field(default_factory=dict)


_TEXT: Final = Task.TEXT_GENERATION

FORMS: Final[dict[str, _Recipe]] = {
    "llama": _Recipe("llama"),
    "llama fp16": _Recipe("llama", DType.FP16),
    "llama bf16": _Recipe("llama", DType.BF16),
    "llama inlined": _Recipe("llama", kind="inlined"),
    "llama decoder": _Recipe("llama", task=_TEXT, kind="folder"),
    "llama decoder bf16": _Recipe("llama", DType.BF16, task=_TEXT, kind="folder"),
    "llama static": _Recipe("llama", task=_TEXT, kind="static"),
    "llama static fp16": _Recipe("llama", DType.FP16, task=_TEXT, kind="static"),
    "llama genai": _Recipe("llama", task=_TEXT, kind="genai"),
    "llama genai bf16": _Recipe("llama", DType.BF16, task=_TEXT, kind="genai"),
    "llama int8": _Recipe("llama that is sure", task=_TEXT, kind="folder", bits=8),
    "llama int4": _Recipe("llama that is sure", task=_TEXT, kind="folder", bits=4),
    "llama web": _Recipe("llama", task=_TEXT, kind="web"),
    "llama web int8": _Recipe("llama that is sure", task=_TEXT, kind="web", bits=8),
    "llama genai int4": _Recipe("llama that is sure", task=_TEXT, kind="genai", bits=4),
    "llama opset 18": _Recipe("llama", options={"opset": 18}),
    "llama one row": _Recipe("llama", options={"shape": {"batch_size": 1, "sequence_length": 16}}),
    "llama decoder one row": _Recipe("llama", task=_TEXT, options={"shape": {"batch_size": 1}}),
    "llama decoder fp16": _Recipe("llama", DType.FP16, task=_TEXT),
    "llama decoder for OpenVINO": _Recipe("llama", task=_TEXT, options={"runtime": "openvino"}),
    "gpt2": _Recipe("gpt2"),
    "gpt2 bf16": _Recipe("gpt2", DType.BF16),
    "gpt2 decoder": _Recipe("gpt2", task=_TEXT, kind="folder"),
    "gpt2 decoder fp16": _Recipe("gpt2", DType.FP16, task=_TEXT, kind="folder"),
    "gpt2 static": _Recipe("gpt2", task=_TEXT, kind="static"),
    "vit": _Recipe("vit"),
    "vit fp16": _Recipe("vit", DType.FP16),
    "vit bf16": _Recipe("vit", DType.BF16),
    "vit inlined": _Recipe("vit", kind="inlined"),
    "vit web": _Recipe("vit with images", kind="web"),
    "resnet": _Recipe("resnet"),
    "resnet axes": _Recipe("resnet axes"),
    "resnet batch": _Recipe("resnet batch"),
    "resnet batch fp16": _Recipe("resnet batch", DType.FP16),
}


@dataclass(frozen=True)
class Form:
    """A right file.

    Args:
        name: a key of `FORMS`.
        folder: the folder that it is in, with nothing else but its companions.
        file: the ONNX file.
        model: its checkpoint.
        dtype: type of its weights.
    """

    name: str
    folder: Path
    _: KW_ONLY
    file: Path
    model: LoadedModel
    dtype: DType

    @property
    def family(self) -> str:
        """ "llama", "gpt2", "vit" or "resnet"."""
        return self.name.split()[0]


@cache
def form(name: str, folder: Path) -> Form:
    """Export a form to `folder`, or find it there."""
    recipe = FORMS[name]
    checkpoint = folder / f"checkpoint {recipe.checkpoint}"
    if not checkpoint.is_dir():
        config, spec = _CHECKPOINTS[recipe.checkpoint]
        save_checkpoint(checkpoint, config, spec, seed=0)
        if recipe.bits:
            sure = models.load(checkpoint).module
            sharpen(sure, torch.Generator().manual_seed(0))
            models.save(sure, checkpoint)
        if config is _LLAMA:
            write_byte_tokenizer(checkpoint)
        if recipe.kind == "web" and config is _VIT:
            images = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25], "size": {"height": 8, "width": 8}}
            (checkpoint / PREPROCESSOR).write_text(json.dumps(images))
    model = models.load(checkpoint, task=recipe.task)
    place = folder / name
    single = recipe.kind in ("file", "inlined")
    web = f"{WEB_FOLDER}/{WEB_FILES[{8: 'q8', 4: 'q4'}.get(recipe.bits, 'fp32')]}"
    file = place / ("right.onnx" if single else web if recipe.kind == "web" else MODEL_FILE)
    if not file.is_file():
        options = ExportOptions(
            dtype=recipe.dtype,
            inline=True if recipe.kind == "inlined" else None,
            quantization=Quantization(recipe.bits) if recipe.bits else None,
            cache=CacheKind.STATIC if recipe.kind == "static" else CacheKind.DYNAMIC,
            **recipe.options,
        )
        if recipe.kind == "genai":
            export_genai(model, place, options=replace(options, inline=None))
        elif recipe.kind == "web":
            export_transformers_js(model, place, options=[options])
        elif single:
            place.mkdir(exist_ok=True)  # another process may be making the same form
            export_file(model, file, options=options)
        else:
            export_folder(model, place, options=options)
    return Form(name, place, file=file, model=model, dtype=recipe.dtype)
