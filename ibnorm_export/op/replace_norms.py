"""Replace the norms of a model with IBNorm."""

from __future__ import annotations

import dataclasses
from typing import Final

import torch
from torch import Tensor, nn

from ibnorm_export.errors import SpecError
from ibnorm_export.op.norm_variants import (
    AxesIBNorm,
    BatchIBNorm,
    ChannelIBNorm,
    ChannelLayerNorm,
    ChannelRMSNorm,
    FeatureBatchNorm,
    OffsetRMSNorm,
)
from ibnorm_export.op.spec import Grouping, IBNormSpec, NormConfig, NormKind
from ibnorm_export.op.torch_op import IBNorm

__all__ = ["absorb_offsets", "is_norm", "norm_features", "replace_norms"]

_BatchNorm: Final = nn.modules.batchnorm._BatchNorm

#: Tensors that a new norm copies from the old one, where both have them.
_COPIED_TENSORS: Final = ("weight", "bias", "running_mean", "running_var")


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm: from this package, from PyTorch, or a class named *RMSNorm or *LayerNorm."""
    if isinstance(module, (IBNorm, BatchIBNorm, nn.LayerNorm, nn.RMSNorm, _BatchNorm, nn.GroupNorm)):
        return True
    return type(module).__name__.endswith(("RMSNorm", "LayerNorm"))


def _channels_first(module: nn.Module) -> bool:
    """Whether the features of a norm are on axis 1, as after a convolution."""
    if getattr(module, "data_format", None) == "channels_first":  # ConvNeXt's LayerNorm
        return True
    return isinstance(module, (_BatchNorm, nn.GroupNorm)) or type(module).__name__.endswith("Norm2d")


def _features(module: nn.Module, path: str) -> int:
    if not isinstance(getattr(module, "act", getattr(module, "activation", None)), (type(None), nn.Identity)):
        raise SpecError(
            f"{path} ({type(module).__name__}) also applies an activation; only a plain norm can be replaced"
        )
    for name in ("num_features", "num_channels"):
        if isinstance(size := getattr(module, name, None), int):
            return size
    shape = getattr(module, "normalized_shape", None)
    weight = getattr(module, "weight", None)
    if shape is None and isinstance(weight, Tensor):
        shape = tuple(weight.shape)
    if shape is None or len(tuple(shape)) != 1:
        raise SpecError(
            f"{path} ({type(module).__name__}) normalises axes of shape {shape}; only a norm over one axis can be "
            "replaced"
        )
    return int(shape[0])


def norm_features(model: nn.Module) -> list[tuple[str, int, bool]]:
    """Where a model has norms: module path, number of features, and whether these are on axis 1.

    Raises:
        SpecError: a norm cannot be replaced.
    """
    return [(path, _features(m, path), _channels_first(m)) for path, m in model.named_modules() if is_norm(m)]


def _ibnorm(
    spec: IBNormSpec, features: int, *, first: bool, device: torch.device | None, dtype: torch.dtype | None
) -> nn.Module:
    axis = 1 if first else -1
    match spec.grouping:
        case Grouping.LAST:
            return (ChannelIBNorm if first else IBNorm)(features, spec, device=device, dtype=dtype)
        case Grouping.AXES:
            return AxesIBNorm(features, spec, channel_axis=axis, device=device, dtype=dtype)
        case Grouping.BATCH:
            return BatchIBNorm(features, spec, channel_axis=axis, device=device, dtype=dtype)


def _build(kind: NormKind, spec: IBNormSpec, *, old: nn.Module, path: str) -> nn.Module:
    features, first = _features(old, path), _channels_first(old)
    like = next((t for t in (*old.parameters(), *old.buffers()) if t.is_floating_point()), None)
    device, dtype = (None, None) if like is None else (like.device, like.dtype)
    affine = spec.scale or spec.bias
    match kind:
        case NormKind.IBNORM:
            return _ibnorm(spec, features, first=first, device=device, dtype=dtype)
        case NormKind.LAYERNORM:
            return (ChannelLayerNorm if first else nn.LayerNorm)(
                features, spec.epsilon, elementwise_affine=affine, bias=spec.bias, device=device, dtype=dtype
            )
        case NormKind.RMSNORM if spec.offset:
            relative = OffsetRMSNorm(features, spec.epsilon, device=device, dtype=dtype)
            relative.offset = spec.offset
            return relative
        case NormKind.RMSNORM:
            return (ChannelRMSNorm if first else nn.RMSNorm)(
                features, spec.epsilon, elementwise_affine=spec.scale, device=device, dtype=dtype
            )
        case NormKind.BATCHNORM:
            stock = type(old) if isinstance(old, _BatchNorm) else nn.BatchNorm2d
            return (stock if first else FeatureBatchNorm)(
                features, spec.epsilon, affine=affine, device=device, dtype=dtype
            )


def absorb_offsets(model: nn.Module) -> None:
    """Add the offset of every norm to its scale, in place; the sum is exact, in float64.

    Gemma's norms multiply by `1 + weight`. Afterwards the norm multiplies by its weight alone, as files and kernels do.
    """
    for norm in model.modules():
        if isinstance(norm, (IBNorm, BatchIBNorm)) and norm.spec.offset is not None:
            offset, norm.spec = norm.spec.offset, dataclasses.replace(norm.spec, offset=None)
        elif isinstance(norm, OffsetRMSNorm):
            offset, norm.offset = norm.offset, 0.0
        else:
            continue
        if offset and norm.weight is not None:
            norm.weight = nn.Parameter(offset + norm.weight.detach().to(torch.float64), requires_grad=False)


def replace_norms(model: nn.Module, config: NormConfig | IBNormSpec) -> dict[str, nn.Module]:
    """Replace every norm of a model, in place.

    LayerNorm, RMSNorm, BatchNorm and GroupNorm of PyTorch are replaced, and classes of other libraries whose name ends
    in LayerNorm or RMSNorm. A new norm copies `weight` and `bias` of the old one where both have them, and the running
    statistics of a BatchNorm. Its features are on the same axis.

    Args:
        model: any PyTorch model.
        config: one spec for all norms, or the config of a checkpoint, with exceptions by module path.

    Returns:
        The new norms by module path, in the order of the model.

    Raises:
        SpecError: the model has no norm, a norm cannot be replaced, or a rule applies to no norm.
    """
    if isinstance(config, IBNormSpec):
        config = NormConfig(config)
    norms = [(path, module) for path, module in model.named_modules(remove_duplicate=False) if is_norm(module)]
    norms = [(path, module) for path, module in norms if not isinstance(module, (IBNorm, BatchIBNorm))]
    if not norms:
        raise SpecError(f"{type(model).__name__} has no LayerNorm, RMSNorm, BatchNorm or GroupNorm to replace")
    for rule in config.layers:
        if not any(config.at(path)[1] is rule.spec for path, _ in norms):
            raise SpecError(
                f"the rule for {rule.match!r} applies to no norm; the norms are {[path for path, _ in norms]}"
            )
    replaced: dict[str, nn.Module] = {}
    shared: dict[int, nn.Module] = {}
    for path, module in norms:
        if id(module) not in shared:
            kind, spec = config.at(path)
            new = _build(kind, spec, old=module, path=path)
            with torch.no_grad():
                for name in _COPIED_TENSORS:
                    old, own = getattr(module, name, None), getattr(new, name, None)
                    if isinstance(old, Tensor) and isinstance(own, Tensor) and not own.is_meta:
                        own.copy_(old)
            new.train(module.training)
            shared[id(module)] = new
        model.set_submodule(path, shared[id(module)])
        replaced[path] = shared[id(module)]
    return replaced
