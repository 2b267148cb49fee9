"""What every checkpoint has: a config, files of weights, and a model that they must fit."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ibnorm_export.errors import CheckpointError
from ibnorm_export.files import sha256_of

__all__ = ["fill", "hash_files", "nonfinite", "raise_mismatch", "read_config", "read_state_dict", "weight_files"]


def _some(names: list[str]) -> str:
    shown = ", ".join(sorted(names)[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


def raise_mismatch(source: Path, missing: list[str], *, extra: list[str], shapes: list[str]) -> None:
    """Raise CheckpointError where any name or shape does not fit."""
    parts = []
    if missing:
        parts.append(f"{len(missing)} missing ({_some(missing)})")
    if extra:
        parts.append(f"{len(extra)} that the model does not have ({_some(extra)})")
    if shapes:
        parts.append(f"{len(shapes)} of the wrong shape ({_some(shapes)})")
    if parts:
        raise CheckpointError(f"{source}: weights do not fit the model: {'; '.join(parts)}")


def nonfinite(module: nn.Module) -> tuple[str, ...]:
    """A warning where a parameter holds NaN or infinity."""
    bad = [name for name, p in module.named_parameters() if not bool(torch.isfinite(p).all())]
    return (f"NaN or infinity in weights: {_some(bad)}",) if bad else ()


def hash_files(files: list[Path]) -> str:
    """One SHA-256 over the names and contents of files, in hexadecimal."""
    lines = (f"{file.name}\0{sha256_of(file)}\n" for file in sorted(files))
    return sha256_of("".join(lines).encode())


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a Hugging Face folder.

    Raises:
        CheckpointError: the file is missing or is not a JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no config.json; a checkpoint is a Hugging Face folder, or a .safetensors or .pt "
            "file together with --model package.module:factory"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds {type(config).__name__}; it must be a JSON object")
    return config


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, checked to lie in it."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if not index.is_file():
        others = sorted(p.name for p in folder.glob("*.bin"))
        hint = f"; convert {others[0]} to safetensors first" if others else ""
        raise CheckpointError(f"{folder} has neither model.safetensors nor model.safetensors.index.json{hint}")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index} is not an index of safetensors files: {error!r}") from error
    files = []
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{index} points outside its folder: {name!r}")
        if not (folder / name).is_file():
            raise CheckpointError(f"{index} names {name}, which is not there")
        files.append(folder / name)
    return [index, *files]


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Names to tensors, from a .safetensors file or a .pt, .pth or .bin that is weights-only.

    Raises:
        CheckpointError: the file is damaged, of another kind, or carries code.
    """
    if path.suffix == ".safetensors":
        try:
            return cast(dict[str, Tensor], load_file(path))
        except SafetensorError as error:
            raise CheckpointError(f"{path} is truncated or is not safetensors: {error}") from error
    if path.suffix not in (".pt", ".pth", ".bin"):
        raise CheckpointError(f"{path}: a state dict is a .safetensors or .pt file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is not a weights-only pickle, and unpickling anything else runs code that the file carries. "
            "Save `model.state_dict()` alone, best as safetensors"
        ) from error
    except (RuntimeError, EOFError, ValueError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or is not a torch file: {error}") from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(f"{path} does not hold a state dict (names to tensors)")
    return state


def fill(module: nn.Module, state: dict[str, Tensor], *, source: Path) -> None:
    """Load `state` into `module`; tied weights may be there once.

    Raises:
        CheckpointError: a name or shape does not fit; the message names it.
    """
    own = module.state_dict()
    tied: dict[int, list[str]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        tied.setdefault(id(tensor), []).append(name)
    present = {name for names in tied.values() if any(n in state for n in names) for name in names}
    shared = set(state) & set(own)
    raise_mismatch(
        source,
        [name for name in own if name not in present],
        extra=[name for name in state if name not in own],
        shapes=[
            f"{n}: file {tuple(state[n].shape)}, model {tuple(own[n].shape)}"
            for n in shared
            if state[n].shape != own[n].shape
        ],
    )
    module.load_state_dict(state, strict=False)
