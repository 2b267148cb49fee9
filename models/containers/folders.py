"""The files of a checkpoint folder: its configuration, its weights and their index."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ibnorm_export.errors import CheckpointError
from ibnorm_export.files import sha256_of

__all__ = ["hash_files", "read_config", "weight_files"]


def hash_files(files: list[Path]) -> str:
    """Return one SHA-256 of the names and contents of files, in hexadecimal."""
    lines = (f"{file.name}\0{sha256_of(file)}\n" for file in sorted(files))
    return sha256_of("".join(lines).encode())


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json of a Hugging Face folder.

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
        raise CheckpointError(f"{path} contains {type(config).__name__}; it must be a JSON object")
    return config


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, and their index if there is one; each is in the folder.

    Raises:
        CheckpointError: there are none, one is missing, or the index is damaged or points outside the folder.
    """
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
            raise CheckpointError(f"{index} names {name}, which is missing")
        files.append(folder / name)
    return [index, *files]
