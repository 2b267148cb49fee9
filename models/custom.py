"""Checkpoints of the user's own code: a factory that makes the model, and a state dict."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from ibnorm_export.artifacts.loaded_model import CustomModel, LoadedModel
from ibnorm_export.artifacts.tensors import Arrays, InputSpec
from ibnorm_export.errors import CheckpointError
from ibnorm_export.models.containers import hash_files, read_state_dict, weight_files
from ibnorm_export.models.registry import adapt
from ibnorm_export.models.weights import fill, nonfinite

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
    names = [*(spec.name for spec in made.inputs), *made.outputs, *made.module.state_dict()]
    if not made.inputs or not made.outputs or len(set(names)) < len(names):
        raise CheckpointError(
            f"--model {reference}: inputs are {[spec.name for spec in made.inputs]}, outputs {list(made.outputs)}; "
            "there must be one of each at least, and no name twice, nor that of a weight"
        )
    return made


def _draw(inputs: tuple[InputSpec, ...], rng: np.random.Generator, *, index: int) -> Arrays:
    sizes: dict[str, int] = {}
    arrays: Arrays = {}
    for spec in inputs:
        shape = [n if isinstance(n, int) else sizes.setdefault(n, (2, 1, 5, 3)[index % 4]) for n in spec.shape]
        if spec.floating:
            arrays[spec.name] = rng.standard_normal(shape, dtype=np.float32)
        else:
            arrays[spec.name] = rng.integers(0, 2, shape, dtype=np.int64)
    return arrays


def _sampled(reference: str, made: CustomModel, *, rng: np.random.Generator, index: int) -> Arrays:
    """What the user's own `sample` gives, by the names of the inputs and in their order."""
    if made.sample is None:
        return _draw(made.inputs, rng, index=index)
    wanted = [spec.name for spec in made.inputs]
    try:
        arrays: object = made.sample(rng, index)
    except Exception as error:  # the user's own code may raise anything
        raise CheckpointError(f"--model {reference}: sample raised {type(error).__name__}: {error}") from error
    if not isinstance(arrays, Mapping) or not all(isinstance(arrays.get(name), np.ndarray) for name in wanted):
        got = type(arrays).__name__
        if isinstance(arrays, Mapping):
            got = str({name: type(array).__name__ for name, array in arrays.items()})
        raise CheckpointError(f"--model {reference}: sample gave {got}; it must give NumPy arrays by name: {wanted}")
    return {name: arrays[name] for name in wanted}


def _returned(reference: str, result: object, *, outputs: tuple[str, ...]) -> tuple[Tensor, ...]:
    """What the user's own forward returned, as many tensors as there are outputs."""
    tensors = (result,) if isinstance(result, Tensor) else result
    if not isinstance(tensors, (tuple, list)) or not all(isinstance(tensor, Tensor) for tensor in tensors):
        raise CheckpointError(
            f"--model {reference}: forward returned {type(result).__name__}; it must return one tensor or a tuple of "
            f"tensors, for the outputs {list(outputs)}"
        )
    if len(tensors) != len(outputs):
        raise CheckpointError(
            f"--model {reference}: the tensors that forward returns are {len(tensors)}, the names in "
            f"CustomModel.outputs {len(outputs)} ({', '.join(outputs)}); give each tensor one name"
        )
    # a parameter itself is copied: it may be of the kind that takes no memory (`widened`), which is no array
    return tuple(tensor.clone() if isinstance(tensor, nn.Parameter) else tensor for tensor in tensors)


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
    fill(module, state, source=path)
    adapt(module)
    module.eval().requires_grad_(False)
    outputs = made.outputs

    def call(module: nn.Module, *tensors: Tensor) -> tuple[Tensor, ...]:
        return _returned(reference, module(*tensors), outputs=outputs)

    return LoadedModel(
        module=module,
        family="custom",
        inputs=made.inputs,
        outputs=outputs,
        call=call,
        sample=lambda rng, index: _sampled(reference, made, rng=rng, index=index),
        exact=made.exact,
        opset=made.opset,
        source=str(path),
        source_sha256=hash_files(files),
        warnings=nonfinite(module),
    )
