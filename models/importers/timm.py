"""Checkpoint folders of timm: weights, and a config.json that names an architecture.

timm's own writer adds the `ibnorm` section:
`timm.models.save_for_hf(model, folder, model_config={"ibnorm": {...}}, safe_serialization=True)`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import timm
from torch import Tensor, nn

from ibnorm_export.artifacts.axes import BATCH
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.metadata import Weights
from ibnorm_export.artifacts.tensors import Arrays, InputSpec
from ibnorm_export.errors import CheckpointError, SpecError
from ibnorm_export.models.containers import fit_keys, hash_files, read_checkpoint
from ibnorm_export.models.families.images import images
from ibnorm_export.models.plausible_size import StoredWeights, check_counts
from ibnorm_export.models.weights import fill, nonfinite_warnings, tied_names
from ibnorm_export.op.replace_norms import absorb_offsets, replace_norms
from ibnorm_export.op.spec import NormConfig

__all__ = ["build_timm", "load_timm"]

#: Arguments of timm.create_model itself, not of an architecture. One of them loads a pickle from any path.
_CREATE_MODEL_ARGUMENTS: Final = frozenset(
    name for name in inspect.signature(timm.create_model).parameters if name != "kwargs"
)

#: What timm raises for arguments from which it cannot build a model.
_BUILD_ERRORS: Final = (
    TypeError,
    ValueError,
    AssertionError,
    RuntimeError,
    AttributeError,
    LookupError,
    ZeroDivisionError,
)


def _object(folder: Path, config: Mapping[str, Any], *, key: str) -> dict[str, Any]:
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise CheckpointError(f"{folder / 'config.json'}: {key} is {value!r}; it must be a JSON object")
    return dict(value)


def build_timm(folder: Path, config: Mapping[str, Any]) -> nn.Module:
    """The architecture that a config.json of timm names, with its stock norms and random weights.

    Raises:
        CheckpointError: timm has no such architecture, or cannot build it from `model_args`.
    """
    architecture, arguments = config["architecture"], _object(folder, config, key="model_args")
    if "num_classes" in config:
        arguments.setdefault("num_classes", config["num_classes"])
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        raise CheckpointError(f"{folder / 'config.json'}: timm {timm.__version__} has no architecture {architecture!r}")
    if foreign := sorted(_CREATE_MODEL_ARGUMENTS & arguments.keys()):
        raise CheckpointError(
            f"{folder / 'config.json'}: model_args has {', '.join(foreign)}, which no model accepts: remove it"
        )
    try:
        model: nn.Module = timm.create_model(architecture, pretrained=False, **arguments)
    except _BUILD_ERRORS as error:
        cause = f"{type(error).__name__}: {error}"  # the message of a KeyError is only the key
        raise CheckpointError(f"{folder}: timm cannot build {architecture} from model_args: {cause}") from error
    return model


def _input(folder: Path, config: Mapping[str, Any]) -> InputSpec:
    size = _object(folder, config, key="pretrained_cfg").get("input_size")
    if not isinstance(size, list) or len(size) != 3 or not all(isinstance(n, int) and n > 0 for n in size):
        raise CheckpointError(
            f"{folder / 'config.json'}: pretrained_cfg.input_size is {size!r}; it must be [channels, height, width]"
        )
    return InputSpec("pixel_values", (BATCH, *size), floating=True)


def load_timm(
    folder: Path, config: Mapping[str, Any], *, norms: NormConfig, weights: Weights | None = None
) -> LoadedModel:
    """Read an image classifier of timm: pixel_values (batch, channels, height, width) -> logits (batch, classes).

    Args:
        folder: written by timm's `save_for_hf`, with model.safetensors, pytorch_model.bin or shards of them.
        config: its config.json.
        norms: its `ibnorm` section.
        weights: raw or EMA weights, where the folder has both.

    Raises:
        CheckpointError: architecture, arguments, norms or weights do not fit.
    """
    image = _input(folder, config)
    checkpoint = read_checkpoint(folder, weights=weights)
    check_counts(config, StoredWeights.of_state(checkpoint.state), source=folder / "config.json")
    module = build_timm(folder, config)
    try:
        replace_norms(module, norms)
    except SpecError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    state, stripped = fit_keys(checkpoint.state, module.state_dict().keys(), tied=tied_names(module))
    fill(module, state, source=folder)
    module.eval().requires_grad_(False)
    absorb_offsets(module)

    def call(model: nn.Module, *tensors: Tensor) -> tuple[Tensor, ...]:
        return (model(tensors[0]),)

    def sample(rng: np.random.Generator, index: int) -> Arrays:
        return {image.name: images(image, rng, index=index)}

    return LoadedModel(
        module=module,
        family="timm",
        inputs=(image,),
        outputs=("logits",),
        call=call,
        sample=sample,
        opset=20,  # the first with Gelu, as for ViT
        source=str(folder),
        source_sha256=hash_files([folder / "config.json", *checkpoint.files]),
        section=norms.to_config(),
        warnings=nonfinite_warnings(module),
        notes=(*checkpoint.notes, *stripped),
    )
