"""Read a training checkpoint: find its files, open their container, choose the weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ibnorm_export.artifacts.metadata import Weights
from ibnorm_export.choices import choice
from ibnorm_export.errors import CheckpointError
from ibnorm_export.models.containers.checkpoint import TrainingCheckpoint
from ibnorm_export.models.containers.choosing import Leaf, choose_weights
from ibnorm_export.models.containers.dcp import METADATA_FILE, read_distributed
from ibnorm_export.models.containers.folders import weight_files
from ibnorm_export.models.containers.safe_pickle import shown
from ibnorm_export.models.containers.stored_tensors import UnfitTensorError
from ibnorm_export.models.containers.torch_files import read_torch_file

__all__ = ["read_checkpoint"]


def _is_safetensors(path: Path) -> bool:
    """Whether a file starts as safetensors: the length of a JSON object, and the object."""
    if path.suffix == ".safetensors":
        return True
    with path.open("rb") as stream:
        start = stream.read(9)
    return len(start) == 9 and start[8:] == b"{" and 0 < int.from_bytes(start[:8], "little") < path.stat().st_size


def _read_file(path: Path) -> tuple[Any, dict[str, Any]]:
    """The content of one file, and settings in its header."""
    if not _is_safetensors(path):
        return read_torch_file(path), {}
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{path} is truncated or is not safetensors: {error}") from error


def _read_shards(files: list[Path]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors of several files, each with some of a model's."""
    content: dict[str, Any] = {}
    header: dict[str, Any] = {}
    for file in files:
        part, settings = _read_file(file)
        if not isinstance(part, dict):
            raise CheckpointError(f"{file} does not contain a state dict (names to tensors)")
        if twice := sorted(str(name) for name in content.keys() & part.keys()):
            raise CheckpointError(f"{file} has {shown(twice[0])}, which another file of the folder has too")
        content |= part
        header |= settings
    return content, header


def _read(path: Path) -> tuple[Any, dict[str, Any], list[Path]]:
    """The content of a file or folder, the settings in headers, and the files that were read."""
    if not path.is_dir():
        return *_read_file(path), [path]
    if not (path / METADATA_FILE).is_file():
        files = weight_files(path)
        shards = [file for file in files if file.suffix != ".json"]
        return *(_read_file(shards[0]) if len(shards) == 1 else _read_shards(shards)), files
    content, files = read_distributed(path)
    settings = path / "meta.pt"  # Lightning keeps what is not a tensor there
    if settings.is_file() and isinstance(beside := read_torch_file(settings), dict):
        content = {**beside, **content}
        files.append(settings)
    return content, {}, files


def _load(state: Mapping[str, Leaf], source: Path) -> dict[str, Tensor]:
    """The tensors of a state.

    Raises:
        CheckpointError: one is damaged, or no model file can hold it.
    """
    tensors = {}
    for name, leaf in state.items():
        try:
            tensor = leaf if isinstance(leaf, Tensor) else leaf.load()
            if tensor.is_complex():
                raise UnfitTensorError("complex, and ONNX models have real weights")
        except UnfitTensorError as error:
            raise CheckpointError(f"{source}: the tensor {shown(name)} is {shown(error)}") from error
        tensors[name] = tensor
    return tensors


def read_checkpoint(path: str | Path, *, weights: Weights | str | None = None) -> TrainingCheckpoint:
    """Read the weights of a training checkpoint, and the plain data beside them. No code of the file runs.

    Args:
        path: a file of torch.save or safetensors, whatever its name ends in; or a folder of such files with an index,
            or of torch.distributed.checkpoint.
        weights: "raw" or "ema", where the checkpoint has both the weights of the last step and their moving average;
            None takes the only ones that are there.

    Raises:
        CheckpointError: the file is damaged, of another kind, or contains code; or it has both raw and EMA weights
            and `weights` is None, or not those that `weights` names.
    """
    path = Path(path)
    wanted = None if weights is None else choice(Weights, weights, name="weights", error=CheckpointError)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    content, header, files = _read(path)
    chosen = choose_weights(content, source=str(path), weights=wanted)
    return TrainingCheckpoint(_load(chosen.state, path), {**header, **chosen.extras}, chosen.notes, tuple(files))
