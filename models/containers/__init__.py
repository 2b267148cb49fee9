"""What training code saves: weights, settings and wrappers, in every container that is known; all is untrusted data."""

from __future__ import annotations

from ibnorm_export.models.containers.checkpoint import TrainingCheckpoint
from ibnorm_export.models.containers.folders import hash_files, read_config, weight_files
from ibnorm_export.models.containers.keys import fit_keys
from ibnorm_export.models.containers.reading import read_checkpoint

__all__ = [
    "TrainingCheckpoint",
    "fit_keys",
    "hash_files",
    "read_checkpoint",
    "read_config",
    "weight_files",
]
