"""The known families of models, and the users' own norm classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from torch import nn

from ibnorm_export.errors import CheckpointError
from ibnorm_export.models.families.architectures import Head, find_architecture
from ibnorm_export.models.families.causal_language_model import CausalLanguageModel
from ibnorm_export.models.families.encoder import Encoder
from ibnorm_export.models.families.family import Family
from ibnorm_export.models.families.gpt2 import GPT2
from ibnorm_export.models.families.image_classifier import ImageClassifier
from ibnorm_export.models.families.llama import Llama
from ibnorm_export.models.families.resnet import ResNet
from ibnorm_export.models.families.vit import ViT
from ibnorm_export.op.spec import IBNormSpec

__all__ = ["FAMILIES", "TESTED", "Adapter", "adapter_of", "find_family", "preset", "register_adapter"]

#: (instance of the user's class) -> what it computes, or the module that computes it.
Adapter = Callable[[nn.Module], IBNormSpec | nn.Module]

FAMILIES: Final[dict[str, Family]] = {family.name: family for family in (Llama(), GPT2(), ViT(), ResNet())}


def find_family(config: Mapping[str, Any]) -> Family | None:
    """Find the family of a config.json by its `model_type`, and by `architectures` where that leaves a choice.

    Returns:
        The family; None if the `model_type` is unknown.

    Raises:
        CheckpointError: `architectures` names a class that this version does not export.
    """
    family = FAMILIES.get(str(config.get("model_type")))
    if family is not None:
        return family
    architecture = find_architecture(config)
    if architecture is None:
        return None
    match architecture.head:
        case Head.CAUSAL:
            return CausalLanguageModel(architecture)
        case Head.IMAGE:
            return ImageClassifier(architecture)
        case _:
            return Encoder(architecture)


#: `model_type` of every architecture that the tests export and verify. Others of these kinds are tried too.
TESTED: Final[Mapping[str, tuple[str, ...]]] = {
    "causal language models": (
        *("llama", "gpt2", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"),
        *("olmo2", "phi3", "gpt_neox", "opt", "bloom", "falcon"),
    ),
    "encoders": ("bert", "roberta", "distilbert", "electra", "modernbert"),
    "image classifiers": ("vit", "resnet", "deit", "swin", "convnext"),
}


# `register_adapter` fills it while the user's modules are imported, as in every registry of classes.
_ADAPTERS: Final[dict[type[nn.Module], Adapter]] = {}


def register_adapter(norm: type[nn.Module], convert: Adapter) -> None:
    """Declare what a norm class of your own computes. Without an adapter, its instances are identified.

    What is declared is compared with the class before export, and an adapter that does not fit is an error.

    Args:
        norm: the class. The adapter also holds for its subclasses that do not have their own.
        convert: (instance) -> its spec, which states your convention for lambda with `IBNormSpec.from_convention`, and
            may have any grouping. The parameters `weight` and `bias` are taken from the instance; both are optional,
            and the spec's `scale` and `bias` are ignored. For a norm with other parameters, return the module that
            replaces it instead of a spec: an IBNorm, for example, that holds the instance's own parameters.

    Example:
        register_adapter(MyNorm, lambda m: IBNormSpec.from_convention("L", m.lam, epsilon=m.eps, convention="divide"))
    """
    _ADAPTERS[norm] = convert


def adapter_of(norm: type[nn.Module]) -> Adapter | None:
    """The adapter of a class: its own, or that of the nearest class that it inherits from; None if there is none."""
    return next((_ADAPTERS[base] for base in norm.__mro__ if base in _ADAPTERS), None)


def preset(name: str) -> tuple[Family, dict[str, object]]:
    """The family and the config.json of a size from the paper, e.g. "llama-60m" or "vit-s16".

    Raises:
        CheckpointError: there is no preset of that name.
    """
    known = {
        f"{family.name}-{size}": (family, config)
        for family in FAMILIES.values()
        for size, config in family.presets.items()
    }
    if name not in known:
        raise CheckpointError(f"there is no preset {name!r}; the presets are {', '.join(known)}")
    family, config = known[name]
    return family, dict(config)
