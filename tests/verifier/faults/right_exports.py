"""Right exports of many kinds, 60 of them with hostile weights. Verification must pass all of them.

Each has a number, from which everything about it follows: its family, sizes, norms, form and weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from ibnorm_export import NormConfig, models
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.metadata import CacheKind, Task
from ibnorm_export.artifacts.onnx_file import MODEL_FILE
from ibnorm_export.artifacts.tensors import DType
from ibnorm_export.artifacts.tokenizer import write_byte_tokenizer
from ibnorm_export.exporter.export import ExportOptions
from ibnorm_export.exporter.genai import export_genai
from ibnorm_export.exporter.single_file import export_file
from ibnorm_export.exporter.text_folder import export_folder
from ibnorm_export.findings.code import FindingCode
from ibnorm_export.graph.quantization import Quantization
from ibnorm_export.verifier.report import ParityReport
from ibnorm_export.verifier.verify import VerifyOptions, verify

#: How many there are, and the number of the first with hostile weights.
EXPORTS: Final = 400
FIRST_HOSTILE: Final = 340

_FORMS: Final = {
    "llama": ("forward", "decoder", "static", "genai", "int8", "int4", "inlined"),
    "gpt2": ("forward", "decoder", "int8", "inlined"),
    "vit": ("forward", "forward", "inlined"),
    "resnet": ("forward", "forward", "inlined"),
}

#: Attributes of a norm over which a convolutional network has a choice.
_GROUPINGS: Final[tuple[dict[str, Any], ...]] = ({}, {"grouping": "axes", "axis": 1}, {"grouping": "batch"})

# ---- hostile weights ----

_Change = Callable[[str, torch.nn.Parameter], None]


def _outliers(name: str, parameter: torch.nn.Parameter) -> None:
    parameter.data.view(-1)[::997] *= 1000.0


def _large_projections(name: str, parameter: torch.nn.Parameter) -> None:
    if parameter.dim() > 1 and not any(part in name for part in ("embed", "wte", "wpe", "head", "classifier")):
        parameter.data *= 30.0


def _tiny(name: str, parameter: torch.nn.Parameter) -> None:
    parameter.data *= 1e-4


def _zero_scales(name: str, parameter: torch.nn.Parameter) -> None:
    if parameter.dim() == 1:
        parameter.data[::2] = 0.0


def _large_means(name: str, parameter: torch.nn.Parameter) -> None:
    if "embed" in name or "wte" in name:
        parameter.data += 30.0 * parameter.data.std()


def _unchanged(name: str, parameter: torch.nn.Parameter) -> None:
    """Leave the weights as they are: the sizes are unusual."""


_ONE_HEAD: Final = {
    "llama": {"num_attention_heads": 1, "num_key_value_heads": 1},
    "gpt2": {"n_head": 1},
    "vit": {"num_attention_heads": 1},
    "resnet": {"num_channels": 1},
}
_ONE_LAYER: Final = {
    "llama": {"num_hidden_layers": 1},
    "gpt2": {"n_layer": 1},
    "vit": {"num_hidden_layers": 1},
    "resnet": {"depths": [1], "hidden_sizes": [8]},
}
_ODD: Final = {
    "llama": {
        "hidden_size": 36,
        "intermediate_size": 37,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "vocab_size": 101,
    },
    "gpt2": {"n_embd": 21, "n_head": 3, "n_inner": 29, "vocab_size": 101},
    "vit": {"hidden_size": 15, "num_attention_heads": 3, "intermediate_size": 17, "num_labels": 3},
    "resnet": {"embedding_size": 7, "hidden_sizes": [7, 9], "num_labels": 3, "image_size": 23},
}
_SAME: Final[dict[str, dict[str, Any]]] = {"llama": {}, "gpt2": {}, "vit": {}, "resnet": {}}

#: Settings of each family that differ, and the change of every weight, by what is hostile.
HOSTILE: Final[dict[str, tuple[dict[str, dict[str, Any]], _Change]]] = {
    "outliers of 1000": (_SAME, _outliers),
    "projections 30 times larger": (_SAME, _large_projections),
    "tiny weights": (_SAME, _tiny),
    "zero scales": (_SAME, _zero_scales),
    "large means": (_ONE_LAYER, _large_means),
    "one layer": (_ONE_LAYER, _unchanged),
    "one head": (_ONE_HEAD, _unchanged),
    "odd sizes": (_ODD, _unchanged),
}


# ---- the table ----


@dataclass(frozen=True)
class RightExport:
    """One right export.

    Args:
        number: its number, the seed of its weights.
        family: "llama", "gpt2", "vit" or "resnet".
        form: what is exported: "forward", "decoder", "static" (a cache in place), "genai", "int8", "int4", "inlined".
        dtype: type of the weights.
        config: config.json without the norms.
        norms: its `ibnorm` section.
        fuse_skip: whether residual additions are fused.
        hostile: what is hostile about the weights; empty if nothing is.
    """

    number: int
    family: str
    _: KW_ONLY
    form: str
    dtype: DType
    config: dict[str, Any] = field(repr=False)
    norms: dict[str, Any] = field(repr=False)
    fuse_skip: bool = True
    hostile: str = ""

    def __str__(self) -> str:
        norm = f"{self.norms['compression']} {self.norms['lambda']:g} {self.norms.get('grouping', '')}".rstrip()
        return f"{self.number} {self.family} {self.form} {self.dtype.value} {norm} {self.hostile}".rstrip()


def _draw_config(family: str, rng: np.random.Generator) -> dict[str, Any]:
    """config.json of a tiny model of random sizes."""

    def any_of(*values: Any) -> Any:
        return values[int(rng.integers(len(values)))]

    if family == "llama":
        heads = any_of(2, 4)
        return {
            "model_type": "llama",
            "hidden_size": any_of(16, 32, 64),
            "intermediate_size": any_of(24, 40, 64),
            "num_hidden_layers": any_of(1, 2),
            "num_attention_heads": heads,
            "num_key_value_heads": any_of(1, 2, heads),
            "vocab_size": any_of(128, 256, 300),
            "max_position_embeddings": any_of(48, 64, 160),
            "rope_parameters": {"rope_type": "default", "rope_theta": any_of(10000.0, 500000.0)},
            "tie_word_embeddings": any_of(False, False, True),
            "initializer_range": any_of(0.02, 0.1),
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
    if family == "gpt2":
        return {
            "model_type": "gpt2",
            "n_embd": any_of(16, 32),
            "n_head": any_of(2, 4),
            "n_layer": any_of(1, 2),
            "n_positions": any_of(48, 64, 160),
            "vocab_size": any_of(128, 256),
            "bos_token_id": 0,
            "eos_token_id": 0,
        }
    if family == "vit":
        return {
            "model_type": "vit",
            "hidden_size": any_of(16, 32),
            "intermediate_size": any_of(24, 64),
            "num_hidden_layers": any_of(1, 2),
            "num_attention_heads": any_of(2, 4),
            "image_size": any_of(8, 12),
            "patch_size": any_of(2, 4),
            "num_channels": any_of(1, 3),
            "num_labels": any_of(5, 10),
        }
    kind = any_of("basic", "bottleneck")
    return {
        "model_type": "resnet",
        "layer_type": kind,
        "depths": [1, any_of(1, 2)],
        "hidden_sizes": [16, 32] if kind == "bottleneck" else [8, 16],
        "embedding_size": 8,
        "num_channels": 3,
        "image_size": any_of(16, 24),
        "num_labels": 10,
    }


def right_export(number: int) -> RightExport:
    """The right export of that number; see `EXPORTS`."""
    rng = np.random.default_rng(number)
    family = tuple(_FORMS)[number % 4]
    form = _FORMS[family][number // 4 % len(_FORMS[family])]
    dtype = (DType.FP32, DType.FP16, DType.BF16)[number // 12 % 3]
    config = _draw_config(family, rng)
    norms = {
        "compression": "SLT"[int(rng.integers(3))],
        "lambda": (0.5, 1.0, 2.0, 4.0, 8.0)[int(rng.integers(5))],
        "epsilon": (1e-6, 1e-5, 1e-3)[int(rng.integers(3))],
        "convention": ("divide", "multiply")[int(rng.integers(2))],
        "scale": bool(rng.integers(5)),
        "bias": bool(rng.integers(3)) and family != "llama",
        **(_GROUPINGS[number // 4 % 3] if family == "resnet" else {}),
    }
    hostile = ""
    if number >= FIRST_HOSTILE:
        hostile = tuple(HOSTILE)[(number - FIRST_HOSTILE) % len(HOSTILE)]
        form = "decoder" if form in ("genai", "int8", "int4") else form
        config |= HOSTILE[hostile][0][family]
        family_sizes = {"llama": "num_key_value_heads"}.get(family, "")
        if family_sizes and config["num_attention_heads"] % config[family_sizes]:
            config[family_sizes] = config["num_attention_heads"]
    if form in ("genai", "int8", "int4"):  # heads of 16, and logits that differ; see `QUALITY_BOUNDS`
        wide = {"hidden_size": 64, "initializer_range": 0.2, "vocab_size": 256} if family == "llama" else {}
        config |= wide or {"n_embd": 64, "initializer_range": 0.2, "vocab_size": 256}
    if form in ("int8", "int4"):
        dtype = DType.FP32
        norms["scale"] = True
    return RightExport(
        number,
        family,
        form=form,
        dtype=dtype,
        config=config,
        norms=norms,
        fuse_skip=bool(rng.integers(3)),
        hostile=hostile,
    )


def sharpen(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Let the model predict which token follows each: the bounds on quality are for models as sure as trained ones.

    The residual stream keeps the embedding of a token, to which the head of its follower is made similar.
    """
    embedding = model.get_input_embeddings().weight.data  # type: ignore[operator]  # a method of transformers' models
    head = model.get_output_embeddings().weight.data  # type: ignore[operator]
    embedding.normal_(std=3.0, generator=generator)  # more than the branches add
    if head.data_ptr() != embedding.data_ptr():
        head.copy_(0.1 * embedding.roll(1, dims=0))
        return
    last = [
        parameter for name, parameter in model.named_parameters() if name.endswith(("model.norm.weight", "ln_f.weight"))
    ]
    last[0].data *= 0.1


def _save_checkpoint(case: RightExport, folder: Path) -> None:
    """Random weights, no scale or bias of which is constant."""
    torch.manual_seed(case.number)
    model = models.new_model(case.config, NormConfig.from_config(case.norms))
    generator = torch.Generator().manual_seed(case.number)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        if case.hostile:
            HOSTILE[case.hostile][1](name, parameter)
    if case.form in ("int8", "int4"):
        sharpen(model, generator)
    models.save(model, folder)
    if case.form == "genai":
        write_byte_tokenizer(folder)


def _task(case: RightExport) -> Task:
    cached = case.form in ("decoder", "static", "genai", "int8", "int4")
    return Task.TEXT_GENERATION if cached else Task.FORWARD


def _export(case: RightExport, folder: Path) -> Path:
    """Export the checkpoint in `folder`; return the path of the ONNX file."""
    model = models.load(folder / "checkpoint", task=_task(case))
    if case.form == "genai":
        export_genai(model, folder / "genai", options=ExportOptions(dtype=case.dtype))
        return folder / "genai" / MODEL_FILE
    bits = {"int8": 8, "int4": 4}.get(case.form)
    options = ExportOptions(
        dtype=case.dtype,
        inline=case.form == "inlined",
        fuse_skip=case.fuse_skip,
        quantization=None if bits is None else Quantization(bits),
        cache=CacheKind.STATIC if case.form == "static" else CacheKind.DYNAMIC,
    )
    if case.form == "static":
        export_folder(model, folder / "out", options=options)
        return folder / "out" / MODEL_FILE
    export_file(model, folder / "right.onnx", options=options)
    return folder / "right.onnx"


def make(case: RightExport, folder: Path) -> Path:
    """The path of the ONNX file of a right export. One that is in `folder` already is not made again."""
    made = folder / "made.json"
    if not made.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        _save_checkpoint(case, folder / "checkpoint")
        made.write_text(json.dumps(str(_export(case, folder).relative_to(folder))))
    return folder / str(json.loads(made.read_text()))


def alarms(case: RightExport, folder: Path) -> tuple[tuple[str, ...], bool]:
    """Findings of verification in a right export, each a false alarm; and whether the model does not fit its dtype."""
    file = make(case, folder)
    model = models.load(folder / "checkpoint", task=_task(case))
    report = verify(ExportedModel(file), model, options=VerifyOptions(seed=case.number))
    return false_alarms(report, case.dtype, quantised=case.form in ("int8", "int4"))


def false_alarms(report: ParityReport, dtype: DType, *, quantised: bool) -> tuple[tuple[str, ...], bool]:
    """Findings in a right export, each a false alarm; and whether the model does not fit its dtype.

    A model of hostile weights may not fit half precision: PyTorch itself is then more than 20% off, or infinite. And
    one of random weights may not fit int4 or int8: its predictions change, although the file computes what its own
    matrices say in PyTorch, which every other part of the verdict shows. These findings are right.
    """
    if report:
        return (), False
    half = dtype is not DType.FP32 and any("does not fit this dtype" in f.what for f in report.findings)
    predictions = bool(report.findings) and all(f.code is FindingCode.PREDICTIONS_DIFFER for f in report.findings)
    unfit = half or (quantised and predictions)
    return (() if unfit else tuple(str(f) for f in report.findings) or ("nothing was compared",)), unfit
