"""A checkpoint in the middle of texts."""

from __future__ import annotations

import torch

from ibnorm_export.artifacts.metadata import Task
from ibnorm_export.generation.sessions import SessionSource, torch_sessions
from ibnorm_export.models.loading import load

__all__ = ["checkpoint_sessions"]


def checkpoint_sessions(checkpoint: str, threads: int) -> SessionSource:
    """PyTorch on a checkpoint, as the benchmark opens it; `threads` holds for the whole process."""
    torch.set_num_threads(threads)
    return torch_sessions(load(checkpoint, task=Task.TEXT_GENERATION))
