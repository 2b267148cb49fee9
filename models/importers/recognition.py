"""Read the checkpoint of a training code, and recognise which one wrote it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from ibnorm_export.errors import CheckpointError, listed, shortened
from ibnorm_export.models.containers import read_checkpoint
from ibnorm_export.models.importers import litgpt, nanogpt, torchvision
from ibnorm_export.models.importers.report import ImportKind
from ibnorm_export.models.importers.source import TrainingSource, strip_prefix
from ibnorm_export.parsing import read_yaml

__all__ = ["read_source", "recognise"]

#: Kinds that are containers: what is in them is recognised by the names of the tensors.
_CONTAINERS: Final = (ImportKind.AUTO, ImportKind.LIGHTNING, ImportKind.DCP)

#: By kind, whether the names of tensors are its own.
_RECOGNISED: Final[dict[ImportKind, Callable[[object], bool]]] = {
    ImportKind.NANOGPT: nanogpt.recognise,
    ImportKind.LITGPT: litgpt.recognise,
    ImportKind.TORCHVISION: torchvision.recognise,
    ImportKind.GALORE: lambda state: isinstance(state, dict) and "model.embed_tokens.weight" in state,
}

#: Files that a folder of a training run keeps its weights in, for those that no reader of folders knows.
_WEIGHT_FILES: Final = ("lit_model.pth", "ckpt.pt")


def read_source(source: Path, *, weights: str | None, settings: Mapping[str, Any]) -> TrainingSource:
    """Read a checkpoint, and the configuration files next to it.

    Raises:
        CheckpointError: it does not exist, or cannot be read safely.
    """
    if not source.exists():
        raise CheckpointError(f"{source} does not exist")
    found = read_checkpoint(_weights_path(source), weights=weights)
    folder = source if source.is_dir() else source.parent
    extras = dict(found.extras)
    yaml_file = folder / "model_config.yaml"
    if yaml_file.is_file() and litgpt.recognise(dict(found.state)):
        extras["model_config"] = _read_yaml(yaml_file)
    return TrainingSource(
        source, folder, state=dict(found.state), extras=extras, given=settings, notes=tuple(found.notes)
    )


def _weights_path(source: Path) -> Path:
    """The file or folder that has the weights of a source."""
    if source.is_dir():
        for name in _WEIGHT_FILES:
            if (source / name).is_file():
                return source / name
    return source


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = read_yaml(path)
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} is not valid YAML: {shortened(str(error))}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} contains {type(content).__name__}; it must be a mapping")
    return content


def recognise(source: TrainingSource, kind: ImportKind) -> tuple[ImportKind, TrainingSource]:
    """The training code of a checkpoint, and the checkpoint without a prefix that all its tensors have.

    Raises:
        CheckpointError: it is none that is known, or another than stated.
    """
    wanted = list(_RECOGNISED) if kind in _CONTAINERS else [kind] if kind in _RECOGNISED else []
    if kind is ImportKind.TIMM or (kind in _CONTAINERS and isinstance(source.extras.get("arch"), str)):
        return ImportKind.TIMM, source
    for candidate in wanted:
        stripped = strip_prefix(source.state, _RECOGNISED[candidate])
        if stripped is not None:
            state, note = stripped
            return candidate, replace(source, state=state, notes=(*source.notes, *([note] if note else [])))
    if (source.folder / "config.json").is_file() and kind in (*_CONTAINERS, ImportKind.GALORE):
        return ImportKind.GALORE, source
    raise CheckpointError(_unknown(source, kind))


def _unknown(source: TrainingSource, kind: ImportKind) -> str:
    others = [other for other, recognised in _RECOGNISED.items() if strip_prefix(source.state, recognised) is not None]
    if others:
        return f"{source.path} is a checkpoint of {others[0]}, not of {kind}: use --from {others[0]}"
    known = ", ".join(_RECOGNISED)
    return (
        f"{source.path} has tensors such as {listed(sorted(source.state), 3)}, which are those of no known "
        f"architecture ({known}, or timm with `arch`). Export it with your own code: ibnorm-export export CHECKPOINT "
        "--model package.module:factory"
    )
