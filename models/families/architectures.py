"""Which class of transformers a config.json stands for, and why some cannot be exported.

transformers lists the classes of every `model_type` by task. The list is read without importing the models; only the
one module that defines the class is imported.
"""

from __future__ import annotations

import enum
import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from ibnorm_export.errors import CheckpointError, listed, quoted

if TYPE_CHECKING:  # importing transformers takes seconds
    from transformers import PreTrainedModel

__all__ = ["Architecture", "Head", "check_rotary", "find_architecture"]

#: Kinds of rotary embedding whose frequencies do not depend on the input.
ROTARY: Final = ("default", "linear", "llama3", "yarn")

#: Layers of a decoder whose only state is a cache of keys and values.
_LAYER_TYPES: Final = ("full_attention", "sliding_attention")

#: Keys of config.json that count the experts of a mixture.
_EXPERTS: Final = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


class Head(enum.StrEnum):
    """What a class of transformers computes, by the list of transformers in which it is found."""

    CAUSAL = "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"
    IMAGE = "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES"
    MASKED = "MODEL_FOR_MASKED_LM_MAPPING_NAMES"
    SEQUENCE = "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES"
    TOKENS = "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES"
    QUESTION = "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES"
    BASE = "MODEL_MAPPING_NAMES"


#: Heads of an encoder, which reads a whole text at once.
_ENCODER_HEADS: Final = (Head.BASE, Head.MASKED, Head.SEQUENCE, Head.TOKENS, Head.QUESTION)


@dataclass(frozen=True, slots=True)
class Architecture:
    """A class of transformers.

    Args:
        model_type: `model_type` of config.json.
        name: name of the class.
        head: what it computes.
    """

    model_type: str
    name: str
    head: Head

    def load(self) -> type[PreTrainedModel]:
        """Import the module that defines the class."""
        from transformers.models.auto.configuration_auto import model_type_to_module_name

        package = f"transformers.models.{model_type_to_module_name(self.model_type)}"
        found: type[PreTrainedModel] = getattr(importlib.import_module(package), self.name)
        return found


def _names(model_type: str, head: Head) -> tuple[str, ...]:
    from transformers.models.auto import modeling_auto

    listed = getattr(modeling_auto, head.value).get(model_type, ())
    return (listed,) if isinstance(listed, str) else tuple(listed)


def _candidates(model_type: str) -> Iterator[Architecture]:
    """Classes of a `model_type` that can be exported, the one that an unnamed checkpoint most likely has first."""
    encoder = bool(_names(model_type, Head.MASKED))  # decoders fill no gaps
    for head in _ENCODER_HEADS if encoder else (Head.CAUSAL, Head.IMAGE):
        for name in _names(model_type, head):
            yield Architecture(model_type, name, head)


def find_architecture(config: Mapping[str, Any]) -> Architecture | None:
    """Find the class that a config.json stands for.

    Args:
        config: the parsed file. `architectures` selects among the classes of its `model_type`.

    Returns:
        The class; None if transformers has no causal language model, encoder or image classifier of that `model_type`.

    Raises:
        CheckpointError: `architectures` names a class that computes something else, or one of another kind of model.
    """
    model_type = str(config.get("model_type"))
    known = list(_candidates(model_type))
    if not known:
        return None
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and named else None
    if name is None:
        return known[0]
    for architecture in known:
        if architecture.name == name:
            return architecture
    raise CheckpointError(
        f"config.json names the architecture {quoted(name)}; of the model_type {quoted(model_type)}, this version "
        f"exports {', '.join(dict.fromkeys(a.name for a in known))}"
    )


def check_causal(architecture: type[PreTrainedModel], config: Any) -> None:
    """Raise CheckpointError for a decoder that keeps more than keys and values, or routes tokens to experts.

    Args:
        architecture: the class.
        config: the settings that transformers has parsed.
    """
    name = architecture.__name__
    if getattr(config, "is_encoder_decoder", False):
        raise CheckpointError(f"{name} is an encoder with a decoder; this version exports decoders and encoders alone")
    if others := [key for key in ("vision_config", "audio_config") if getattr(config, key, None) is not None]:
        raise CheckpointError(
            f"{name} takes more than text ({listed(others)}); save its language model as a separate checkpoint"
        )
    others = sorted({str(kind) for kind in getattr(config, "layer_types", None) or ()} - set(_LAYER_TYPES))
    if getattr(architecture, "_is_stateful", False) or others:
        kinds = f" (layer_types: {listed(others)})" if others else ""
        raise CheckpointError(
            f"{name} keeps a state that is not a cache of keys and values{kinds}; this version exports attention over "
            f"all tokens or a sliding window of them ({', '.join(_LAYER_TYPES)})"
        )
    for key in _EXPERTS:
        if isinstance(experts := getattr(config, key, None), int) and experts > 1:
            raise CheckpointError(
                f"{name} routes each token to some of {experts} experts ({key}), which torch.export cannot trace; this "
                "version exports dense models"
            )
    if architecture.__name__.startswith("Falcon") and getattr(config, "alibi", False):
        raise CheckpointError(
            f"{name} computes its position bias in bfloat16 (alibi: true), for which ONNX Runtime has no kernel on a "
            "CPU; this version exports Falcon with rotary positions"
        )
    check_rotary(config)


def check_rotary(config: Any) -> None:
    """Raise CheckpointError if the frequencies of a rotary embedding change with the length of the text.

    Args:
        config: the settings that transformers has parsed. `rope_parameters` is one embedding or one for each kind of
            layer.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    tables = [rope] if "rope_type" in rope else [table for table in rope.values() if isinstance(table, Mapping)]
    for table in tables:
        if (kind := table.get("rope_type", "default")) not in ROTARY:
            raise CheckpointError(
                f"rotary scaling in config.json is {kind!r}, whose frequencies change with the length of the text; "
                f"it must be one of {', '.join(ROTARY)}"
            )
