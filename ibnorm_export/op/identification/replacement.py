"""The norm of this package that computes the same as a member, confirmed against it."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn

from ibnorm_export.errors import SpecError
from ibnorm_export.op.identification.effects import SAME, Effect
from ibnorm_export.op.identification.fitting import Array, Fit, affine
from ibnorm_export.op.identification.formulas import describe_other
from ibnorm_export.op.identification.norm_identity import NormIdentity
from ibnorm_export.op.identification.probe import NormProbe, inputs
from ibnorm_export.op.identification.rows import Rows
from ibnorm_export.op.spec import Grouping, IBNormSpec

__all__ = ["AGREES", "build_member", "confirm", "output_difference", "resize"]

#: A replacement differs from the norm by at most this, relative to the norm of the output.
AGREES: Final = 1e-12

#: The same for inputs beyond the samples, where rounding is larger.
_BEYOND: Final = 1e-9


def build_member(
    rows: Rows, best: Fit, *, grouping: Grouping, words: str, effects: Mapping[str, Effect]
) -> NormIdentity:
    """The identity of a member, from samples with the real values of all parameters."""
    (z,) = best.columns(rows.x)
    scales, biases = (rows.groups.join(values) for values in affine(z, rows.y))
    joined = {
        name: dataclasses.replace(e, scale=rows.groups.join(e.scale), bias=rows.groups.join(e.bias))
        for name, e in effects.items()
    }
    values = [scales, biases, *(v for e in joined.values() for v in (e.scale, e.bias))]
    axis, first = _channel_axis(rows, values, words=words), rows.structure.axes[0]
    elements: tuple[int, ...] = ()
    if axis is None:
        if grouping is not Grouping.AXES or not _constant(values, tuple(range(first - 1))):
            return describe_other(rows, best, words=f"{words}, with a scale and bias for each element")
        axis, elements, words = -1, rows.shape[first:], f"{words}, scale and bias for each element"
    reduced = {
        name: dataclasses.replace(e, scale=_features(e.scale, axis, elements), bias=_features(e.bias, axis, elements))
        for name, e in joined.items()
    }
    scale, bias = _features(scales, axis, elements), _features(biases, axis, elements)
    size = float(np.abs(scale).max() + np.abs(bias).max())
    found = [
        _Affine(rows, w, target=t, size=size, shape=elements or t.shape) for w, t in (("scale", scale), ("bias", bias))
    ]
    weight, shift = (part.parameter(reduced) for part in found)
    spec = IBNormSpec(
        best.compression,
        best.lambd,
        epsilon=best.epsilon,
        scale=weight is not None,
        bias=shift is not None,
        grouping=grouping,
        axis=-1 if grouping is Grouping.LAST else first if axis == 1 else first - len(rows.shape),
    )
    return NormIdentity(
        rows.probe.original,
        spec,
        kind=best.compression,
        residual=best.measured(rows.x, rows.y).residual,
        features=len(scale),
        lambd=best.lambd,
        epsilon=best.epsilon,
        channel_axis=axis,
        elements=elements,
        grouping=words,
        weight=weight,
        bias_parameter=shift,
        parameters={name: found[0].roles.get(name) or found[1].roles.get(name) or e.role for name, e in joined.items()},
        fit=best,
    )


def _channel_axis(rows: Rows, values: Sequence[Array], *, words: str) -> int | None:
    """The axis that scale and bias (each of the shape of a sample) follow: 1 or -1; None if there is none."""
    rank = len(rows.shape)
    legal = {"last axis": (-1,), "channels (axis 1)": (1,)}.get(words, (1, -1))
    for axis in legal:
        others = tuple(i for i in range(rank - 1) if i != (axis - 1) % rank) if axis == 1 else tuple(range(rank - 2))
        if _constant(values, others):
            return axis
    return None


def _constant(values: Sequence[Array], axes: tuple[int, ...]) -> bool:
    """Whether no value differs along some axes."""
    size = sum(float(np.abs(v).max()) for v in values)
    return not axes or all(float(np.ptp(v, axis=axes).max()) <= SAME * size for v in values)


def _features(values: Array, axis: int, elements: tuple[int, ...]) -> Array:
    """(shape of a sample) -> (features,): the mean over all other axes; of `elements`, each is a feature."""
    if elements:
        return np.asarray(values.reshape(-1, *elements).mean(0).ravel())
    moved = np.moveaxis(values, 0 if axis == 1 else -1, 0)
    return np.asarray(moved.reshape(moved.shape[0], -1).mean(1))


class _Affine:
    """The scale or the bias of a member: the parameter that it is, or a new one.

    Args:
        rows: samples with the real values of all parameters.
        word: "scale" or "bias".
        target: its values (features,).
        size: a difference is judged relative to it.
        shape: shape of the parameter.
    """

    def __init__(self, rows: Rows, word: str, *, target: Array, size: float, shape: tuple[int, ...]) -> None:
        self._own = dict(rows.probe.original.named_parameters())
        self._shape = shape
        self._word, self._target, self._size = word, target, size
        self.neutral = 1.0 if word == "scale" else 0.0
        self.roles: dict[str, str] = {}

    def parameter(self, effects: Mapping[str, Effect]) -> nn.Parameter | None:
        """The parameter, given effects with values (features,); None if there is none and the values are neutral."""
        features = len(self._target)
        named = {name: effect for name, effect in effects.items() if effect.role == self._word}
        for name, effect in named.items():
            changed = effect.scale if self._word == "scale" else effect.bias
            if name not in self._own or effect.value.size not in (1, features):
                continue
            real = self._own[name].detach().to("cpu", torch.float64).flatten().numpy()
            now, then = (np.broadcast_to(v, (features,)) for v in (real, effect.value))
            linked = _link([(self._target, now), (changed, then)], self._size + float(np.abs(changed).max()))
            if linked is None:
                continue
            words, factor, offset = linked
            self.roles[name] = f"{self._word} is {words}" if words else self._word
            if words:
                return _new((factor * (offset + now)).reshape(self._shape))
            if tuple(self._own[name].shape) == self._shape:
                return self._own[name]
            flat = self._own[name].detach().flatten().expand(features)
            return nn.Parameter(flat.reshape(self._shape), requires_grad=self._own[name].requires_grad)
        self.roles |= dict.fromkeys(named, f"part of the {self._word}")
        if not named and np.abs(self._target - self.neutral).max() <= SAME * self._size:
            return None
        return _new(self._target.reshape(self._shape))


def _link(pairs: Sequence[tuple[Array, Array]], size: float) -> tuple[str, float, float] | None:
    """How a parameter gives the scale or the bias: target = factor * (offset + parameter), for every pair.

    Args:
        pairs: (target, parameter), both (features,).
        size: a difference is judged relative to it.

    Returns:
        In words; factor; offset. None if no such rule holds.
    """
    for offset in (0.0, 1.0):
        target, parameter = pairs[-1]
        squared = float(((offset + parameter) ** 2).sum())
        factor = float((target * (offset + parameter)).sum()) / squared if squared else 1.0
        for k in dict.fromkeys((1.0, factor)):
            if all(np.abs(t - k * (offset + p)).max() <= SAME * size for t, p in pairs):
                return _link_words(k, offset), k, offset
    return None


def _link_words(factor: float, offset: float) -> str:
    value = "1 + it" if offset else "it"
    return "" if (factor, offset) == (1.0, 0.0) else value if factor == 1.0 else f"{factor:.6g} * ({value})"


def _new(values: Array) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=torch.float64), requires_grad=False)


def resize(identity: NormIdentity, shape: Sequence[int]) -> NormIdentity | None:
    """The identity for inputs of a shape, from that of a smaller one; None if its scale or bias cannot be extended."""
    if identity.elements:
        return identity if tuple(shape[-len(identity.elements) :]) == identity.elements else None
    features = shape[identity.channel_axis]
    if identity.features == features:
        return identity
    tensors = [identity.weight, identity.bias_parameter, *identity.statistics.values()]
    if any(t is not None and float(t.max() - t.min()) > SAME * float(t.abs().max()) for t in tensors):
        return None

    def longer(tensor: Tensor) -> Tensor:
        return tensor.detach().flatten()[:1].repeat(features)

    old = (identity.weight, identity.bias_parameter)
    weight, bias = (None if t is None else nn.Parameter(longer(t), requires_grad=False) for t in old)
    statistics = {name: longer(value) for name, value in identity.statistics.items()}
    return dataclasses.replace(identity, features=features, weight=weight, bias_parameter=bias, statistics=statistics)


def confirm(probe: NormProbe, identity: NormIdentity, *, samples: Array) -> NormIdentity:
    """The identity, if its replacement agrees with the norm at the samples and beyond."""
    shape = samples.shape[1:]
    if (off := output_difference(probe, identity, x=samples)) > AGREES:
        raise SpecError(f"the replacement of {probe.name} differs from it by {off:.1e}; please report this")
    for scale in (1e-6, 1e4, 1e6):
        if (off := output_difference(probe, identity, x=inputs((2, *shape), seed=8, scale=scale))) > _BEYOND:
            return _beyond(identity, f"for values of about {scale:g} it differs from that by {off:.1e}")
    if output_difference(probe, identity, x=np.zeros((2, *shape))) > _BEYOND:
        return _beyond(identity, "for rows of equal values it gives something else (IBNorm gives the bias, or NaN)")
    return identity


def _beyond(identity: NormIdentity, words: str) -> NormIdentity:
    return dataclasses.replace(
        identity,
        spec=None,
        kind=f"{identity.kind}, not everywhere",
        difference=f"it is {identity.spec} only for most values: {words}",
    )


def output_difference(probe: NormProbe, identity: NormIdentity, *, x: Array) -> float:
    """Of the replacement from the norm, relative to the norm of the output; infinite if NaN is elsewhere."""
    replacement = copy.deepcopy(identity.replacement()).cpu().to(torch.float64).eval()
    expected = probe(x)
    with torch.no_grad():
        got = replacement(torch.tensor(x)).numpy()
    if not np.array_equal(np.isnan(got), np.isnan(expected)):
        return math.inf
    off, norm = (float(np.linalg.norm(np.nan_to_num(values))) for values in (got - expected, expected))
    return off / norm if norm else off
