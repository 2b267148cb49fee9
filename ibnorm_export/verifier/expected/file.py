"""A file of expected values: inputs and outputs that the code which trained the model has saved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from ibnorm_export.artifacts.kv_cache import positions
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.metadata import Task
from ibnorm_export.artifacts.npz import ArrayHeader, read_npz
from ibnorm_export.artifacts.tensors import Arrays, DType, InputSpec
from ibnorm_export.errors import ModelFileError, quoted

__all__ = ["ExpectedValues", "read_expected"]

#: Prefixes that tell inputs from outputs of the same name.
_INPUT: Final = "input."
_OUTPUT: Final = "output."

#: Inputs of a language model that follow from its tokens if the file does not have them.
_DERIVED: Final = ("attention_mask", "position_ids", "past_key_values.")


@dataclass(frozen=True, slots=True)
class ExpectedValues:
    """Inputs, and what the training code computed from them.

    Args:
        path: the file.
        inputs: arrays by input name, in float32 or int64.
        outputs: arrays by output name, in the type in which they were saved.
        dtype: the type that the training code computed in.
    """

    path: Path
    inputs: Arrays
    outputs: Arrays
    dtype: DType


def read_expected(path: str | Path, model: LoadedModel, *, dtype: DType | None = None) -> ExpectedValues:
    """Read expected values of a model.

    Args:
        path: an .npz file of arrays that are called like the inputs and outputs of the model, or "input.NAME" and
            "output.NAME". All inputs and at least one output are there; a language model needs only its tokens.
        model: the model.
        dtype: the type that the training code computed in; None takes the type of the outputs, fp16 or fp32.

    Raises:
        ModelFileError: the file is missing, damaged or pickled; a name, type or shape does not fit the model; or an
            array has NaN or infinity. The message names the array.
    """
    path = Path(path)
    optional = [spec.name for spec in model.inputs if _derived(spec, model)]
    required = [spec.name for spec in model.inputs if spec.name not in optional]
    arrays = read_npz(
        path,
        "an .npz file of plain arrays",
        check=lambda headers: _check_names(path, headers, model=model, required=required),
    )
    inputs, outputs = _split(arrays, model)
    for name, array in (inputs | outputs).items():
        if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
            raise ModelFileError(f"{path}: {name} has NaN or infinity; save inputs on which the model is finite")
    inputs = _complete(inputs, model)
    _check_shapes(path, inputs, model.inputs)
    if dtype is None:
        dtype = DType.FP16 if all(array.dtype == np.float16 for array in outputs.values()) else DType.FP32
    return ExpectedValues(path, inputs, outputs, dtype)


def _derived(spec: InputSpec, model: LoadedModel) -> bool:
    return model.task is Task.TEXT_GENERATION and spec.name.startswith(_DERIVED)


def _names(key: str, model: LoadedModel) -> tuple[str, str]:
    """("input" or "output", name) of an array in the file; ("", key) if the model has no such input or output."""
    inputs, outputs = {spec.name for spec in model.inputs}, set(model.outputs)
    if key in inputs and key not in outputs:
        return "input", key
    if key in outputs and key not in inputs:
        return "output", key
    for kind, prefix, known in (("input", _INPUT, inputs), ("output", _OUTPUT, outputs)):
        if key.startswith(prefix) and key.removeprefix(prefix) in known:
            return kind, key.removeprefix(prefix)
    return "", key


def _check_names(path: Path, headers: Mapping[str, ArrayHeader], *, model: LoadedModel, required: list[str]) -> None:
    """Compare names and types with the model, before any array is read."""
    found = {key: _names(key, model) for key in headers}
    unknown = sorted(key for key, (kind, _) in found.items() if not kind)
    given = {kind: [name for k, name in found.values() if k == kind] for kind in ("input", "output")}
    missing = [name for name in required if name not in given["input"]]
    if unknown or missing or not given["output"]:
        legal = f"it must have the inputs {required} and at least one of the outputs {quoted(list(model.outputs))}"
        raise ModelFileError(f"{path} contains the arrays {quoted(sorted(headers))}; {legal}, under these names")
    for names in given.values():
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ModelFileError(f"{path} contains {twice[0]} twice, with and without a prefix; leave one out")
    floating = {spec.name: spec.floating for spec in model.inputs}
    for key, (kind, name) in found.items():
        dtype = headers[key].dtype
        wanted = np.floating if kind == "output" or floating[name] else np.integer
        boolean = wanted is np.integer and dtype == np.bool_
        if not (np.issubdtype(dtype, wanted) or boolean):
            raise ModelFileError(f"{path}: {key} has dtype {dtype}; it must be {wanted.__name__}")


def _split(arrays: Arrays, model: LoadedModel) -> tuple[Arrays, Arrays]:
    inputs: Arrays = {}
    outputs: Arrays = {}
    floating = {spec.name: spec.floating for spec in model.inputs}
    for key, array in arrays.items():
        kind, name = _names(key, model)
        if kind == "input":
            inputs[name] = array.astype(np.float32 if floating[name] else np.int64)
        else:
            outputs[name] = array
    return inputs, outputs


def _complete(inputs: Arrays, model: LoadedModel) -> Arrays:
    """The inputs in order, those of a language model's cache and positions added."""
    if model.task is Task.TEXT_GENERATION:
        tokens = inputs["input_ids"]
        inputs.setdefault("attention_mask", np.ones_like(tokens))
        inputs.setdefault("position_ids", positions(inputs["attention_mask"])[:, -tokens.shape[-1] :])
        for spec in model.inputs:
            if spec.name not in inputs:
                shape = [len(tokens), *(0 if isinstance(size, str) else size for size in spec.shape[1:])]
                inputs[spec.name] = np.zeros(shape, dtype=np.float32)
    return {spec.name: inputs[spec.name] for spec in model.inputs}


def _check_shapes(path: Path, inputs: Arrays, specs: tuple[InputSpec, ...]) -> None:
    sizes: dict[str, int] = {}
    for spec in specs:
        shape = inputs[spec.name].shape
        fits = len(shape) == len(spec.shape) and all(_axes_fit(shape, spec, sizes))
        if not fits:
            raise ModelFileError(f"{path}: {spec.name} has shape {shape}; it must be {spec.shape}")


def _axes_fit(shape: tuple[int, ...], spec: InputSpec, sizes: dict[str, int]) -> Iterator[bool]:
    for have, want in zip(shape, spec.shape, strict=True):
        yield have == (want if isinstance(want, int) else sizes.setdefault(want, have))
