"""Models with random weights, and checkpoints of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from ibnorm_export.artifacts.tokenizer import TOKENIZER_FILES
from ibnorm_export.errors import CheckpointError
from ibnorm_export.files import new_folder
from ibnorm_export.models.families.family import Family
from ibnorm_export.models.importers.huggingface import quiet_transformers, unknown_model_type, with_norms
from ibnorm_export.models.registry import find_family, preset
from ibnorm_export.op.norm_variants import BatchIBNorm
from ibnorm_export.op.spec import IBNormSpec, NormConfig

if TYPE_CHECKING:  # importing transformers takes seconds, so it is left to the family that needs it
    from transformers import PreTrainedModel

__all__ = ["measure_statistics", "new_model", "save"]

#: Files of a checkpoint that are not written here, and stay.
_KEPT: Final = (*TOKENIZER_FILES, "preprocessor_config.json")


def _sample_tensors(family: Family, model: nn.Module, *, seed: int) -> list[Tensor]:
    arrays = family.sample(model, np.random.default_rng(seed), index=0)
    return [torch.from_numpy(arrays[spec.name]) for spec in family.inputs(model)]


def measure_statistics(model: nn.Module, run: Callable[[], object]) -> None:
    """Set the running statistics of norms to those of one batch.

    Args:
        model: its norms are changed; it keeps its mode.
        run: passes the batch through the model.
    """
    norms = [m for m in model.modules() if isinstance(m, (BatchIBNorm, nn.modules.batchnorm._BatchNorm))]
    if not norms:
        return
    kept = [norm.momentum for norm in norms]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    try:
        with torch.no_grad():
            run()
    finally:
        for module, training in modes:
            module.training = training
        for norm, momentum in zip(norms, kept, strict=True):
            norm.momentum = momentum


def new_model(size: str | Mapping[str, Any], norms: NormConfig | IBNormSpec, *, seed: int = 0) -> PreTrainedModel:
    """Make a model with random weights.

    Args:
        size: a preset of the paper ("llama-60m", "vit-s16", ...) or the settings of a config.json.
        norms: what replaces the stock norms.
        seed: seed of PyTorch's generator, whose state is restored.

    Raises:
        CheckpointError: there is no such preset or family.
    """
    if isinstance(size, str):
        family, config = preset(size)
    else:
        config = dict(size)
        known = find_family(config)
        if known is None:
            raise CheckpointError(unknown_model_type(config))
        family = known
    if isinstance(norms, IBNormSpec):
        norms = NormConfig(norms)
    parsed = family.architecture.config_class(**{k: v for k, v in config.items() if k != "model_type"})
    parsed._attn_implementation = family.attention_of(config)
    parsed.ibnorm = norms.to_config()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = with_norms(family.architecture, norms)(parsed)
    measure_statistics(model, lambda: family.call(model, *_sample_tensors(family, model, seed=seed)))
    return model


def _checkpoint_files(folder: Path) -> set[str]:
    """Names of the files of the checkpoint in `folder`, including its tokenizer."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} exists and is not a checkpoint: choose another folder")
    weights = {path.name for path in folder.glob("model*.safetensors")}
    return {"config.json", "generation_config.json", "model.safetensors.index.json", *weights, *_KEPT}


def save(model: PreTrainedModel, folder: str | Path) -> None:
    """Write a model as a Hugging Face folder, which appears whole or not at all.

    Args:
        model: the result of `new_model`, or the module of a model of `load`.
        folder: the folder to write. An existing checkpoint in it is replaced, but its tokenizer and the
            settings of its image processor stay.

    Raises:
        CheckpointError: the folder contains something other than a checkpoint, or cannot be written.
    """
    folder = Path(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot write the checkpoint {folder}: {error.strerror or error}") from error
    with new_folder(folder, _checkpoint_files, error=CheckpointError) as new:
        for name in _KEPT:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, new / name)
        with quiet_transformers():
            model.save_pretrained(new)
