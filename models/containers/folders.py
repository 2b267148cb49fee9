"""The files of a checkpoint folder: its configuration, its weights and their index."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from ibnorm_export.errors import CheckpointError, listed, printable, quoted, shortened
from ibnorm_export.files import has_file, sha256_of
from ibnorm_export.parsing import read_json

__all__ = ["hash_files", "read_config", "weight_files"]

#: Files of weights as transformers and timm name them, and the endings of others.
_STANDARD_NAMES: Final = ("model.safetensors", "pytorch_model.bin")
_SUFFIXES: Final = (".safetensors", ".pt", ".pth", ".pth.tar", ".ckpt", ".bin")

#: Starts of the names of files that trainers write beside the weights.
_NO_WEIGHTS: Final = (
    "training_args",
    "optimizer",
    "scheduler",
    "scaler",
    "rng_state",
    "random_states",
    "adapter_model",
)


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
        config = read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {shortened(str(error))}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} contains {type(config).__name__}; it must be a JSON object")
    return config


def _indexed(index: Path) -> list[Path]:
    """The files that an index names, after it.

    Raises:
        CheckpointError: the index is damaged, points outside its folder, or names a file that is missing.
    """
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index} is not an index of weight files: {quoted(error)}") from error
    files = []
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{index} points outside its folder: {quoted(name)}")
        if not has_file(index.parent, name):
            raise CheckpointError(f"{index} names {printable(shortened(name))}, which is missing")
        files.append(index.parent / name)
    return [index, *files]


def weight_files(folder: Path) -> list[Path]:
    """The files of weights of a folder, after their index if there is one; each is in the folder.

    The names of transformers come first, safetensors before pickles. Without them, the only file of weights is taken.

    Raises:
        CheckpointError: there are none or several, one is missing, or the index is damaged or points outside the
            folder.
    """
    for name in _STANDARD_NAMES:
        if (folder / name).is_file():
            return [folder / name]
        if (folder / f"{name}.index.json").is_file():
            return _indexed(folder / f"{name}.index.json")
    others = sorted(file for file in folder.iterdir() if _may_be_weights(file))
    if len(others) == 1:
        return others
    raise CheckpointError(_no_weights(folder, others))


def _may_be_weights(file: Path) -> bool:
    return file.name.endswith(_SUFFIXES) and not file.name.startswith(_NO_WEIGHTS) and file.is_file()


def _no_weights(folder: Path, others: list[Path]) -> str:
    """Why a folder has no weights to read, and what to type instead."""
    if others:
        names = listed(file.name for file in others)
        return f"{folder} has {len(others)} files of weights and no index ({names}); give one of them"
    if (folder / "zero_to_fp32.py").is_file() or any(folder.glob("*/zero_pp_rank_*")):
        return f"{folder} is a checkpoint of DeepSpeed in pieces; give the OUTPUT of `python zero_to_fp32.py . OUTPUT`"
    if any(folder.glob("adapter_model.*")):
        return f"{folder} has only an adapter; in your training code, save the result of model.merge_and_unload()"
    steps = sorted(folder.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
    hint = f"; give a checkpoint in it, such as {steps[-1]}" if steps else ""
    return f"{folder} has neither {_STANDARD_NAMES[0]} nor another file of weights{hint}"
