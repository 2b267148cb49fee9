"""Files of four tiny models in every form, with inputs and what PyTorch computes from them in float64."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from ibnorm_export import IBNormSpec, models
from ibnorm_export.artifacts.covering_inputs import fit_sizes
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.loaded_model import LoadedModel, torch_dtype
from ibnorm_export.artifacts.metadata import Task
from ibnorm_export.artifacts.model_limits import find_limits
from ibnorm_export.artifacts.tensors import Arrays, DType
from ibnorm_export.errors import ExportError
from ibnorm_export.exporter.export import export
from ibnorm_export.exporter.options import ExportOptions
from ibnorm_export.runtimes.registry import open_runner
from ibnorm_export.runtimes.runner import Backend, Kernels
from ibnorm_export.runtimes.torch import Float64TorchRunner, TorchRunner
from ibnorm_export.verifier.checkpoint.samples import round_inputs
from tests.support.checkpoints import LLAMA, VIT, save_checkpoint

__all__ = ["FORMS", "HALF_LIMIT", "MODELS", "OVER_PYTORCH", "VARIANTS", "Case", "Form", "limit_of", "make_cases"]

#: Largest relative error of a file in float32, and of one in float16.
HALF_LIMIT = 2e-3
_LIMITS = {DType.FP32: 2e-6, DType.FP16: HALF_LIMIT}

#: float16 may err by this many times what PyTorch does in float16: on an ill-conditioned model that is above the limit.
OVER_PYTORCH = 2.0

_NORMS = {
    "LLaMA": IBNormSpec("L", 4.0, epsilon=1e-5, bias=False),
    "GPT-2": IBNormSpec("S", 4.0, epsilon=1e-5),
    "ViT": IBNormSpec("T", 3.0, epsilon=1e-5),
    "ResNet": IBNormSpec("L", 4.0, epsilon=1e-5),
}
_GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 256}
_RESNET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 16],
    "depths": [1, 1],
    "num_channels": 3,
    "num_labels": 10,
    "layer_type": "basic",
}
_CONFIGS: Mapping[str, Mapping[str, Any]] = {"LLaMA": LLAMA, "GPT-2": _GPT2, "ViT": VIT, "ResNet": _RESNET}
_LANGUAGE = ("LLaMA", "GPT-2")

MODELS = tuple(_CONFIGS)


@dataclass(frozen=True, slots=True)
class Form:
    """A way to export.

    Args:
        name: what the table calls it.
        options: keywords of `ExportOptions`, or of `ExportOptions.with_weights` if `weights` is among them.
        cache: whether the model takes and returns a cache; only language models do.
        expanded: whether the norms are expanded into standard operators.
        runtimes: the runtimes of the table that run it; empty is all.
        rounded: whether the converter of `--target litert` rounds the weights of the file to fp16.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    _: KW_ONLY
    cache: bool = False
    expanded: bool = False
    runtimes: tuple[str, ...] = ()
    rounded: bool = False

    def runs_on(self, runtime: str, version: str) -> bool:
        """Whether a runtime of the table runs it: the name of one, or its name, a hyphen and its version."""
        return not self.runtimes or runtime in self.runtimes or f"{runtime}-{version}" in self.runtimes

    @property
    def built(self) -> ExportOptions:
        """The options of the export."""
        return (ExportOptions.with_weights if "weights" in self.options else ExportOptions)(**self.options)


#: What `--for` is asked to write: options, and whether the file has a cache.
VARIANTS: Mapping[str, tuple[Mapping[str, Any], bool]] = {
    "fp32": ({}, False),
    "fp16": ({"dtype": "fp16"}, False),
    "cache, fp32": ({}, True),
    "cache, fp16": ({"dtype": "fp16"}, True),
    "int8": ({"weights": "int8"}, True),
    "int4": ({"weights": "int4"}, True),
}


def _forms_for(runtime: str, *places: str, expanded: bool) -> Iterator[Form]:
    """The forms that `--for` writes for a runtime, which run in it only."""
    for name, (options, cache) in VARIANTS.items():
        yield Form(
            f"for {runtime}, {name}",
            {"runtime": runtime, **options},
            cache=cache,
            expanded=expanded,
            runtimes=places,
        )


#: The worker knows by this name that it takes the converter's file in fp16.
_ROUNDED_BY_LITERT = Form("for litert, fp16", {"runtime": "litert"}, expanded=True, runtimes=("litert",), rounded=True)


FORMS = {
    form.name: form
    for form in (
        Form("default"),
        Form("opset 18", {"opset": 18}),
        Form("inlined", {"inline": True}, expanded=True),
        Form("inlined, opset 18", {"inline": True, "opset": 18}, expanded=True),
        Form("fp16", {"dtype": "fp16"}),
        Form("fp16, inlined", {"dtype": "fp16", "inline": True}, expanded=True),
        Form("cache", cache=True),
        Form("cache, inlined", {"inline": True}, cache=True, expanded=True),
        Form("int8", {"weights": "int8"}, cache=True),
        Form("int8, inlined", {"weights": "int8", "inline": True}, cache=True, expanded=True),
        Form("int4", {"weights": "int4"}, cache=True),
        Form("int4, inlined", {"weights": "int4", "inline": True}, cache=True, expanded=True),
        *_forms_for("ort>=1.18", "onnxruntime-1.18.1", expanded=False),
        *_forms_for("web", Backend.ORT_WEB, Backend.ORT_NODE, expanded=False),
        *_forms_for("openvino", Backend.OPENVINO, expanded=True),
        *_forms_for("litert", "litert", expanded=True),
        *_forms_for("tvm", "tvm", expanded=True),
        *_forms_for("iree", "iree", expanded=True),
        *_forms_for("mnn", "mnn", expanded=True),
        *_forms_for("tract", "tract", expanded=True),
        _ROUNDED_BY_LITERT,
    )
}


#: Largest error where a runtime rounds the activations of quantised matrices to 8 bits: a step is 1/127 of the largest
#: value of a block, in each of two layers.
_ROUNDED = 5e-2

#: Runtimes that do, on some processors, or in WebGPU for inner sizes that are multiples of 128. The others keep them in
#: float32.
_ROUND_ACTIVATIONS = ("onnxruntime", Backend.ORT_CPU, Backend.ORT_NODE, "ort-webgpu")

#: Largest error of runtimes whose functions are approximations: MNN's erf has an absolute error of about 1e-6.
_APPROXIMATE = {"mnn": 5e-6}


def limit_of(limit: float, form: str, *, runtime: str) -> float:
    """Largest error of a file that is right in a runtime, from the limit of its case."""
    limit = max(limit, _APPROXIMATE.get(runtime, 0.0))
    quantised = "weights" in FORMS[form].options and runtime in _ROUND_ACTIVATIONS
    return max(limit, _ROUNDED) if quantised else limit


@dataclass(frozen=True, slots=True)
class Case:
    """One file: its folder has model.onnx, inputs.npz, expected.npz, valid.npz and case.json.

    Args:
        model, form: of `MODELS` and `FORMS`.
        folder: the folder.
        limit: largest relative error that is right.
        refusal: why there is no file: what the export says; empty if there is one.
    """

    model: str
    form: str
    _: KW_ONLY
    folder: Path
    limit: float
    refusal: str = ""


def make_cases(folder: Path, *, names: tuple[str, ...], forms: tuple[str, ...]) -> Iterator[Case]:
    """Export every model in every form that it has. What is in the folder already is kept.

    Args:
        folder: where the checkpoints and the cases go.
        names: of `MODELS`.
        forms: of `FORMS`.
    """
    for name in names:
        checkpoint = folder / f"{name} checkpoint"
        if not checkpoint.exists():
            save_checkpoint(checkpoint, dict(_CONFIGS[name]), _NORMS[name], seed=0)
        loaded: dict[Task, LoadedModel] = {}
        for form in (FORMS[form] for form in forms):
            if form.cache and name not in _LANGUAGE:
                continue
            place = folder / f"{name}, {form.name}"
            if not (place / "case.json").is_file():
                task = Task.TEXT_GENERATION if form.cache else Task.FORWARD
                if task not in loaded:
                    loaded[task] = models.load(checkpoint, task=task)
                _make(loaded[task], form, place)
            yield Case(name, form.name, folder=place, **json.loads((place / "case.json").read_text(encoding="utf-8")))


def _make(model: LoadedModel, form: Form, place: Path) -> None:
    try:
        if (place / "model.onnx").is_file():
            exported = ExportedModel(place / "model.onnx")
        else:
            exported = export(model, place if form.cache else _within(place), options=form.built)
    except ExportError as error:  # the runtime does not take the model, and the table says why
        place.mkdir(exist_ok=True)
        _write_case(place, limit=0.0, refusal=str(error).replace(f"{model.source} ", "the model "))
        return
    text = any(spec.name == "input_ids" for spec in model.inputs)
    # rows padded on the left, and with a cache also a past; of images a batch of three
    inputs = model.sample(np.random.default_rng(0), 1 if text and not form.cache else 3)
    if exported.metadata.shape:
        inputs = _fitting(model, inputs, exported.metadata.shape)
    inputs = round_inputs(inputs, torch_dtype(exported.dtype))
    if exported.metadata.quantization is None:
        expected = Float64TorchRunner(model, model.truth()).run(inputs)
    else:
        expected = _with_activations_in_float32(exported, inputs)
    valid = {name: np.ones(array.shape, bool) for name, array in expected.items()}
    for name, mask in model.valid(inputs).items():
        valid[name][~mask] = False
    limit = HALF_LIMIT if form.rounded else _LIMITS[exported.dtype]
    if exported.dtype is DType.FP16:
        own = TorchRunner(model, model.in_dtype(torch_dtype(DType.FP16))).run(inputs)
        errors = [np.abs(own[n] - e)[valid[n]].max() / np.abs(e[valid[n]]).max() for n, e in expected.items()]
        limit = max(limit, OVER_PYTORCH * float(max(errors)))
    kinds = {"fp32": np.float32, "fp16": np.float16, "int64": np.int64, "bool": np.bool_}
    given = {tensor.name: inputs[tensor.name].astype(kinds[tensor.dtype]) for tensor in exported.inputs}
    for name, arrays in (("inputs", given), ("expected", expected), ("valid", valid)):
        np.savez(place / f"{name}.npz", **arrays)
    _write_case(place, limit=limit)


def _write_case(place: Path, *, limit: float, refusal: str = "") -> None:
    (place / "case.json").write_text(json.dumps({"limit": limit, "refusal": refusal}), encoding="utf-8")


def _fitting(model: LoadedModel, inputs: Arrays, fixed: Mapping[str, int]) -> Arrays:
    """The inputs with the sizes that a file has fixed."""
    return fit_sizes(model, inputs, limits=find_limits(model, inputs=inputs), fixed=dict(fixed))


def _within(place: Path) -> Path:
    place.mkdir(exist_ok=True)
    return place / "model.onnx"


def _with_activations_in_float32(exported: ExportedModel, inputs: Arrays) -> dict[str, Any]:
    """What ONNX Runtime computes where MatMulNBits leaves activations in float32 (accuracy level 1)."""
    copy = onnx.load(exported.path)
    for node in copy.graph.node:
        if node.op_type == "MatMulNBits":
            kept = [attribute for attribute in node.attribute if attribute.name != "accuracy_level"]
            del node.attribute[:]
            node.attribute.extend([*kept, onnx.helper.make_attribute("accuracy_level", 1)])
    path = exported.path.with_name("float32.onnx")
    onnx.save(copy, path)
    found = open_runner("ort-cpu", ExportedModel(path), kernels=Kernels.FUNCTION).run(inputs)
    return {name: array.astype(np.float64) for name, array in found.items()}
