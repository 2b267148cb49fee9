"""Tables of cosines and sines of rotary positions, as the files of onnxruntime-genai hold them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.onnx_file import read_tensor

__all__ = ["exact_tables", "rotary_frequencies"]

#: Inputs of GroupQueryAttention that are tables, and what they hold.
#: Source: ONNX Runtime, "Contrib operators", GroupQueryAttention.
_TABLES: Final = {7: np.cos, 8: np.sin}


def rotary_frequencies(model: LoadedModel) -> Iterator[tuple[NDArray[np.float64], float]]:
    """The frequencies of each rotary embedding of a model, and the factor of its cosines and sines."""
    for module in model.module.modules():
        frequencies = getattr(module, "inv_freq", None)
        if isinstance(frequencies, torch.Tensor):
            scaling = getattr(module, "attention_scaling", 1.0)
            yield frequencies.double().numpy(), scaling if isinstance(scaling, float) else 1.0


def exact_tables(file: ExportedModel, model: LoadedModel, *, step: float) -> dict[str, NDArray[np.float32]] | None:
    """The tables of a half-precision file in float32, as PyTorch computes them.

    Args:
        file: the file.
        model: its checkpoint.
        step: the relative distance between neighbouring numbers of the file's dtype.

    Returns:
        Tables by name; None if one of them is not a rounded table of the model.
    """
    found: dict[str, NDArray[np.float32]] = {}
    for node in file.proto.graph.node:
        for position, function in _TABLES.items() if node.op_type == "GroupQueryAttention" else ():
            name = node.input[position] if position < len(node.input) else ""
            if not name or name in found:
                continue
            tensor = file.weights.get(name)
            stored: Any = None if tensor is None else read_tensor(tensor, file.path)
            table = None if stored is None or stored.ndim != 2 else _matching(stored, function, model=model, step=step)
            if table is None:
                return None
            found[name] = table
    return found


def _matching(stored: NDArray[Any], function: Any, *, model: LoadedModel, step: float) -> NDArray[np.float32] | None:
    """The table that was rounded to the stored one."""
    for frequencies, scaling in rotary_frequencies(model):
        if stored.shape[1] == len(frequencies):
            angles = np.outer(np.arange(len(stored)), frequencies)
            exact = function(angles) * scaling
            # Angles are computed in float32, so their error grows with the position.
            if (np.abs(stored.astype(np.float64) - exact) <= step * scaling + len(stored) * 2.0**-22).all():
                return np.asarray(exact, dtype=np.float32)
    return None
