"""Inputs from the user: arrays in .npz files, and text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ibnorm_export import parsing
from ibnorm_export.artifacts.axes import PAST, axis_name
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.npz import ArrayHeader, read_npz
from ibnorm_export.artifacts.tensors import Arrays, InputSpec
from ibnorm_export.errors import ModelFileError, quoted, shortened

__all__ = ["read_arrays", "read_inputs"]


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
        raise ModelFileError(f"{path} is not UTF-8 text: {shortened(str(error))}") from error


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
