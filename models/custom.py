"""Checkpoints of the user's own code: a factory that makes the model, and a state dict."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from ibnorm_export.errors import CheckpointError
from ibnorm_export.loaded import CustomModel, LoadedModel
from ibnorm_export.models.registry import adapt
from ibnorm_export.models.weights import fill, hash_files, nonfinite, read_state_dict, weight_files
from ibnorm_export.tensors import Arrays, InputSpec

__all__ = ["load_custom"]


def _import_factory(reference: str) -> Any:
    module_name, _, attribute = reference.partition(":")
    if not module_name or not attribute:
        raise CheckpointError(f"--model is {reference!r}; it must be package.module:factory")
    if "" not in sys.path:
        sys.path.insert(0, "")  # the user's own code lies in the working directory, as for `python -m`
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f"--model {reference}: no module named {error.name!r}; run from the folder that holds it, or install it"
        ) from error
    except Exception as error:  # importing runs the user's own code, which may raise anything
        raise CheckpointError(f"--model {reference}: {type(error).__name__}: {error}") from error
    if not callable(factory):
        raise CheckpointError(f"--model {reference}: {attribute} is not callable")
    return factory


def _make(reference: str) -> CustomModel:
    factory = _import_factory(reference)
    try:
        made = factory()
    except Exception as error:  # the user's own code may raise anything
        raise CheckpointError(f"--model {reference} raised {type(error).__name__}: {error}") from error
    if not isinstance(made, CustomModel):
        raise CheckpointError(
            f"--model {reference} returned {type(made).__name__}; it must return ibnorm_export.models.CustomModel, "
            "which says what the inputs and outputs are"
        )
    return made


def _draw(inputs: tuple[InputSpec, ...], rng: np.random.Generator, index: int) -> Arrays:
    sizes: dict[str, int] = {}
    arrays: Arrays = {}
    for spec in inputs:
        shape = [n if isinstance(n, int) else sizes.setdefault(n, (2, 1, 5, 3)[index % 4]) for n in spec.shape]
        if spec.floating:
            arrays[spec.name] = rng.standard_normal(shape, dtype=np.float32)
        else:
            arrays[spec.name] = rng.integers(0, 2, shape, dtype=np.int64)
    return arrays


def load_custom(path: Path, reference: str) -> LoadedModel:
    """The model of a factory `reference`, with the weights at `path`; see `ibnorm_export.models.load`."""
    made = _make(reference)
    files = [path]
    if path.is_dir():
        files = [file for file in weight_files(path) if file.suffix == ".safetensors"]
    state: dict[str, Tensor] = {}
    for file in files:
        state |= read_state_dict(file)
    module = made.module
    fill(module, state, path)
    adapt(module)
    module.eval().requires_grad_(False)
    outputs = made.outputs

    def call(module: nn.Module, *tensors: Tensor) -> tuple[Tensor, ...]:
        result = module(*tensors)
        return (result,) if isinstance(result, Tensor) else tuple(result)

    return LoadedModel(
        module=module,
        family="custom",
        inputs=made.inputs,
        outputs=outputs,
        call=call,
        sample=made.sample or (lambda rng, index: _draw(made.inputs, rng, index)),
        exact=made.exact,
        opset=made.opset,
        source=str(path),
        source_sha256=hash_files(files),
        warnings=nonfinite(module),
    )
