"""Random inputs of an exported file, from what it says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.tensors import Arrays
from ibnorm_export.errors import ModelFileError

__all__ = ["draw_inputs"]


def draw_inputs(model: ExportedModel, sizes: Mapping[str, int], *, seed: int = 0) -> Arrays:
    """Random inputs of an exported file for the given sizes of its dynamic axes.

    Integers are below 2 (valid as tokens and as a mask); a mask is all ones.

    Raises:
        ModelFileError: an axis has no size, or an input has a type that cannot be drawn.
    """
    rng = np.random.default_rng(seed)
    arrays: dict[str, Any] = {}
    for tensor in model.inputs:
        shape = []
        for axis in tensor.shape:
            if isinstance(axis, str) and axis not in sizes:
                raise ModelFileError(
                    f"{model.path}: no size is known for axis {axis!r} of {tensor.name}; batch and sequence have one"
                )
            shape.append(sizes[axis] if isinstance(axis, str) else axis)
        if tensor.name == "attention_mask":
            arrays[tensor.name] = np.ones(shape, dtype=np.int64)
        elif tensor.dtype == "int64":
            arrays[tensor.name] = rng.integers(0, 2, shape, dtype=np.int64)
        elif tensor.dtype in ("fp32", "fp16", "bf16"):
            arrays[tensor.name] = rng.standard_normal(shape, dtype=np.float32)
        else:
            raise ModelFileError(f"{model.path}: inputs of type {tensor.dtype} ({tensor.name}) cannot be drawn")
    return arrays
