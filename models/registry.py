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
from ibnorm_export.op.torch_op import IBNorm

__all__ = ["FAMILIES", "TESTED", "apply_adapters", "find_family", "preset", "register_adapter"]

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
        *("llama", "gpt2", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "olmo2", "phi3", "gpt_neox", "opt"),
        *("phi", "stablelm", "gptj", "bloom"),
    ),
    "encoders": ("bert", "roberta", "distilbert", "electra", "modernbert"),
    "image classifiers": ("vit", "resnet", "deit", "swin", "convnext"),
}


# `register_adapter` fills it while the user's modules are imported, as in every registry of classes.
_ADAPTERS: Final[dict[type[nn.Module], Callable[[nn.Module], IBNormSpec]]] = {}


def register_adapter(norm: type[nn.Module], convert: Callable[[nn.Module], IBNormSpec]) -> None:
    """Declare what a norm class of your own computes, so that models with it can be exported.

    Args:
        norm: the class. Its parameters are called `weight` and `bias`; both are optional.
        convert: (instance) -> its spec. It states your convention for lambda, with `IBNormSpec.from_convention`. Its
            `scale` and `bias` are ignored: they are read from the instance.

    Example:
        register_adapter(MyNorm, lambda m: IBNormSpec.from_convention("L", m.lam, epsilon=m.eps, convention="divide"))
    """
    _ADAPTERS[norm] = convert


def apply_adapters(module: nn.Module) -> None:
    """Replace every instance of a registered class in `module`, in place; parameters are kept."""
    for path, norm in list(module.named_modules(remove_duplicate=False)):
        convert = _ADAPTERS.get(type(norm))
        if convert is None:
            continue
        if not path:
            raise CheckpointError("the model itself is a norm: put it inside a module")
        weight, bias = (getattr(norm, name, None) for name in ("weight", "bias"))
        parameter = weight if weight is not None else bias
        size = getattr(norm, "normalized_shape", None) if parameter is None else parameter.shape
        if size is None:
            raise CheckpointError(
                f"{path} ({type(norm).__name__}) has no weight, bias or normalized_shape, so its size is unknown"
            )
        features = int(size if isinstance(size, int) else size[-1])
        given = convert(norm)
        spec = IBNormSpec(
            given.compression,
            given.lambd,
            epsilon=given.epsilon,
            scale=weight is not None,
            bias=bias is not None,
            grouping=given.grouping,
            axis=given.axis,
        )
        new = IBNorm(features, spec)
        new.weight, new.bias = weight, bias
        module.set_submodule(path, new)


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
