"""Read checkpoints: folders of transformers, folders of timm, and state dicts of the user's own code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.input_files import Inputs
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.metadata import Task, Weights
from ibnorm_export.choices import choice
from ibnorm_export.errors import BackendUnavailable, CheckpointError, SpecError
from ibnorm_export.models.containers import read_config
from ibnorm_export.models.custom import load_custom
from ibnorm_export.op.spec import NormConfig

__all__ = ["load"]

_EXAMPLE_SECTION: Final = '"ibnorm": {"compression": "L", "lambda": 4.0, "epsilon": 1e-5, "convention": "divide"}'


def _load_folder(folder: Path, task: Task, *, weights: Weights | None) -> LoadedModel:
    config = read_config(folder)
    if "ibnorm" not in config:
        raise CheckpointError(
            f"{folder / 'config.json'} has no ibnorm section, so its norms are not known; add a section that states "
            f"how the model was trained, for example {_EXAMPLE_SECTION}"
        )
    try:
        norms = NormConfig.from_config(config["ibnorm"])
    except SpecError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from error
    if config.get("model_type") is None and "architecture" in config and task is Task.FORWARD:
        return _load_timm(folder, config, norms=norms, weights=weights)
    from ibnorm_export.models.importers.huggingface import load_huggingface

    return load_huggingface(folder, config, norms=norms, task=task, weights=weights)


def _load_timm(folder: Path, config: Mapping[str, Any], *, norms: NormConfig, weights: Weights | None) -> LoadedModel:
    try:
        from ibnorm_export.models.importers.timm import load_timm
    except ModuleNotFoundError as error:
        raise BackendUnavailable(
            f"{folder} is a timm folder, but {error.name} is not installed: pip install 'ibnorm-export[vision]'"
        ) from error
    except RuntimeError as error:  # torchvision was built for another torch
        raise BackendUnavailable(
            f"{folder} is a timm folder, but timm cannot be imported: {error}. Install the torchvision that "
            f"matches torch {torch.__version__}"
        ) from error
    return load_timm(folder, config, norms=norms, weights=weights)


def load(
    checkpoint: str | Path,
    model: str | None = None,
    *,
    task: Task | str = Task.FORWARD,
    weights: Weights | str | None = None,
    inputs: Inputs | ExportedModel | None = None,
) -> LoadedModel:
    """Read a checkpoint.

    Args:
        checkpoint: a Hugging Face folder with an `ibnorm` section in config.json, or, with `model`,
            a file or folder of weights: safetensors, a file of torch.save (.pt, .pth, .ckpt, .bin, ...), shards with
            an index, or a folder of torch.distributed.checkpoint. No code of it runs.
        model: "package.module:factory" of the user's own code; the factory returns an `nn.Module` or a
            `CustomModel`.
        task: what to load it for.
        weights: "raw" for the weights of the last step or "ema" for their moving average, where the checkpoint has
            both.
        inputs: for a factory that returns an `nn.Module`: example inputs, as for `from_module`, or a file that was
            exported from it.

    Raises:
        CheckpointError: the path, config, code or weights do not make an IBNorm model, or it cannot do
            the task; or it has raw and EMA weights, and `weights` is None. The message states the reason.
    """
    path = Path(checkpoint)
    task = choice(Task, task, name="task", error=CheckpointError)
    chosen = None if weights is None else choice(Weights, weights, name="weights", error=CheckpointError)
    if task is not Task.FORWARD and model is not None:
        raise CheckpointError(f"the task {task} needs a Hugging Face folder; with --model the task must be forward")
    try:
        if not path.exists():
            raise CheckpointError(f"{path} does not exist")
        if model is not None:
            with torch.random.fork_rng(devices=[]):  # the factory draws weights, which are then replaced
                return load_custom(path, model, weights=chosen, inputs=inputs)
        if path.is_dir():
            with torch.random.fork_rng(devices=[]):
                return _load_folder(path, task, weights=chosen)
    except PermissionError as error:
        raise CheckpointError(f"{error.filename or path} cannot be read: permission denied") from error
    if path.suffix == ".onnx":
        raise CheckpointError(f"{path} is an exported file; give the checkpoint that it was exported from")
    raise CheckpointError(
        f"{path} is a file of weights, which do not define the architecture. Give a Hugging Face folder, or add "
        "--model package.module:factory (for evaluate: model= of load in Python, or of [[export]] in check.toml)"
    )
