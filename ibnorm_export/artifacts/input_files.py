"""Inputs from the user: arrays in .npz files, text, and tensors in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ibnorm_export import parsing
from ibnorm_export.artifacts.axes import PAST, axis_name
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.npz import ArrayHeader, read_npz
from ibnorm_export.artifacts.tensors import Arrays, InputSpec
from ibnorm_export.errors import ModelFileError, quoted, shortened

__all__ = ["Inputs", "arrays_in_memory", "read_arrays", "read_inputs", "read_text"]

#: Inputs in memory: one tensor, the arguments of `forward` in order, or by name; a sequence of those by name; or, for
#: `from_module`, specs of them.
Inputs = Tensor | np.ndarray[Any, Any] | Sequence[Any] | Mapping[str, Any]


def read_inputs(path: str | Path, model: LoadedModel) -> Arrays:
    """Read inputs of a model from an .npz file; see `read_arrays`."""
    return read_arrays(path, model.inputs)


def read_text(path: str | Path) -> str:
    """Read a UTF-8 text file.

    Raises:
        ModelFileError: the file is missing, unreadable or not UTF-8.
    """
    try:
        return parsing.read_text(Path(path))
    except (OSError, ValueError) as error:
        reason = shortened(str(error))
        raise ModelFileError(
            f"{path} is not UTF-8 text: {reason}; convert it, for example with iconv -t UTF-8"
        ) from error


def read_arrays(path: str | Path, inputs: Sequence[InputSpec]) -> Arrays:
    """Read arrays from an .npz file and check them against the inputs of a model.

    Args:
        path: the .npz file, with one array for each input.
        inputs: what the model takes.

    Returns:
        Arrays by input name, in float32 or int64.

    Raises:
        ModelFileError: the file is missing or damaged, or an array is missing, unexpected, or has the wrong type or
            shape; the message names it.
    """
    arrays = read_npz(path, "an .npz file of plain arrays", check=lambda headers: _check_headers(path, headers, inputs))
    return {spec.name: arrays[spec.name].astype(np.float32 if spec.floating else np.int64) for spec in inputs}


def arrays_in_memory(given: Inputs, inputs: Sequence[InputSpec]) -> list[Arrays]:
    """Samples of a model from tensors or arrays in memory, checked against its inputs.

    Args:
        given: one sample: a tensor or array for a model of one input, a tuple in the order of the inputs, or a dict by
            name. Or several: a sequence of dicts.
        inputs: what the model takes.

    Returns:
        Arrays by input name for each sample, in float32 or int64.

    Raises:
        ModelFileError: nothing is given, or an input is missing, unexpected, or has the wrong type or shape.
    """
    if isinstance(given, Tensor | np.ndarray | Mapping):
        given = [given if isinstance(given, Mapping) else (given,)]
    elif given and not any(isinstance(sample, Mapping) for sample in given):
        given = [given]
    if not given:
        raise ModelFileError("inputs is empty; give at least one set of arrays, or None to draw samples")
    return [_sample(sample, inputs, where=f"inputs[{index}]") for index, sample in enumerate(given)]


def _sample(given: Mapping[str, Any] | Sequence[Any], inputs: Sequence[InputSpec], *, where: str) -> Arrays:
    names = [spec.name for spec in inputs]
    if not isinstance(given, Mapping):
        if len(given) != len(names):
            raise ModelFileError(f"{where} has {len(given)} tensors; the model takes {len(names)}: {quoted(names)}")
        given = dict(zip(names, given, strict=True))
    arrays = {name: _array(value, f"{where}: {shortened(str(name))}") for name, value in given.items()}
    _check_headers(where, {name: ArrayHeader(array.shape, array.dtype) for name, array in arrays.items()}, inputs)
    return {spec.name: arrays[spec.name].astype(np.float32 if spec.floating else np.int64) for spec in inputs}


def _array(value: object, where: str) -> np.ndarray[Any, Any]:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.is_floating_point() else value).numpy()
    if isinstance(value, np.ndarray):
        return value.astype(np.int64) if value.dtype == np.bool_ else value
    raise ModelFileError(f"{where} is {type(value).__name__}; it must be a tensor or an array")


def _check_headers(path: str | Path, headers: Mapping[str, ArrayHeader], inputs: Sequence[InputSpec]) -> None:
    """Compare the names, types and shapes of arrays with the inputs of a model, before the arrays are read."""
    wanted = [spec.name for spec in inputs]
    if sorted(headers) != sorted(wanted):
        raise ModelFileError(f"{path} contains the arrays {quoted(sorted(headers))}; the model takes {wanted}")
    sizes: dict[str, int] = {}
    for spec in inputs:
        header = headers[spec.name]
        kind = np.floating if spec.floating else np.integer
        if not np.issubdtype(header.dtype, kind):
            dtype = shortened(str(header.dtype))
            raise ModelFileError(f"{path}: {spec.name} has dtype {dtype}; it must be {kind.__name__}")
        # The first call of a model with a cache has a past of length 0.
        empty = len(header.shape) == len(spec.shape) and any(
            have == 0 and axis_name(str(want)) != PAST for have, want in zip(header.shape, spec.shape, strict=True)
        )
        if len(header.shape) != len(spec.shape) or empty:
            raise ModelFileError(
                f"{path}: {spec.name} has shape {header.shape}; it must be {spec.shape}, with no axis of size 0"
            )
        for have, want in zip(header.shape, spec.shape, strict=True):
            expected = want if isinstance(want, int) else sizes.setdefault(want, have)
            if have != expected:
                raise ModelFileError(f"{path}: {spec.name} has shape {header.shape}; it must be {spec.shape}")
