"""Architectures whose norms are replaced by IBNorm, and how their checkpoints are read.

The architectures are those of transformers: `ibnorm_export.replace_norms` replaces their norms, and no architecture is
copied.
"""

from __future__ import annotations

from ibnorm_export.artifacts.loaded_model import CustomModel, LoadedModel
from ibnorm_export.artifacts.tensors import InputSpec
from ibnorm_export.models.in_memory import from_module
from ibnorm_export.models.loading import load
from ibnorm_export.models.new_models import measure_statistics, new_model, save
from ibnorm_export.models.registry import FAMILIES, register_adapter

__all__ = [
    "FAMILIES",
    "CustomModel",
    "InputSpec",
    "LoadedModel",
    "from_module",
    "load",
    "measure_statistics",
    "new_model",
    "register_adapter",
    "save",
]
