"""Read and write checkpoints: Hugging Face folders, and plain state dicts with the user's own code."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import pickle
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ibnorm_export.errors import CheckpointError, SpecError
from ibnorm_export.loaded import TASKS, Arrays, CustomModel, InputSpec, LoadedModel
from ibnorm_export.models.causal import CausalFamily
from ibnorm_export.models.family import Family
from ibnorm_export.models.registry import FAMILIES, adapt, preset
from ibnorm_export.module import replace_norms
from ibnorm_export.spec import IBNormSpec, NormConfig

__all__ = ["load", "new_model", "read_config", "save"]

#: What transformers raises for settings that do not make a model; its own words name the setting.
_UNBUILDABLE = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
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


def _some(names: list[str]) -> str:
    shown = ", ".join(sorted(names)[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


def _raise_mismatch(source: Path, missing: list[str], extra: list[str], shapes: list[str]) -> None:
    parts = []
    if missing:
        parts.append(f"{len(missing)} missing ({_some(missing)})")
    if extra:
        parts.append(f"{len(extra)} that the model does not have ({_some(extra)})")
    if shapes:
        parts.append(f"{len(shapes)} of the wrong shape ({_some(shapes)})")
    if parts:
        raise CheckpointError(f"{source}: weights do not fit the model: {'; '.join(parts)}")


def _nonfinite(module: nn.Module) -> tuple[str, ...]:
    bad = [name for name, p in module.named_parameters() if not bool(torch.isfinite(p).all())]
    return (f"NaN or infinity in weights: {_some(bad)}",) if bad else ()


def _hash(files: list[Path]) -> str:
    total = hashlib.sha256()
    for file in sorted(files):
        with file.open("rb") as stream:
            total.update(f"{file.name}\0{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


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


def _weight_files(folder: Path) -> list[Path]:
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


def _load_folder(folder: Path, task: str) -> LoadedModel:
    config = read_config(folder)
    if "ibnorm" not in config:
        raise CheckpointError(
            f"{folder / 'config.json'} has no ibnorm section, so this is not an IBNorm model or it does not say "
            f"which; add one that states how it was trained, for example {_EXAMPLE_SECTION}"
        )
    kind = config.get("model_type")
    family = FAMILIES.get(str(kind))
    if family is None:
        raise CheckpointError(
            f"{folder / 'config.json'}: model_type is {kind!r}; this version knows {', '.join(FAMILIES)}. "
            "For code of your own use --model package.module:factory"
        )
    if task == "text-generation" and not isinstance(family, CausalFamily):
        raise CheckpointError(
            f"{folder} is a {kind} model, which is no causal language model: it cannot generate text. "
            "Leave --task text-generation out"
        )
    try:
        norms = NormConfig.from_config(config["ibnorm"])
    except SpecError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from error
    files = _weight_files(folder)
    try:
        family.check(config)
        with _quiet_transformers():
            model, info = _with_norms(family.architecture, norms).from_pretrained(
                folder,
                attn_implementation="sdpa",
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
    _raise_mismatch(
        folder,
        list(info["missing_keys"]),
        list(info["unexpected_keys"]),
        [f"{key}: file {tuple(there)}, model {tuple(here)}" for key, there, here in info["mismatched_keys"]],
    )
    loaded = _family_model(family, model, str(folder), _hash([folder / "config.json", *files]), norms)
    if task == "text-generation" and isinstance(family, CausalFamily):
        return family.with_cache(loaded)
    return loaded


def _family_model(
    family: Family, model: PreTrainedModel, source: str, source_sha256: str, norms: NormConfig
) -> LoadedModel:
    model.eval().requires_grad_(False)
    family.prepare(model)
    return LoadedModel(
        module=model,
        family=family.name,
        inputs=family.inputs(model),
        outputs=family.outputs,
        call=family.call,
        sample=lambda rng, index: family.sample(model, rng, index),
        valid=family.valid,
        exact=family.make_exact,
        opset=family.opset,
        source=source,
        source_sha256=source_sha256,
        section=norms.to_config(),
        warnings=_nonfinite(model),
        max_positions=int(getattr(model.config, "max_position_embeddings", 0)),
    )


def _import_factory(reference: str) -> Any:
    module_name, _, attribute = reference.partition(":")
    if not module_name or not attribute:
        raise CheckpointError(f"--model is {reference!r}; it must be package.module:factory")
    if "" not in sys.path:
        sys.path.insert(0, "")  # the user's own code lies in the working directory, as for `python -m`
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f"--model {reference}: no module named {error.name!r}; run from the folder that holds it, or install it"
        ) from error
    except Exception as error:  # importing runs the user's own code, which may raise anything
        raise CheckpointError(f"--model {reference}: {type(error).__name__}: {error}") from error
    if not callable(factory):
        raise CheckpointError(f"--model {reference}: {attribute} is not callable")
    return factory


def _make(reference: str) -> CustomModel:
    factory = _import_factory(reference)
    try:
        made = factory()
    except Exception as error:  # the user's own code may raise anything
        raise CheckpointError(f"--model {reference} raised {type(error).__name__}: {error}") from error
    if not isinstance(made, CustomModel):
        raise CheckpointError(
            f"--model {reference} returned {type(made).__name__}; it must return ibnorm_export.models.CustomModel, "
            "which says what the inputs and outputs are"
        )
    return made


def _read_state_dict(path: Path) -> dict[str, Tensor]:
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


def _draw(inputs: tuple[InputSpec, ...], rng: np.random.Generator, index: int) -> Arrays:
    sizes: dict[str, int] = {}
    arrays: Arrays = {}
    for spec in inputs:
        shape = [n if isinstance(n, int) else sizes.setdefault(n, (2, 1, 5, 3)[index % 4]) for n in spec.shape]
        if spec.floating:
            arrays[spec.name] = rng.standard_normal(shape, dtype=np.float32)
        else:
            arrays[spec.name] = rng.integers(0, 2, shape, dtype=np.int64)
    return arrays


def _load_custom(path: Path, reference: str) -> LoadedModel:
    made = _make(reference)
    files = [path]
    if path.is_dir():
        files = [file for file in _weight_files(path) if file.suffix == ".safetensors"]
    state: dict[str, Tensor] = {}
    for file in files:
        state |= _read_state_dict(file)
    module = made.module
    own = module.state_dict()
    tied: dict[int, list[str]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        tied.setdefault(id(tensor), []).append(name)
    present = {name for names in tied.values() if any(n in state for n in names) for name in names}
    shared = set(state) & set(own)
    _raise_mismatch(
        path,
        [name for name in own if name not in present],
        [name for name in state if name not in own],
        [f"{n}: file {tuple(state[n].shape)}, model {tuple(own[n].shape)}" for n in shared
         if state[n].shape != own[n].shape],
    )  # fmt: skip
    module.load_state_dict(state, strict=False)
    adapt(module)
    module.eval().requires_grad_(False)
    outputs = made.outputs

    def call(module: nn.Module, *tensors: Tensor) -> tuple[Tensor, ...]:
        result = module(*tensors)
        return (result,) if isinstance(result, Tensor) else tuple(result)

    return LoadedModel(
        module=module,
        family="custom",
        inputs=made.inputs,
        outputs=outputs,
        call=call,
        sample=made.sample or (lambda rng, index: _draw(made.inputs, rng, index)),
        exact=made.exact,
        opset=made.opset,
        source=str(path),
        source_sha256=_hash(files),
        warnings=_nonfinite(module),
    )


def load(checkpoint: str | Path, model: str | None = None, task: str = "forward") -> LoadedModel:
    """Read a checkpoint.

    Args:
        checkpoint: a Hugging Face folder with an `ibnorm` section in config.json, or, with `model`,
            a folder or file of weights (.safetensors, or .pt that is weights-only).
        model: "package.module:factory" of the user's own code; the factory returns a `CustomModel`.
        task: "forward", or "text-generation": with a cache of keys and values.

    Raises:
        CheckpointError: the path, config, code or weights do not make an IBNorm model, or it cannot do
            the task; the message names what.
    """
    path = Path(checkpoint)
    if task not in TASKS:
        raise CheckpointError(f"task is {task!r}; it must be one of {', '.join(TASKS)}")
    if task != "forward" and model is not None:
        raise CheckpointError(f"task {task} needs a Hugging Face folder; for --model the task is forward")
    try:
        if not path.exists():
            raise CheckpointError(f"{path} does not exist")
        if model is not None:
            return _load_custom(path, model)
        if path.is_dir():
            return _load_folder(path, task)
    except PermissionError as error:
        raise CheckpointError(f"{error.filename or path} cannot be read: permission denied") from error
    raise CheckpointError(
        f"{path} is a file; weights alone do not say what the model is. Give a Hugging Face folder, or add "
        "--model package.module:factory"
    )


def new_model(size: str | Mapping[str, Any], norms: NormConfig | IBNormSpec, seed: int = 0) -> PreTrainedModel:
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
    parsed._attn_implementation = "sdpa"
    parsed.ibnorm = norms.to_config()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _with_norms(family.architecture, norms)(parsed)


def save(model: PreTrainedModel, folder: str | Path) -> None:
    """Write a model of `new_model` or `load` as a Hugging Face folder, whole or not at all.

    An existing checkpoint in that place is replaced.

    Raises:
        CheckpointError: the folder holds something other than a checkpoint, or cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()) and not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} exists and is not a checkpoint; choose another place")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as beside:
            new = Path(beside) / "new"
            with _quiet_transformers():
                model.save_pretrained(new)
            if folder.exists():
                folder.rename(Path(beside) / "old")
            shutil.move(new, folder)
    except OSError as error:
        raise CheckpointError(f"cannot write the checkpoint {folder}: {error.strerror or error}") from error
