"""Trace a model in another type without converting its weights, which are read when they are written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import onnx_ir as ir
import torch
from torch import Tensor

from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.module_copy import copy_without_values
from ibnorm_export.graph.weight_tensors import WeightTensor

__all__ = ["read_when_written", "without_conversion"]


def without_conversion(model: LoadedModel, dtype: torch.dtype) -> tuple[LoadedModel, Mapping[int, Tensor]]:
    """Return a copy of the model to trace, whose parameters are in `dtype`.

    Parameters of another type have no values there: the trace needs their shapes only.

    Returns:
        The copy, and the parameters of `model` that it has no values of, by the address of those of the copy.
    """
    module, sources = copy_without_values(model.module, dtype)
    return replace(model, module=module, original=None), sources


def read_when_written(graph: ir.Graph, sources: Mapping[int, Tensor]) -> None:
    """Let every weight of a traced graph be read from the model when it is written.

    Args:
        graph: the graph of `trace`, changed in place.
        sources: from `without_conversion`.
    """
    for value in graph.initializers.values():
        stored = value.const_value
        raw = getattr(stored, "raw", None)
        if stored is not None and isinstance(raw, Tensor):
            source = sources.get(raw.data_ptr(), raw) if raw.numel() else raw
            value.const_value = WeightTensor(source, raw.dtype, name=stored.name)
