"""Read a training checkpoint: find its files, open their container, choose the weights."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ibnorm_export.choices import choice
from ibnorm_export.errors import CheckpointError
from ibnorm_export.models.containers.checkpoint import TrainingCheckpoint, Weights
from ibnorm_export.models.containers.folders import weight_files

__all__ = ["read_checkpoint"]


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is not a weights-only pickle, and loading any other pickle runs code that the file contains. "
            "Save only `model.state_dict()`, preferably as safetensors"
        ) from error
    except (RuntimeError, EOFError, ValueError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or is not a torch file: {error}") from error


def _read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if path.suffix == ".safetensors":
        try:
            return cast(dict[str, Tensor], load_file(path)), {}
        except SafetensorError as error:
            raise CheckpointError(f"{path} is truncated or is not safetensors: {error}") from error
    if path.suffix not in (".pt", ".pth", ".bin", ".ckpt"):
        raise CheckpointError(f"{path} is not a state dict; it must be a .safetensors or .pt file")
    state, extras = _read_torch(path), {}
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            extras = {name: value for name, value in state.items() if name != key}
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(f"{path} does not contain a state dict (names to tensors)")
    return state, extras


def read_checkpoint(path: str | Path, *, weights: Weights | str | None = None) -> TrainingCheckpoint:
    """Read the weights of a training checkpoint, and the plain data beside them. No code of the file runs.

    Args:
        path: a file, or a folder of files.
        weights: "raw" or "ema", where the checkpoint has both the weights of the last step and their moving average;
            None takes the only ones that are there.

    Raises:
        CheckpointError: the file is damaged, of another kind, or contains code; or it has both raw and EMA weights
            and `weights` is None, or not those that `weights` names.
    """
    path = Path(path)
    if weights is not None:
        choice(Weights, weights, name="weights", error=CheckpointError)
    files = weight_files(path) if path.is_dir() else [path]
    state: dict[str, Tensor] = {}
    extras: dict[str, Any] = {}
    for file in files:
        if file.suffix != ".json":
            tensors, beside = _read_file(file)
            state |= tensors
            extras |= beside
    return TrainingCheckpoint(state, extras, (), tuple(files))
