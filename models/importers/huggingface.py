"""Checkpoints of transformers: folders whose config.json names one of the families of this package."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.metadata import Task, Weights
from ibnorm_export.errors import CheckpointError, SpecError, quoted, shortened
from ibnorm_export.models.containers import TrainingCheckpoint, fit_keys, hash_files, read_checkpoint, weight_files
from ibnorm_export.models.families.causal import CausalFamily
from ibnorm_export.models.families.family import Family
from ibnorm_export.models.families.stock_norms import check_replaced, check_stated
from ibnorm_export.models.plausible_size import StoredWeights, check_counts, check_parameters
from ibnorm_export.models.registry import TESTED, find_family
from ibnorm_export.models.weights import nonfinite_warnings, raise_mismatch, tied_names
from ibnorm_export.op.replace_norms import absorb_offsets, replace_norms
from ibnorm_export.op.spec import NormConfig

if TYPE_CHECKING:  # importing transformers takes seconds, so it is left to the family that needs it
    from transformers import PreTrainedModel

__all__ = ["load_huggingface", "quiet_transformers", "unknown_model_type", "with_norms"]

#: What transformers raises for settings from which it cannot build a model; its message names the setting.
_BUILD_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    RuntimeError,
    AttributeError,
    ZeroDivisionError,
    StrictDataclassError,
)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars and its report of keys, which this package reports itself."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    bars_enabled = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars_enabled:
            logging.enable_progress_bar()


def with_norms(architecture: type[PreTrainedModel], norms: NormConfig) -> type[PreTrainedModel]:
    """A subclass of a stock architecture that replaces its norms at the end of construction."""

    def __init__(self: PreTrainedModel, config: Any) -> None:  # noqa: N807 - it becomes the class's __init__
        architecture.__init__(self, config)
        check_stated(self, norms)
        replace_norms(self, norms)
        check_replaced(self)

    return type(architecture.__name__, (architecture,), {"__init__": __init__, "__module__": architecture.__module__})


def unknown_model_type(config: Mapping[str, Any]) -> str:
    """What to answer for a `model_type` of no family: the reason if it is known, and what is legal."""
    reason = ""
    if config.get("is_encoder_decoder"):
        reason = "; it is an encoder with a decoder (is_encoder_decoder), which this version does not export"
    elif "auto_map" in config:
        reason = "; its code is in the folder (auto_map), and this package never runs code of a checkpoint"
    legal = "; ".join(f"{kind} ({', '.join(names)}, ...)" for kind, names in TESTED.items())
    return (
        f"model_type is {quoted(config.get('model_type'))}{reason}. It must be one of transformers' {legal}. For "
        "a model that your own code defines, use --model package.module:factory"
    )


def _find_family(folder: Path, config: Mapping[str, Any], *, task: Task) -> Family:
    """The family that config.json names.

    Raises:
        CheckpointError: it is unknown, cannot do the task, or the weights are quantised.
    """
    kind = config.get("model_type")
    family = find_family(config)
    if family is None:
        raise CheckpointError(f"{folder / 'config.json'}: {unknown_model_type(config)}")
    if task is Task.TEXT_GENERATION and not isinstance(family, CausalFamily):
        raise CheckpointError(
            f"{folder} is a {kind} model, not a causal language model; --task text-generation, --target ort-genai, "
            "int8, int4 and `generate` need one"
        )
    if config.get("quantization_config"):
        raise CheckpointError(
            f"{folder / 'config.json'} has a quantization_config, but export and verify need floating-point weights. "
            "Save the model before quantization, or the result of transformers' model.dequantize(); "
            "export --dtype int8 or int4 quantizes it"
        )
    return family


def _build(
    folder: Path,
    config: Mapping[str, Any],
    *,
    family: Family,
    norms: NormConfig,
    checkpoint: TrainingCheckpoint | None,
) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    """The model with its weights, and transformers' report of the keys."""
    source = folder / "config.json"
    try:
        if checkpoint is None:
            stored = StoredWeights.of_safetensors([f for f in weight_files(folder) if f.suffix == ".safetensors"])
        else:
            stored = StoredWeights.of_state(checkpoint.state)
        check_counts(config, stored, source=source)
        family.check(config)
        with quiet_transformers():
            architecture = with_norms(family.architecture, norms)
            attention = family.attention_of(config)
            settings = architecture.config_class.from_pretrained(folder, local_files_only=True)
            check_parameters(
                lambda: architecture._from_config(copy.deepcopy(settings), attn_implementation=attention),
                stored,
                source=source,
            )
            given: dict[str, Any] = {"use_safetensors": True}
            if checkpoint is not None:  # transformers would read a pickle itself, by other rules
                given = {"config": settings, "state_dict": dict(checkpoint.state)}
            model, keys = architecture.from_pretrained(
                folder if checkpoint is None else None,
                attn_implementation=attention,
                dtype="auto",
                ignore_mismatched_sizes=True,  # the caller reports them by name
                local_files_only=True,
                output_loading_info=True,
                **given,
            )
    except SafetensorError as error:
        raise CheckpointError(f"{folder}: a weight file is truncated or is not safetensors: {error}") from error
    except SpecError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    except _BUILD_ERRORS as error:
        raise CheckpointError(
            f"{folder}: transformers cannot build a {family.name} from it: {shortened(str(error))}"
        ) from error
    return model, keys


def _without_prefixes(model: PreTrainedModel, checkpoint: TrainingCheckpoint) -> TrainingCheckpoint | None:
    """The checkpoint without names that wrappers add, such as `module.`; None if they do not make every name fit."""
    state, notes = fit_keys(checkpoint.state, model.state_dict().keys(), tied=tied_names(model))
    return dataclasses.replace(checkpoint, state=state, notes=(*checkpoint.notes, *notes)) if notes else None


def load_huggingface(
    folder: Path, config: Mapping[str, Any], *, norms: NormConfig, task: Task, weights: Weights | None = None
) -> LoadedModel:
    """Read a folder of transformers.

    Args:
        folder: contains config.json, and safetensors files or pytorch_model.bin or its shards.
        config: its config.json.
        norms: its `ibnorm` section.
        task: what the model is loaded for.
        weights: raw or EMA weights, where the folder has both.

    Raises:
        CheckpointError: the family, the settings or the weights do not make a model that can do the task.
    """
    family = _find_family(folder, config, task=task)
    files = weight_files(folder)
    checkpoint = None
    if weights is not None or not files[0].name.startswith("model.safetensors"):  # which transformers maps itself
        checkpoint = read_checkpoint(folder, weights=weights)
    model, keys = _build(folder, config, family=family, norms=norms, checkpoint=checkpoint)
    if keys["missing_keys"] and keys["unexpected_keys"]:  # perhaps the names of a wrapper
        stripped = _without_prefixes(model, checkpoint or read_checkpoint(folder))
        if stripped is not None:
            checkpoint = stripped
            model, keys = _build(folder, config, family=family, norms=norms, checkpoint=checkpoint)
    raise_mismatch(
        folder,
        list(keys["missing_keys"]),
        extra=list(keys["unexpected_keys"]),
        shapes=[f"{key}: file {tuple(there)}, model {tuple(here)}" for key, there, here in keys["mismatched_keys"]],
    )
    source_sha256 = hash_files([folder / "config.json", *files])
    loaded = _family_model(family, model, source=str(folder), source_sha256=source_sha256, norms=norms)
    if checkpoint is not None:
        loaded = dataclasses.replace(loaded, notes=checkpoint.notes)
    if task is Task.TEXT_GENERATION and isinstance(family, CausalFamily):
        return family.with_cache(loaded)
    return loaded


def _family_model(
    family: Family, model: PreTrainedModel, *, source: str, source_sha256: str, norms: NormConfig
) -> LoadedModel:
    """Describe a model of a known family."""
    model.eval().requires_grad_(False)
    absorb_offsets(model)
    family.prepare(model)
    return LoadedModel(
        module=model,
        family=family.name,
        inputs=family.inputs(model),
        outputs=family.output_names(model),
        call=family.call,
        sample=lambda rng, index: family.sample(model, rng, index=index),
        valid=family.valid,
        exact=family.make_exact,
        opset=family.opset,
        source=source,
        source_sha256=source_sha256,
        section=norms.to_config(),
        warnings=nonfinite_warnings(model),
        max_positions=family.longest(model),
        blocks=family.blocks,
    )
