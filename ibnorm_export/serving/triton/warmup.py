"""The inputs with which Triton warms a model up before it reports that it is ready."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
import onnx.helper

from ibnorm_export.artifacts.axes import BATCH, CAPACITY, PAST, SEQUENCE, TOTAL
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.input_files import read_arrays
from ibnorm_export.artifacts.kv_cache import input_specs
from ibnorm_export.artifacts.random_inputs import draw_inputs
from ibnorm_export.artifacts.tensors import Arrays

__all__ = ["warmup_file", "warmup_inputs"]

#: Sizes of dynamic axes for random inputs.
_SIZES: Final = {BATCH: 1, SEQUENCE: 8, PAST: 4, TOTAL: 12, CAPACITY: 12}
_ONNX_TYPES: Final = {"bf16": "BFLOAT16", "fp16": "FLOAT16", "fp32": "FLOAT"}


def warmup_inputs(model: ExportedModel, inputs: Arrays | Path | None, *, batched: bool) -> Arrays:
    """Return inputs in the model's own types.

    Args:
        model: the model.
        inputs: inputs by name, an .npz file with them, or None for random ones.
        batched: return only the first row of each.

    Raises:
        ModelFileError: the file cannot be read, or no random inputs can be drawn for the model.
    """
    if inputs is None:
        arrays = draw_inputs(model, _SIZES)
    elif isinstance(inputs, Path):
        arrays = read_arrays(inputs, input_specs(model))
    else:
        arrays = inputs
    converted = {}
    for tensor in model.inputs:
        array = arrays[tensor.name][:1] if batched else arrays[tensor.name]
        if tensor.dtype in _ONNX_TYPES:
            wanted = onnx.helper.tensor_dtype_to_np_dtype(getattr(onnx.TensorProto, _ONNX_TYPES[tensor.dtype]))
            array = array.astype(wanted)
        converted[tensor.name] = np.ascontiguousarray(array)
    return converted


def warmup_file(index: int) -> str:
    """Return the file name for an input, by number, because an input's name may not be a legal file name."""
    return f"{index}.bin"
