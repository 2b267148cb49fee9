"""Architectures whose norms are replaced by IBNorm, and how their checkpoints are read.

Built on transformers' own models: the norms of the stock architecture are replaced
(`ibnorm_export.replace_norms`), the architecture is never forked.
"""

from __future__ import annotations

from ibnorm_export.artifacts.loaded_model import CustomModel, LoadedModel
from ibnorm_export.artifacts.tensors import InputSpec
from ibnorm_export.models.loading import load, measure_statistics, new_model, save
from ibnorm_export.models.registry import FAMILIES, register_adapter

__all__ = [
    "FAMILIES",
    "CustomModel",
    "InputSpec",
    "LoadedModel",
    "load",
    "measure_statistics",
    "new_model",
    "register_adapter",
    "save",
]
