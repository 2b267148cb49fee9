"""Checkpoints whose tensors already have the names of the folder: transformers' own models, and timm's train.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from torch import Tensor

from ibnorm_export.errors import CheckpointError
from ibnorm_export.models.importers.norm_reading import NormSite
from ibnorm_export.models.importers.source import Conversion, TrainingSource

__all__ = ["convert", "timm_config", "transformers_config"]

#: Tables that transformers computes, and that its older versions saved.
_COMPUTED: Final = r".*\.(rotary_emb\.inv_freq|attn\.masked_bias|embeddings\.position_ids)|.*\.h\.\d+\.attn\.bias"

#: Arguments of timm's train.py that its create_model receives under another name.
_TIMM_ARGUMENTS: Final = {"in_chans": "in_chans", "gp": "global_pool"}


def transformers_config(source: TrainingSource, config: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """config.json of the folder, from that of the checkpoint, and notes about what it changes.

    GaLore's own LLaMA calls the longest sequence `max_sequence_length`, and has -1 for "no padding token".
    """
    new, notes = {key: value for key, value in config.items() if key != "ibnorm"}, []
    longest = new.pop("max_sequence_length", None)
    if longest is not None and "max_position_embeddings" not in new:
        new["max_position_embeddings"] = longest
        notes.append(f"max_position_embeddings is {longest}, the checkpoint's max_sequence_length")
    pad = new.get("pad_token_id")
    if isinstance(pad, int) and pad < 0:
        del new["pad_token_id"]
        notes.append(f"pad_token_id {pad} means no padding token: left out")
    new |= source.given
    return new, tuple(notes)


def timm_config(source: TrainingSource) -> dict[str, Any]:
    """config.json of a timm folder, from the arguments of timm's train.py.

    Raises:
        CheckpointError: the architecture or the size of images is not known.
    """
    architecture = source.extras.get("arch") or source.setting("model", "arch")
    arguments: dict[str, Any] = {}
    for name, timm_name in _TIMM_ARGUMENTS.items():
        if (value := source.setting(name, default=None)) is not None:
            arguments[timm_name] = value
    extra = source.setting("model_kwargs", default={})
    arguments |= dict(extra) if isinstance(extra, Mapping) else {}
    config: dict[str, Any] = {"architecture": architecture, "model_args": arguments}
    classes = source.setting("num_classes", default=None)
    if classes is not None:
        config["num_classes"] = classes
    size = source.setting("input_size", default=None)
    side = arguments.get("img_size") or source.setting("img_size", default=None)
    if isinstance(size, Sequence) and len(size) == 3:
        config["pretrained_cfg"] = {"input_size": list(size)}
    elif isinstance(side, int):
        config["pretrained_cfg"] = {"input_size": [arguments.get("in_chans", 3), side, side]}
    return config


def convert(source: TrainingSource, config: dict[str, Any], *, sites: Sequence[NormSite], kind: str) -> Conversion:
    """Take tensors under their own names.

    Args:
        source: the checkpoint.
        config: config.json of the folder.
        sites: where its architecture has norms.
        kind: what the checkpoint is, in words.

    Raises:
        CheckpointError: a norm has no tensors where others have some.
    """
    reader = source.reader()
    reader.drop(_COMPUTED)
    norms = {site.path: reader.take_norm(site.path) for site in sites}
    empty = [path for path, kept in norms.items() if not kept]
    if empty and len(empty) < len(norms):
        raise CheckpointError(
            f"{source.path}: the model has a norm at {empty[0]}, but the weights have no tensor of it"
        )
    reader.drop(r".*\.num_batches_tracked")
    tensors: dict[str, Tensor] = dict(reader.rest)
    notes = []
    if config.get("tie_word_embeddings") and tensors.pop("lm_head.weight", None) is not None:
        notes.append("tied head: lm_head and the embedding are one matrix, which is stored once")
    return Conversion(config, tensors, norms=norms, origins={}, notes=tuple(notes))
