"""Generate text with a checkpoint, for the benchmark."""

from __future__ import annotations

import torch

from ibnorm_export.artifacts.metadata import Task
from ibnorm_export.generation.sessions import SessionSource, torch_sessions
from ibnorm_export.models.loading import load

__all__ = ["checkpoint_sessions"]


def checkpoint_sessions(checkpoint: str, threads: int) -> SessionSource:
    """Open a checkpoint in PyTorch; `threads` is set for the whole process, which should be the benchmark's own."""
    torch.set_num_threads(threads)
    return torch_sessions(load(checkpoint, task=Task.TEXT_GENERATION))
