"""The folder that an import writes: its architecture, where that has norms, and its files."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ibnorm_export.artifacts.tokenizer import TOKENIZER_FILES
from ibnorm_export.errors import BackendUnavailable, CheckpointError, shortened
from ibnorm_export.files import new_folder
from ibnorm_export.models.importers.huggingface import quiet_transformers, unknown_model_type
from ibnorm_export.models.importers.norm_reading import NormSite
from ibnorm_export.models.registry import find_family
from ibnorm_export.op.replace_norms import norm_features

__all__ = ["MANIFEST", "import_folder", "norm_sites", "write_checkpoint"]

#: What an import records about itself; a folder that has it can be imported again.
MANIFEST: Final = "import.json"

#: Files that an import may write besides the tokenizer.
_FILES: Final = frozenset((MANIFEST, "config.json", "generation_config.json", "model.safetensors"))


def _stock_model(config: Mapping[str, Any], *, source: Path) -> nn.Module:
    """The architecture that config.json names, with its stock norms and without weights.

    Raises:
        CheckpointError: it is unknown, or cannot be built from these settings.
    """
    if "architecture" in config:
        try:
            from ibnorm_export.models.importers.timm import build_timm
        except ModuleNotFoundError as error:
            raise BackendUnavailable(
                f"{source} is a checkpoint of timm, but {error.name} is not installed: "
                "pip install 'ibnorm-export[vision]'"
            ) from error
        return build_timm(source, config)
    family = find_family(config)
    if family is None:
        raise CheckpointError(f"{source}: {unknown_model_type(config)}")
    family.check(config)
    try:
        parsed = family.architecture.config_class(**{k: v for k, v in config.items() if k != "model_type"})
        parsed._attn_implementation = family.attention_of(config)
        with torch.device("meta"), quiet_transformers():
            model: nn.Module = family.architecture(parsed)
    except Exception as error:  # transformers raises its own kinds for each illegal setting
        raise CheckpointError(
            f"{source}: transformers cannot build a {family.name} from its settings: {shortened(str(error))}"
        ) from error
    return model


def norm_sites(config: Mapping[str, Any], *, source: Path) -> tuple[NormSite, ...]:
    """Where the architecture that config.json names has norms, in the order of the model.

    Args:
        config: config.json.
        source: the checkpoint; messages name it.

    Raises:
        CheckpointError: the architecture is unknown or cannot be built.
        BackendUnavailable: timm is not installed.
    """
    with torch.random.fork_rng(devices=[]):
        model = _stock_model(config, source=source)
    return tuple(NormSite(path, features, first) for path, features, first in norm_features(model))


def _earlier_import(folder: Path) -> set[str]:
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(f"{folder} exists and is not an earlier import: choose another folder")
    return {*_FILES, *TOKENIZER_FILES}


@contextlib.contextmanager
def import_folder(target: Path) -> Iterator[Path]:
    """Give an empty folder that takes the place of `target` at the end of the block.

    Raises:
        CheckpointError: the target has other files than those of an earlier import, or cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot write {target}: {error.strerror or error}") from error
    with new_folder(target, _earlier_import, error=CheckpointError) as new:
        yield new


def write_checkpoint(folder: Path, config: Mapping[str, Any], *, tensors: Mapping[str, Tensor]) -> None:
    """Write config.json and model.safetensors."""
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    apart = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
    save_file(apart, folder / "model.safetensors", metadata={"format": "pt"})


def copy_tokenizer(source: Path, folder: Path) -> tuple[str, ...]:
    """Copy the files of a tokenizer from a folder, or tokenizer.json alone; return their names."""
    files = [source] if source.is_file() else [source / name for name in TOKENIZER_FILES]
    copied = []
    for file in files:
        if file.is_file():
            name = "tokenizer.json" if source.is_file() else file.name
            shutil.copyfile(file, folder / name)
            copied.append(name)
    return tuple(copied)
