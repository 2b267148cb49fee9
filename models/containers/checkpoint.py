"""The content of a training checkpoint, whatever container it was in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

__all__ = ["TrainingCheckpoint"]


@dataclass(frozen=True, slots=True)
class TrainingCheckpoint:
    """The weights of one model, and what was saved beside them.

    Args:
        state: tensors by name, as the training code named them. They are on the CPU; those of large files are mapped,
            so copy a tensor before you change it.
        extras: plain Python data beside the weights, by key: `args`, `model_args`, `config`, `hyper_parameters`,
            `epoch`, ... A namespace is a dict here, a path is text, a number of NumPy or a tensor of one element is a
            number. Other tensors, such as an optimizer's, are left out.
        notes: what was chosen or left out, one sentence each, for the reader of a report.
        files: the files that were read, for a hash of the checkpoint.
    """

    state: Mapping[str, Tensor]
    extras: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()
