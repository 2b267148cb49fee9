"""Read and write checkpoints: Hugging Face folders, folders of timm, and state dicts with the user's own code."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.metadata import Task
from ibnorm_export.artifacts.tokenizer import TOKENIZER_FILES
from ibnorm_export.errors import BackendUnavailable, CheckpointError, SpecError
from ibnorm_export.files import new_folder
from ibnorm_export.models.custom import load_custom
from ibnorm_export.models.families.causal import CausalFamily
from ibnorm_export.models.families.family import Family
from ibnorm_export.models.registry import FAMILIES, preset
from ibnorm_export.models.weights import hash_files, nonfinite, raise_mismatch, read_config, weight_files
from ibnorm_export.op.norm_variants import BatchIBNorm
from ibnorm_export.op.replace_norms import replace_norms
from ibnorm_export.op.spec import IBNormSpec, NormConfig

__all__ = ["load", "measure_statistics", "new_model", "read_config", "save"]

#: What transformers raises for settings that do not make a model; its own words name the setting.
_UNBUILDABLE = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    RuntimeError,
    AttributeError,
    ZeroDivisionError,
    StrictDataclassError,
)

_EXAMPLE_SECTION = '"ibnorm": {"compression": "L", "lambda": 4.0, "epsilon": 1e-5, "convention": "divide"}'


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without its progress bars and its report of keys: this module reports them itself."""
    level = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()


def _with_norms(architecture: type[PreTrainedModel], norms: NormConfig) -> type[PreTrainedModel]:
    """The stock architecture, its norms replaced at the end of construction."""

    def __init__(self: PreTrainedModel, config: Any) -> None:  # noqa: N807 - it becomes the class's __init__
        architecture.__init__(self, config)
        replace_norms(self, norms)

    return type(architecture.__name__, (architecture,), {"__init__": __init__, "__module__": architecture.__module__})


def _load_folder(folder: Path, task: Task) -> LoadedModel:
    config = read_config(folder)
    if "ibnorm" not in config:
        raise CheckpointError(
            f"{folder / 'config.json'} has no ibnorm section, so this is not an IBNorm model or it does not say "
            f"which; add one that states how it was trained, for example {_EXAMPLE_SECTION}"
        )
    try:
        norms = NormConfig.from_config(config["ibnorm"])
    except SpecError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from error
    kind = config.get("model_type")
    if kind is None and "architecture" in config and task is Task.FORWARD:
        return _load_timm(folder, config, norms=norms)
    family = FAMILIES.get(str(kind))
    if family is None:
        raise CheckpointError(
            f"{folder / 'config.json'}: model_type is {kind!r}; this version knows {', '.join(FAMILIES)}. "
            "For code of your own use --model package.module:factory"
        )
    if task is Task.TEXT_GENERATION and not isinstance(family, CausalFamily):
        raise CheckpointError(
            f"{folder} is a {kind} model, which is no causal language model: --task text-generation, "
            "--target ort-genai, int8, int4 and `generate` are for those alone"
        )
    if config.get("quantization_config"):
        raise CheckpointError(
            f"{folder / 'config.json'} has a quantization_config: its weights are no floating-point numbers, which an "
            "export and its verification start from. Save the model that it was made of, or what transformers' "
            "model.dequantize() gives; export --dtype int8 or int4 quantizes that"
        )
    files = weight_files(folder)
    try:
        family.check(config)
        with _quiet_transformers():
            model, info = _with_norms(family.architecture, norms).from_pretrained(
                folder,
                attn_implementation=family.attention,
                dtype="auto",
                ignore_mismatched_sizes=True,  # they are reported below, by name
                local_files_only=True,
                output_loading_info=True,
                use_safetensors=True,
            )
    except SafetensorError as error:
        raise CheckpointError(f"{folder}: a weight file is truncated or is not safetensors: {error}") from error
    except SpecError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    except _UNBUILDABLE as error:
        raise CheckpointError(f"{folder}: transformers cannot build a {kind} from it: {error}") from error
    raise_mismatch(
        folder,
        list(info["missing_keys"]),
        extra=list(info["unexpected_keys"]),
        shapes=[f"{key}: file {tuple(there)}, model {tuple(here)}" for key, there, here in info["mismatched_keys"]],
    )
    loaded = _family_model(
        family, model, source=str(folder), source_sha256=hash_files([folder / "config.json", *files]), norms=norms
    )
    if task is Task.TEXT_GENERATION and isinstance(family, CausalFamily):
        return family.with_cache(loaded)
    return loaded


def _load_timm(folder: Path, config: Mapping[str, Any], *, norms: NormConfig) -> LoadedModel:
    try:
        from ibnorm_export.models.importers.timm import load_timm
    except ModuleNotFoundError as error:
        raise BackendUnavailable(
            f"{folder} is a folder of timm, and {error.name} is not installed: pip install 'ibnorm-export[vision]'"
        ) from error
    except RuntimeError as error:  # a torchvision of another build than torch's
        raise BackendUnavailable(
            f"{folder} is a folder of timm, which cannot be imported here: {error}. Install the torchvision that "
            f"belongs to torch {torch.__version__}"
        ) from error
    return load_timm(folder, config, norms=norms)


def _family_model(
    family: Family, model: PreTrainedModel, *, source: str, source_sha256: str, norms: NormConfig
) -> LoadedModel:
    model.eval().requires_grad_(False)
    family.prepare(model)
    return LoadedModel(
        module=model,
        family=family.name,
        inputs=family.inputs(model),
        outputs=family.outputs,
        call=family.call,
        sample=lambda rng, index: family.sample(model, rng, index=index),
        valid=family.valid,
        exact=family.make_exact,
        opset=family.opset,
        source=source,
        source_sha256=source_sha256,
        section=norms.to_config(),
        warnings=nonfinite(model),
        max_positions=int(getattr(model.config, "max_position_embeddings", 0)),
    )


def load(checkpoint: str | Path, model: str | None = None, *, task: Task | str = Task.FORWARD) -> LoadedModel:
    """Read a checkpoint.

    Args:
        checkpoint: a Hugging Face folder with an `ibnorm` section in config.json, or, with `model`,
            a folder or file of weights (.safetensors, or .pt that is weights-only).
        model: "package.module:factory" of the user's own code; the factory returns a `CustomModel`.
        task: what to load it for.

    Raises:
        CheckpointError: the path, config, code or weights do not make an IBNorm model, or it cannot do
            the task; the message names what.
    """
    path = Path(checkpoint)
    if task not in tuple(Task):
        raise CheckpointError(f"task is {task!r}; it must be one of {', '.join(Task)}")
    task = Task(task)
    if task is not Task.FORWARD and model is not None:
        raise CheckpointError(f"task {task} needs a Hugging Face folder; for --model the task is forward")
    try:
        if not path.exists():
            raise CheckpointError(f"{path} does not exist")
        if model is not None:
            return load_custom(path, model)
        if path.is_dir():
            return _load_folder(path, task)
    except PermissionError as error:
        raise CheckpointError(f"{error.filename or path} cannot be read: permission denied") from error
    raise CheckpointError(
        f"{path} is a file; weights alone do not say what the model is. Give a Hugging Face folder, or add "
        "--model package.module:factory"
    )


def _drawn(family: Family, model: nn.Module, *, seed: int) -> list[Tensor]:
    arrays = family.sample(model, np.random.default_rng(seed), index=0)
    return [torch.from_numpy(arrays[spec.name]) for spec in family.inputs(model)]


def measure_statistics(model: nn.Module, run: Callable[[], object]) -> None:
    """Give norms with running statistics those of one batch, which `run` passes through the model."""
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
    """A model with random weights.

    Args:
        size: a preset of the paper ("llama-60m", "vit-s16", ...) or the settings of a config.json.
        norms: what stands in place of the stock norms.
        seed: of torch's generator.

    Raises:
        CheckpointError: no such preset or family.
    """
    if isinstance(size, str):
        family, config = preset(size)
    else:
        config = dict(size)
        known = FAMILIES.get(str(config.get("model_type")))
        if known is None:
            raise CheckpointError(f"model_type is {config.get('model_type')!r}; this version knows {list(FAMILIES)}")
        family = known
    if isinstance(norms, IBNormSpec):
        norms = NormConfig(norms)
    parsed = family.architecture.config_class(**{k: v for k, v in config.items() if k != "model_type"})
    parsed._attn_implementation = family.attention
    parsed.ibnorm = norms.to_config()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _with_norms(family.architecture, norms)(parsed)
    measure_statistics(model, lambda: family.call(model, *_drawn(family, model, seed=seed)))
    return model


def _earlier(folder: Path) -> set[str]:
    """The files of a checkpoint in `folder`, its tokenizer's too."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} exists and is not a checkpoint; choose another place")
    weights = {path.name for path in folder.glob("model*.safetensors")}
    return {"config.json", "generation_config.json", "model.safetensors.index.json", *weights, *TOKENIZER_FILES}


def save(model: PreTrainedModel, folder: str | Path) -> None:
    """Write a model of `new_model` or `load` as a Hugging Face folder, whole or not at all.

    An existing checkpoint in that place is replaced, but for its tokenizer, which stays.

    Raises:
        CheckpointError: the folder holds something other than a checkpoint, or cannot be written.
    """
    folder = Path(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot write the checkpoint {folder}: {error.strerror or error}") from error
    with new_folder(folder, _earlier, error=CheckpointError) as beside:
        for name in TOKENIZER_FILES:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, beside / name)
        with _quiet_transformers():
            model.save_pretrained(beside)
