"""Identify a norm whose statistics are those of its input: over the last axis, the channels, or several axes."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ibnorm_export.errors import SpecError
from ibnorm_export.op.identification.fitting import (
    COMPRESSIONS,
    OTHER_COMPRESSIONS,
    Fit,
    affine,
    fit,
    refine,
    snap,
)
from ibnorm_export.op.identification.forms import FAMILY, NEIGHBOURS
from ibnorm_export.op.identification.norm_identity import NormIdentity
from ibnorm_export.op.identification.probe import NormProbe, Structure, inputs, perturbed, samples, structure, trimmed
from ibnorm_export.op.identification.running_statistics import identify_pointwise
from ibnorm_export.op.spec import Grouping, IBNormSpec

__all__ = ["identify_at"]

Array = NDArray[np.float64]

#: A scale or bias that differs by less, relative to the largest, is the same: the fit has an error of 1e-15 to 1e-13.
_SAME: Final = 1e-12

#: A replacement differs from the norm by at most this, relative to the norm of the output.
_AGREES: Final = 1e-12

#: The same for inputs beyond the samples, where rounding is larger.
_BEYOND: Final = 1e-9

_NO_FORMULA: Final = "no known formula explains its output"

#: A formula is searched for with about so many values; what is found is confirmed with all.
_SEARCHED: Final = 50_000


@dataclass(frozen=True, slots=True)
class _Groups:
    """How arrays (samples, *shape) become groups (samples, outer, G), and back.

    Args:
        shape: shape of one sample.
        axes: axes of one sample that share statistics.
        parts: into how many groups the first of these axes is divided.
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...]
    parts: int = 1

    def _order(self) -> list[int]:
        return [axis for axis in range(len(self.shape)) if axis not in self.axes] + list(self.axes)

    @property
    def size(self) -> int:
        """G, the number of values that share statistics."""
        return math.prod(self.shape[axis] for axis in self.axes) // self.parts

    def split(self, values: Array) -> Array:
        """(samples, *shape) -> (samples, outer, G)."""
        moved = values.transpose(0, *(axis + 1 for axis in self._order()))
        return np.ascontiguousarray(moved).reshape(len(values), -1, self.size)

    def join(self, values: Array) -> Array:
        """(outer, G) -> shape."""
        order = self._order()
        moved = values.reshape([self.shape[axis] for axis in order])
        return np.asarray(moved.transpose(np.argsort(order)))


def _spec_grouping(axes: tuple[int, ...], rank: int) -> tuple[Grouping | None, str]:
    """The grouping of statistics over some axes of an input of a rank, and its words."""
    if axes == (rank - 1,):
        return Grouping.LAST, "last axis"
    if axes == (1,):
        return Grouping.LAST, "channels (axis 1)"
    if axes == tuple(range(axes[0], rank)):
        return Grouping.AXES, f"axes {list(axes)}"
    return None, f"axes {list(axes)}"


class _Rows:
    """Samples of a norm, in groups.

    Args:
        probe: the norm.
        shape: shape of its input, the batch first.
        found: which values share statistics.
    """

    def __init__(self, probe: NormProbe, shape: tuple[int, ...], *, found: Structure) -> None:
        self.probe, self.shape, self.structure = probe, shape, found
        self.groups = _Groups(shape[1:], tuple(axis - 1 for axis in found.axes), found.groups)
        self.inputs = samples(shape[1:])
        self.x = self.groups.split(self.inputs)
        self.y = self.outputs()
        if self.groups.size < 3:
            raise SpecError(
                f"{probe.name} normalises groups of {self.groups.size}, too few to identify; give a larger shape"
            )

    def some(self, y: Array) -> tuple[Array, Array]:
        """Enough of the inputs, and of outputs y, to search for a formula."""
        outer = max(1, _SEARCHED // (len(self.x) // 2 * self.groups.size))
        return self.x[::2, :outer], y[::2, :outer]

    def outputs(self) -> Array:
        """The outputs of the norm with the present values of its parameters, in groups.

        Raises:
            SpecError: the norm cannot be run, or one is not finite.
        """
        y = self.probe(self.inputs)
        if not np.isfinite(y).all():
            rows = ~np.isfinite(y).reshape(len(y), -1).all(1)
            scales = self.inputs.reshape(len(y), -1).std(1)[rows]
            raise SpecError(
                f"{self.probe.name} returns NaN or infinity for inputs with a standard deviation of {scales[0]:.1g}"
            )
        return self.groups.split(y)


def identify_at(
    probe: NormProbe, shape: Sequence[int], *, start: Fit | None = None, explain: bool = True
) -> NormIdentity:
    """Identify a norm that takes inputs of a shape.

    Args:
        probe: the norm.
        shape: shape of an input, the batch first.
        start: the fit of an equal norm, which is tried first.
        explain: find out what a norm is that is not a member; it is only named "unknown" otherwise.

    Raises:
        SpecError: as for `identify`.
    """
    if len(shape) < 2 or min(shape) < 1:
        raise SpecError(f"shape is {tuple(shape)}; it must have the batch first, and at least one more axis")
    probe.check_plain_call(shape)
    small = trimmed(probe, shape)
    with _live(probe, small):
        found = structure(probe, small)
    small = trimmed(probe, shape, axes=found.axes)
    identity = _identify(probe, small, found=found, start=start, explain=explain)
    if not identity or small == tuple(shape):
        return identity
    sized = _at_size(identity, shape)
    if sized is not None and all(small[axis] == shape[axis] for axis in found.axes):
        return sized
    if sized is not None and _difference(probe, sized, inputs(shape, seed=9)) <= _AGREES:
        return sized
    return _identify(probe, tuple(shape), found=found, start=identity.fit, explain=explain)


def _at_size(identity: NormIdentity, shape: Sequence[int]) -> NormIdentity | None:
    """The identity for inputs of a shape, from that of a smaller one; None if its scale or bias cannot be extended."""
    features = shape[identity.channel_axis]
    if identity.features == features:
        return identity
    tensors = [identity.weight, identity.bias_parameter, *identity.statistics.values()]
    if any(t is not None and float(t.max() - t.min()) > _SAME * float(t.abs().max()) for t in tensors):
        return None

    def longer(tensor: Tensor) -> Tensor:
        return tensor.detach().flatten()[:1].repeat(features)

    old = (identity.weight, identity.bias_parameter)
    weight, bias = (None if t is None else nn.Parameter(longer(t), requires_grad=False) for t in old)
    statistics = {name: longer(value) for name, value in identity.statistics.items()}
    return dataclasses.replace(identity, features=features, weight=weight, bias_parameter=bias, statistics=statistics)


def _identify(
    probe: NormProbe, shape: tuple[int, ...], *, found: Structure, start: Fit | None, explain: bool
) -> NormIdentity:
    """Identify a norm of a known structure with samples of a shape."""
    with _live(probe, shape) as is_live:
        if found.axes:
            rows = _Rows(probe, shape, found=found)
            best = _fit_family(rows, start)
            grouping, words = _spec_grouping(found.axes, len(shape))
            if not best.explains or grouping is None or found.groups > 1:
                return _other(rows, best, words=words, start=start, explain=explain)
            effects = _effects(rows, best)
        else:
            identity, tried = identify_pointwise(probe, shape)
    if found.axes:
        assert grouping is not None  # otherwise it is no member, which has been returned
        real = rows if is_live else _Rows(probe, shape, found=found)
        identity, tried = _member(real, best, grouping=grouping, words=words, effects=effects), real.inputs
    return _confirmed(probe, identity, tried) if identity else identity


@contextmanager
def _live(probe: NormProbe, shape: Sequence[int]) -> Iterator[bool]:
    """Make the output depend on the input: parameters that are 0, such as a scale, get other values meanwhile.

    Yields:
        Whether it depended on the input already.
    """
    if _depends_on_input(probe, shape):
        yield True
        return
    parameters = [t for t in dict(probe.copy.named_parameters()).values() if t.is_floating_point()]
    for chosen in [*([p] for p in parameters), parameters]:
        with ExitStack() as changed:
            for parameter in chosen:
                changed.enter_context(perturbed(parameter))
            if _depends_on_input(probe, shape):
                yield False
                return
    raise SpecError(f"the output of {probe.name} does not depend on its input")


def _depends_on_input(probe: NormProbe, shape: Sequence[int]) -> bool:
    one, other = (probe(inputs(shape, seed=seed)) for seed in (6, 7))
    return not np.array_equal(one, other)


def _fit_family(rows: _Rows, start: Fit | None) -> Fit:
    """The best member; S if it explains the outputs, because L and T with a large lambda do so too."""
    if start is not None and start.form is FAMILY:
        again = start.measured(rows.x, rows.y)
        if again.explains:
            return again
        near = refine(start, rows.x, y=rows.y)
        if near.explains:
            return snap(near, rows.x, y=rows.y)
    elif start is not None and refine(start, rows.x, y=rows.y).explains:
        return refine(dataclasses.replace(start, form=FAMILY, bound=math.inf), rows.x, y=rows.y)
    best: Fit | None = None
    x, y = rows.some(rows.y)
    for compression in COMPRESSIONS:
        found = fit(FAMILY, compression, x=x, y=y)
        found = refine(found, rows.x, y=rows.y) if found.explains else found
        if found.explains:
            return snap(found, rows.x, y=rows.y)
        if best is None or found.residual < best.residual:
            best = found
    assert best is not None  # COMPRESSIONS is not empty
    return best


def _saturated(y: Array) -> tuple[NDArray[np.bool_], Array]:
    """Which outputs may be at a bound, and the values that several samples share.

    A position whose largest or smallest value occurs in several samples has a bound there. The same bound may be met by
    one sample at other positions, so that theirs are left out as well.
    """
    mask = np.zeros(y.shape, bool)
    shared = [np.zeros(0)]
    for bound in (y.max(), y.min()):
        at = y == bound
        if at.sum() >= 3:
            mask |= at
            shared.append(y[at])
    for bounds in (y.max(0), y.min(0)):
        at = y == bounds
        several = at.sum(0) >= 2
        if several.any():
            mask |= at
            shared.append(y[at & several])
    return mask, np.unique(np.concatenate(shared))


def _bounded(rows: _Rows) -> tuple[Fit, str] | None:
    """The member that explains the outputs that are not at a bound, and what the bounds are."""
    mask, shared = _saturated(rows.y)
    if not shared.size or mask.mean() > 0.7:
        return None
    y = np.where(mask, np.nan, rows.y)
    for compression in COMPRESSIONS:
        found = fit(FAMILY, compression, x=rows.x, y=y)
        if found.explains:
            low, high = float(rows.y.min()), float(rows.y.max())
            if len(shared) == 1:
                side = "below" if shared[0] == low else "above"
                words = f"values {side} {shared[0]:g} are cut off, as in an activation"
            else:
                words = f"the output is clipped, between {low:.6g} and {high:.6g} at most"
            return snap(found, rows.x, y=y), words
    return None


def _other(rows: _Rows, nearest: Fit, *, words: str, start: Fit | None = None, explain: bool = True) -> NormIdentity:
    """What a norm is that is not a member, and how far off the nearest member is."""
    kind, sentence, found = "unknown", _NO_FORMULA, None
    if explain:
        kind, sentence, found = _named(rows, nearest, words=words, start=start)
    identity = NormIdentity(
        rows.probe.original,
        None,
        kind=kind,
        residual=nearest.residual if found is None else found.residual,
        features=rows.groups.size,
        lambd=None if found is None else found.lambd,
        epsilon=None if found is None else found.epsilon,
        grouping=words,
        parameters=dict.fromkeys(rows.probe.tensors(), "kept as it is"),
        fit=found,
    )
    formula = "" if found is None else f", with {_numbers(found)} (residual {found.residual:.1e})"
    member = f". The nearest member, IBNorm-{nearest.compression} with {_numbers(nearest)}, is off by "
    member = "" if nearest.explains else f"{member}{nearest.residual:.1e}"
    return dataclasses.replace(identity, difference=f"{sentence}{formula}{member}")


def _numbers(found: Fit) -> str:
    bound = f", bound {found.bound:.6g}" if math.isfinite(found.bound) else ""
    return f"lambda {found.lambd:.6g} and epsilon {found.epsilon:.6g}{bound}"


def _named(rows: _Rows, nearest: Fit, *, words: str, start: Fit | None) -> tuple[str, str, Fit | None]:
    """Kind, sentence and fit of a norm that is not a member."""
    if nearest.explains:  # the formula is right, but not the values that share statistics
        over = f"{rows.structure.groups} groups of {words}" if rows.structure.groups > 1 else words
        kind = f"{nearest.compression}, statistics over {over}"
        return kind, f"the statistics are those of {over}, which IBNorm does not have", nearest
    if bounded := _bounded(rows):
        found, sentence = bounded
        return f"{found.compression}, clipped output", sentence, found
    if start is not None and start.form is not FAMILY:
        again = refine(start, rows.x, y=rows.y)
        if again.explains:
            return _kind(again), again.form.sentence, snap(again, rows.x, y=rows.y)
    if (match := _neighbour(rows, nearest)) is not None:
        sentence = match.form.sentence
        if match.form is FAMILY:
            sentence = f"the compression is {match.compression}, not S, L or T"
        return _kind(match), sentence, match
    return "unknown", _NO_FORMULA, None


def _neighbour(rows: _Rows, nearest: Fit) -> Fit | None:
    """The form outside the family that explains the outputs, if one does."""
    x, y = rows.some(rows.y)
    kinds = [nearest.compression, *(g for g in COMPRESSIONS if g != nearest.compression)]
    pairs = [(form, g) for g in kinds for form in NEIGHBOURS] + [(FAMILY, g) for g in OTHER_COMPRESSIONS]
    # Most differences leave the lambda of the nearest member about right, so that one search near it finds them.
    for near in (nearest.lambd, None):
        for form, compression in pairs:
            found = fit(form, compression, x=x, y=y, near=near)
            if found.explains and (everywhere := refine(found, rows.x, y=rows.y)).explains:
                return snap(everywhere, rows.x, y=rows.y)
    return None


def _kind(found: Fit) -> str:
    if found.form.name == "no mean" and found.compression == "S":
        return "RMSNorm"
    return ", ".join(filter(None, (found.compression, found.form.name)))


@dataclass(frozen=True, slots=True)
class _Effect:
    """What another value of one parameter or buffer changes.

    Args:
        role: what the tensor is, in words.
        value: the other value, flat.
        scale: the scale with it, for each position of a sample.
        bias: the bias with it, in the same way.
    """

    role: str
    value: Array
    scale: Array
    bias: Array


def _effects(rows: _Rows, best: Fit) -> dict[str, _Effect]:
    """Change every parameter and buffer of a member, one after the other.

    Raises:
        SpecError: the change has an effect that no member has.
    """
    (z,) = best.columns(rows.x)
    scale, bias = affine(z, rows.y)
    found = {}
    for name, tensor in rows.probe.tensors().items():
        with perturbed(tensor):
            value = tensor.to(torch.float64).flatten().numpy().copy()
            try:
                y = rows.outputs()
            except SpecError as error:
                raise SpecError(
                    f"{name} of {rows.probe.name} cannot be explained: with another value, {error}"
                ) from error
        if np.array_equal(y, rows.y):
            found[name] = _Effect("has no effect", value, scale, bias)
            continue
        if not best.measured(rows.x, y).explains:
            found[name] = _Effect(_formula_role(rows, best, y, name=name), value, scale, bias)
            continue
        new_scale, new_bias = affine(z, y)
        size = float(np.abs(new_scale).max() + np.abs(new_bias).max())
        changes = [
            word
            for word, old, new in (("scale", scale, new_scale), ("bias", bias, new_bias))
            if np.abs(new - old).max() > _SAME * size
        ]
        found[name] = _Effect(" and ".join(changes) or "has no effect", value, new_scale, new_bias)
    return found


def _formula_role(rows: _Rows, best: Fit, y: Array, *, name: str) -> str:
    """Whether a tensor is lambda or epsilon, given the outputs with another value of it."""
    start = best if best.epsilon > 0 else dataclasses.replace(best, epsilon=1e-3)
    changed = refine(start, rows.x, y=y)
    if not changed.explains:
        changed = fit(FAMILY, best.compression, x=rows.x, y=y)
    if not changed.explains:
        raise SpecError(
            f"{name} of {rows.probe.name} has an effect that is not that of a scale, a bias, lambda or epsilon: with "
            f"another value, IBNorm-{best.compression} is off by {changed.residual:.1e}"
        )
    moved = {"lambda": (best.lambd, changed.lambd), "epsilon": (best.epsilon, changed.epsilon)}
    return " and ".join(word for word, (old, new) in moved.items() if abs(new - old) > 1e-6 * max(old, new))


def _channel_axis(rows: _Rows, values: Sequence[Array], *, words: str) -> int | None:
    """The axis that scale and bias (each of the shape of a sample) follow: 1 or -1; None if there is none."""
    rank = len(rows.shape)
    legal = {"last axis": (-1,), "channels (axis 1)": (1,)}.get(words, (1, -1))
    for axis in legal:
        others = tuple(i for i in range(rank - 1) if i != (axis - 1) % rank) if axis == 1 else tuple(range(rank - 2))
        size = sum(float(np.abs(v).max()) for v in values)
        if all(float(np.ptp(v, axis=others).max()) <= _SAME * size for v in values if others):
            return axis
    return None


def _per_channel(values: Array, axis: int) -> Array:
    """(shape of a sample) -> (features,), the mean over all other axes."""
    moved = np.moveaxis(values, 0 if axis == 1 else -1, 0)
    return np.asarray(moved.reshape(moved.shape[0], -1).mean(1))


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
            if all(np.abs(t - k * (offset + p)).max() <= _SAME * size for t, p in pairs):
                return _link_words(k, offset), k, offset
    return None


def _link_words(factor: float, offset: float) -> str:
    value = "1 + it" if offset else "it"
    return "" if (factor, offset) == (1.0, 0.0) else value if factor == 1.0 else f"{factor:.6g} * ({value})"


class _Affine:
    """The scale or the bias of a member: the parameter that it is, or a new one.

    Args:
        rows: samples with the real values of all parameters.
        word: "scale" or "bias".
        target: its values (features,).
        size: a difference is judged relative to it.
    """

    def __init__(self, rows: _Rows, word: str, *, target: Array, size: float) -> None:
        self._own = dict(rows.probe.original.named_parameters())
        self._word, self._target, self._size = word, target, size
        self.neutral = 1.0 if word == "scale" else 0.0
        self.roles: dict[str, str] = {}

    def parameter(self, effects: Mapping[str, _Effect], axis: int) -> nn.Parameter | None:
        """The parameter; None if there is none and the values are neutral."""
        features = len(self._target)
        named = {name: effect for name, effect in effects.items() if effect.role == self._word}
        for name, effect in named.items():
            changed = _per_channel(effect.scale if self._word == "scale" else effect.bias, axis)
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
                return _new(factor * (offset + now))
            if tuple(self._own[name].shape) == (features,):
                return self._own[name]
            flat = self._own[name].detach().flatten().expand(features)
            return nn.Parameter(flat, requires_grad=self._own[name].requires_grad)
        self.roles |= dict.fromkeys(named, f"part of the {self._word}")
        if not named and np.abs(self._target - self.neutral).max() <= _SAME * self._size:
            return None
        return _new(self._target)


def _new(values: Array) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=torch.float64), requires_grad=False)


def _member(rows: _Rows, best: Fit, *, grouping: Grouping, words: str, effects: Mapping[str, _Effect]) -> NormIdentity:
    """The identity of a member, from samples with the real values of all parameters."""
    (z,) = best.columns(rows.x)
    scales, biases = (rows.groups.join(values) for values in affine(z, rows.y))
    joined = {
        name: dataclasses.replace(e, scale=rows.groups.join(e.scale), bias=rows.groups.join(e.bias))
        for name, e in effects.items()
    }
    axis = _channel_axis(rows, [scales, biases, *(v for e in joined.values() for v in (e.scale, e.bias))], words=words)
    if axis is None:
        return _other(rows, best, words=f"{words}, with a scale and bias for each element")
    scale, bias = _per_channel(scales, axis), _per_channel(biases, axis)
    size = float(np.abs(scale).max() + np.abs(bias).max())
    found = [_Affine(rows, w, target=t, size=size) for w, t in (("scale", scale), ("bias", bias))]
    weight, shift = (part.parameter(joined, axis) for part in found)
    first = rows.structure.axes[0]
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
        grouping=words,
        weight=weight,
        bias_parameter=shift,
        parameters={name: found[0].roles.get(name) or found[1].roles.get(name) or e.role for name, e in joined.items()},
        fit=best,
    )


def _difference(probe: NormProbe, identity: NormIdentity, x: Array) -> float:
    """Of the replacement from the norm, relative to the norm of the output; infinite if NaN is elsewhere."""
    replacement = copy.deepcopy(identity.replacement()).cpu().to(torch.float64).eval()
    expected = probe(x)
    with torch.no_grad():
        got = replacement(torch.tensor(x)).numpy()
    if not np.array_equal(np.isnan(got), np.isnan(expected)):
        return math.inf
    off, norm = (float(np.linalg.norm(np.nan_to_num(values))) for values in (got - expected, expected))
    return off / norm if norm else off


def _confirmed(probe: NormProbe, identity: NormIdentity, samples: Array) -> NormIdentity:
    """The identity, if its replacement agrees with the norm at the samples and beyond."""
    shape = samples.shape[1:]
    if (off := _difference(probe, identity, samples)) > _AGREES:
        raise SpecError(f"the replacement of {probe.name} differs from it by {off:.1e}; please report this")
    for scale in (1e-6, 1e4, 1e6):
        if (off := _difference(probe, identity, inputs((2, *shape), seed=8, scale=scale))) > _BEYOND:
            return _beyond(identity, f"for values of about {scale:g} it differs from that by {off:.1e}")
    if _difference(probe, identity, np.zeros((2, *shape))) > _BEYOND:
        return _beyond(identity, "for rows of equal values it gives something else (IBNorm gives the bias, or NaN)")
    return identity


def _beyond(identity: NormIdentity, words: str) -> NormIdentity:
    return dataclasses.replace(
        identity,
        spec=None,
        kind=f"{identity.kind}, not everywhere",
        difference=f"it is {identity.spec} only for most values: {words}",
    )
