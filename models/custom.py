"""Checkpoints of models that the user's own code defines: a factory builds the model, a state dict has the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.input_files import Inputs
from ibnorm_export.artifacts.loaded_model import CustomModel, LoadedModel
from ibnorm_export.artifacts.metadata import Weights
from ibnorm_export.artifacts.module_copy import copy_module
from ibnorm_export.artifacts.tensors import Arrays, InputSpec
from ibnorm_export.errors import CheckpointError
from ibnorm_export.models.containers import TrainingCheckpoint, fit_keys, hash_files, read_checkpoint
from ibnorm_export.models.in_memory import from_module, from_module_of_file
from ibnorm_export.models.own_norms import replace_own_norms
from ibnorm_export.models.user_code import import_object
from ibnorm_export.models.weights import fill, nonfinite_warnings, tied_names
from ibnorm_export.op.float64_mode import compute_in_float64
from ibnorm_export.text_report import counted

__all__ = ["draw_sample", "filled_model", "load_custom"]


def _import_factory(reference: str) -> Any:
    where = f"--model {reference}"
    malformed = f"--model is {reference!r}; it must be package.module:factory"
    factory = import_object(reference, where=where, malformed=malformed)
    if not callable(factory):
        raise CheckpointError(f"{where}: {reference.partition(':')[2]} is not callable")
    return factory


def _make(reference: str) -> CustomModel | nn.Module:
    """Call the factory and check what it returns."""
    factory = _import_factory(reference)
    try:
        custom = factory()
    except Exception as error:  # the user's own code may raise anything
        raise CheckpointError(f"--model {reference} raised {type(error).__name__}: {error}") from error
    if isinstance(custom, nn.Module):
        return custom
    if not isinstance(custom, CustomModel):
        raise CheckpointError(
            f"--model {reference} returned {type(custom).__name__}; it must return an nn.Module, or an "
            "ibnorm_export.CustomModel, which declares its inputs and outputs"
        )
    names = [*(spec.name for spec in custom.inputs), *custom.outputs, *custom.module.state_dict()]
    if not custom.inputs or not custom.outputs or len(set(names)) < len(names):
        raise CheckpointError(
            f"--model {reference}: inputs are {[spec.name for spec in custom.inputs]}, outputs {list(custom.outputs)}; "
            "there must be at least one of each, and every name must be unique and no weight's name"
        )
    return custom


def _draw(inputs: tuple[InputSpec, ...], rng: np.random.Generator, *, index: int) -> Arrays:
    """Random inputs for a model whose factory gives no `sample`."""
    sizes: dict[str, int] = {}
    arrays: Arrays = {}
    for spec in inputs:
        shape = [n if isinstance(n, int) else sizes.setdefault(n, (2, 1, 5, 3)[index % 4]) for n in spec.shape]
        if spec.floating:
            arrays[spec.name] = rng.standard_normal(shape, dtype=np.float32)
        elif spec.name.endswith("mask") and len(shape) == 2:  # no row is masked throughout
            arrays[spec.name] = np.ones(shape, dtype=np.int64)
            arrays[spec.name][1::2, : shape[1] // 3] = 0
            arrays[spec.name][2::2, shape[1] - shape[1] // 3 :] = 0
        else:
            arrays[spec.name] = rng.integers(0, 2, shape, dtype=np.int64)
    return arrays


def draw_sample(reference: str, custom: CustomModel, *, rng: np.random.Generator, index: int) -> Arrays:
    """The inputs that the user's `sample` returns, checked, or random ones, by name and in order."""
    if custom.sample is None:
        return _draw(custom.inputs, rng, index=index)
    wanted = [spec.name for spec in custom.inputs]
    try:
        arrays: object = custom.sample(rng, index)
    except Exception as error:  # the user's own code may raise anything
        raise CheckpointError(f"--model {reference}: sample raised {type(error).__name__}: {error}") from error
    if not isinstance(arrays, Mapping) or not all(isinstance(arrays.get(name), np.ndarray) for name in wanted):
        returned = type(arrays).__name__
        if isinstance(arrays, Mapping):
            returned = str({name: type(array).__name__ for name, array in arrays.items()})
        raise CheckpointError(
            f"--model {reference}: sample returned {returned}; it must return a dict of NumPy arrays with the keys "
            f"{wanted}"
        )
    return {name: arrays[name] for name in wanted}


def _returned(reference: str, result: object, *, outputs: tuple[str, ...]) -> tuple[Tensor, ...]:
    """The tensors that the user's forward returned, checked: one for each output."""
    tensors = (result,) if isinstance(result, Tensor) else result
    if not isinstance(tensors, (tuple, list)) or not all(isinstance(tensor, Tensor) for tensor in tensors):
        raise CheckpointError(
            f"--model {reference}: forward returned {type(result).__name__}; it must return one tensor or a tuple of "
            f"tensors, for the outputs {list(outputs)}"
        )
    if len(tensors) != len(outputs):
        raise CheckpointError(
            f"--model {reference}: forward returns {counted(len(tensors), 'tensor')} but CustomModel.outputs has "
            f"{counted(len(outputs), 'name')} ({', '.join(outputs)}); give each tensor one name"
        )
    # A parameter that is returned as it is must be copied: in a float64 reference it has no values in memory.
    return tuple(tensor.clone() if isinstance(tensor, nn.Parameter) else tensor for tensor in tensors)


def filled_model(
    path: Path, reference: str, *, weights: Weights | str | None = None
) -> tuple[CustomModel | nn.Module, TrainingCheckpoint, tuple[str, ...]]:
    """What a factory returns, with the weights of a checkpoint; the checkpoint; and notes about its names.

    Args:
        path: a file or a folder of weights.
        reference: "package.module:factory".
        weights: raw or EMA weights, where the checkpoint has both.

    Raises:
        CheckpointError: the factory fails, or its model or the weights are not valid.
    """
    made = _make(reference)
    checkpoint = read_checkpoint(path, weights=weights)
    original = made if isinstance(made, nn.Module) else made.module
    state, stripped = fit_keys(checkpoint.state, original.state_dict().keys(), tied=tied_names(original))
    fill(original, state, source=path)
    return made, checkpoint, stripped


def load_custom(
    path: Path, reference: str, *, weights: Weights | str | None = None, inputs: Inputs | ExportedModel | None = None
) -> LoadedModel:
    """Read a checkpoint of the user's own code; see `ibnorm_export.load`.

    Args:
        path: a file or a folder of weights.
        reference: "package.module:factory".
        weights: raw or EMA weights, where the checkpoint has both.
        inputs: for a factory that returns a plain module: example inputs, or a file that was exported from it.

    Raises:
        CheckpointError: the factory fails, or its model or the weights are not valid.
    """
    made, checkpoint, stripped = filled_model(path, reference, weights=weights)
    if isinstance(made, CustomModel):
        model = _declared(made, reference)
    elif inputs is None:
        raise CheckpointError(
            f"--model {reference} returned {type(made).__name__}, whose inputs are not known: give example inputs with "
            "--inputs FILE.npz (inputs= in Python, inputs in [export.parity] of check.toml), or return an "
            "ibnorm_export.CustomModel"
        )
    elif isinstance(inputs, ExportedModel):
        model = from_module_of_file(made, inputs)
    else:
        model = from_module(made, inputs)
    return replace(
        model,
        source=str(path),
        source_sha256=hash_files(list(checkpoint.files)),
        notes=(*checkpoint.notes, *stripped, *model.notes),
    )


def _declared(custom: CustomModel, reference: str) -> LoadedModel:
    """The model that a factory declares."""
    original = custom.module.eval().requires_grad_(False)
    module = copy_module(original)  # shares the weights
    outputs = custom.outputs

    def call(module: nn.Module, *tensors: Tensor) -> tuple[Tensor, ...]:
        return _returned(reference, module(*tensors), outputs=outputs)

    def run() -> None:
        arrays = draw_sample(reference, custom, rng=np.random.default_rng(0), index=0)
        tensors = [torch.from_numpy(arrays[spec.name]) for spec in custom.inputs]
        try:
            with compute_in_float64(), torch.no_grad():
                module(*tensors)
        except Exception as error:  # the user's own code may raise anything
            raise CheckpointError(
                f"--model {reference}: forward raised {type(error).__name__} on sample 0: {error}"
            ) from error

    notes = replace_own_norms(module, run=run)
    return LoadedModel(
        module=module,
        original=original,
        family="custom",
        inputs=custom.inputs,
        outputs=outputs,
        call=call,
        sample=lambda rng, index: draw_sample(reference, custom, rng=rng, index=index),
        exact=custom.exact,
        opset=custom.opset,
        source=reference,
        source_sha256="",
        warnings=nonfinite_warnings(module),
        notes=notes,
    )
