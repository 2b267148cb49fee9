"""Random inputs for an exported file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ibnorm_export.artifacts.axes import axis_name, axis_sizes
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.tensors import Arrays, DType
from ibnorm_export.errors import ModelFileError, quoted

__all__ = ["draw_inputs"]


def draw_inputs(model: ExportedModel, sizes: Mapping[str, int], *, seed: int = 0) -> Arrays:
    """Draw inputs for an exported file.

    Integers are 0 or 1, which every vocabulary has; attention_mask is all ones.

    Args:
        model: the file.
        sizes: size of every dynamic axis, by name (today's or that of an earlier version); unused ones are ignored.
            An axis that is not there has the size of the example that the export was given.
        seed: seed of the generator.

    Returns:
        Arrays by input name; floating-point inputs are float32.

    Raises:
        ModelFileError: an axis has no size, or an input has an unsupported element type.
    """
    rng = np.random.default_rng(seed)
    arrays: dict[str, Any] = {}
    known = axis_sizes(model.metadata.arguments.get("sizes", {})) | axis_sizes(sizes)
    for tensor in model.inputs:
        shape = []
        for axis in tensor.shape:
            if isinstance(axis, str) and axis_name(axis) not in known:
                raise ModelFileError(
                    f"{model.path}: the dynamic axis {quoted(axis)} of input {quoted(tensor.name)} has no size. With "
                    f"bench, add --shape {axis}=SIZE; with package, add --inputs FILE.npz"
                )
            shape.append(known[axis_name(axis)] if isinstance(axis, str) else axis)
        if tensor.name == "attention_mask":
            arrays[tensor.name] = np.ones(shape, dtype=np.int64)
        elif tensor.dtype == "int64":
            arrays[tensor.name] = rng.integers(0, 2, shape, dtype=np.int64)
        elif tensor.dtype in tuple(DType):
            arrays[tensor.name] = rng.standard_normal(shape, dtype=np.float32)
        else:
            raise ModelFileError(
                f"{model.path}: input {quoted(tensor.name)} has element type {tensor.dtype}; it must be "
                "int64, fp32, fp16 or bf16"
            )
    return arrays
