"""Identify a norm with running statistics: in evaluation mode it is element-wise.

    y = A[c] * g((x - m[c]) / lambda) + B[c]          c: channel

A member of the family has such an output; `m` is the running mean of x, and A and B follow from scale, bias and the
running statistics of the compressed values. How these divide A and B between them does not change the output. The
division here keeps the norm's own scale and bias.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ibnorm_export.errors import SpecError
from ibnorm_export.op.identification.fitting import COMPRESSIONS, MEMBER_RESIDUAL, affine, candidates, residual
from ibnorm_export.op.identification.norm_identity import NormIdentity
from ibnorm_export.op.identification.probe import NormProbe, perturbed
from ibnorm_export.op.spec import Grouping, IBNormSpec

__all__ = ["identify_pointwise"]

Array = NDArray[np.float64]

_SAME: Final = 1e-11
_LAMBDAS: Final = (0.05, 0.2, 0.5, 1.0, 2.0, 4.0, 8.0, 20.0)

#: Distances of the inputs from each place that may be a mean.
_OFFSETS: Final = tuple(sign * scale for scale in np.geomspace(1e-2, 1e2, 12) for sign in (-1.0, 1.0))

GROUPING_WORDS: Final = "batch (running statistics)"


@dataclass(frozen=True, slots=True)
class _Curve:
    """y = A * g((x - mean) / lambd) + B for each position; arrays (positions,)."""

    compression: str
    lambd: float
    mean: Array
    residual: float = np.inf

    def z(self, x: Array) -> Array:
        with np.errstate(all="ignore"):
            return COMPRESSIONS[self.compression]((x - self.mean) / self.lambd)

    def measured(self, x: Array, y: Array) -> _Curve:
        return replace(self, residual=residual((self.z(x),), y)[1])

    @property
    def explains(self) -> bool:
        return self.residual <= MEMBER_RESIDUAL


def _refined(start: _Curve, x: Array, y: Array) -> _Curve:
    """Damped Gauss-Newton iteration: lambda is shared by all positions, and each has its own mean."""
    best = start.measured(x, y)
    if best.compression == "S":
        return best
    damping = 1e-4
    for _ in range(40):
        rest = residual((best.z(x),), y)[0]
        step = 1e-7
        by_lambda = (residual((replace(best, lambd=best.lambd * (1 + step)).z(x),), y)[0] - rest) / step
        by_mean = (residual((replace(best, mean=best.mean + step * best.lambd).z(x),), y)[0] - rest) / step
        improved = False
        for _ in range(6):
            own = (by_mean**2).sum(0) * (1 + damping) + 1e-300
            both, right = (by_mean * by_lambda).sum(0), (by_mean * rest).sum(0)
            schur = (by_lambda**2).sum() * (1 + damping) - (both**2 / own).sum() + 1e-300
            log_lambda = -((by_lambda * rest).sum() - (both * right / own).sum()) / schur
            shift = np.clip((-right - both * log_lambda) / own, -3.0, 3.0)
            trial = replace(
                best, lambd=best.lambd * float(np.exp(np.clip(log_lambda, -1, 1))), mean=best.mean + shift * best.lambd
            ).measured(x, y)
            if trial.residual < best.residual:
                improved, damping = True, max(damping / 10, 1e-12)
                break
            damping *= 10
        if not improved:
            return best
        best = trial
    return best


class _Points:
    """Samples of an element-wise norm: x and y (samples, positions).

    Args:
        probe: the norm.
        shape: shape of its input, the batch first.
    """

    def __init__(self, probe: NormProbe, shape: tuple[int, ...]) -> None:
        self.probe, self.shape = probe, shape[1:]
        self.means = [np.zeros(self.shape), *self._own_values()]
        rng = np.random.default_rng(23)
        rows = [mean + offset * rng.uniform(0.7, 1.4, self.shape) for mean in self.means for offset in _OFFSETS]
        self.inputs = np.stack(rows)
        self.x = self.inputs.reshape(len(rows), -1)
        self.y = self.outputs()

    def _own_values(self) -> list[Array]:
        """Values of each buffer and parameter that has one value for each channel, in the shape of a sample."""
        found = []
        for tensor in self.probe.tensors().values():
            flat = tensor.detach().to(torch.float64).flatten().numpy()
            for axis in (0, len(self.shape) - 1):
                if tensor.is_floating_point() and flat.size == self.shape[axis]:
                    shape = [-1 if i == axis else 1 for i in range(len(self.shape))]
                    found.append(np.broadcast_to(flat.reshape(shape), self.shape).copy())
                    break
        return found

    def outputs(self) -> Array:
        return self.probe(self.inputs).reshape(len(self.inputs), -1)

    def fitted(self, y: Array, start: _Curve | None = None) -> _Curve:
        """The curve that explains y best; S if it does."""
        if start is not None and (near := _refined(start, self.x, y)).explains:
            return near
        best: _Curve | None = None
        for compression in COMPRESSIONS:
            grid = [
                _Curve(compression, lambd, mean.ravel()).measured(self.x, y)
                for lambd in ((1.0,) if compression == "S" else _LAMBDAS)
                for mean in (self.means[:1] if compression == "S" else self.means)
            ]
            for point in sorted(grid, key=lambda curve: curve.residual)[:3]:
                found = _refined(point, self.x, y)
                if found.explains:
                    return self._snapped(found, y)
                best = found if best is None or found.residual < best.residual else best
        assert best is not None  # COMPRESSIONS is not empty
        return best

    def _snapped(self, found: _Curve, y: Array) -> _Curve:
        """The same curve with the norm's own mean, and with the simplest lambda."""
        if found.compression == "S":
            return found
        limit = max(3 * found.residual, 1e-14)
        for mean in self.means:
            near = np.abs(mean.ravel() - found.mean).max() <= 1e-6 * (np.abs(found.mean).max() + found.lambd)
            if near:
                found = replace(found, mean=mean.ravel()).measured(self.x, y)
                break
        for lambd in candidates(found.lambd, ()):
            trial = replace(found, lambd=lambd).measured(self.x, y)
            if trial.residual <= max(limit, found.residual):
                return trial
        return found


@dataclass(frozen=True, slots=True)
class _Values:
    """A, B, m and lambda of a curve, with one value for each channel, and the value of the tensor that was changed."""

    lambd: float
    factor: Array
    offset: Array
    mean: Array
    tensor: Array


def identify_pointwise(probe: NormProbe, shape: tuple[int, ...]) -> tuple[NormIdentity, Array]:
    """Identify a norm of which each output depends on one input element.

    Args:
        probe: the norm.
        shape: a small input shape that it takes.

    Returns:
        Its identity, and the inputs that it was found with.

    Raises:
        SpecError: a parameter or buffer has an effect that is not explained.
    """
    points = _Points(probe, shape)
    best = points.fitted(points.y)
    if not best.explains:
        return _other(points, f"no known formula explains it (off by {best.residual:.1e})")
    axis = _axis(points, best)
    if axis is None:
        return _other(points, "its scale or bias differs at every position, not only by channel")
    now = _values(points, best, points.y, axis=axis, tensor=np.zeros(0))
    effects = {name: _effect(points, best, now, axis=axis, name=name) for name in probe.tensors()}
    buffers = dict(probe.copy.named_buffers())
    if not any(role != "has no effect" for name, (role, _) in effects.items() if name in buffers):
        formula = f"y = a * {best.compression}((x - m) / {best.lambd:.6g}) + b"
        return _other(points, f"no running statistics take part in it; it is {formula}")
    division = _Division(points, now, effects)
    identity = NormIdentity(
        probe.original,
        IBNormSpec(
            best.compression,
            best.lambd,
            epsilon=division.epsilon,
            scale=division.weight is not None,
            bias=division.bias is not None,
            grouping=Grouping.BATCH,
        ),
        kind=best.compression,
        residual=best.residual,
        features=len(now.factor),
        lambd=best.lambd,
        epsilon=division.epsilon,
        channel_axis=axis,
        grouping=GROUPING_WORDS,
        weight=division.weight,
        bias_parameter=division.bias,
        statistics=division.statistics(),
        parameters={name: role for name, (role, _) in effects.items()},
    )
    return identity, points.inputs


def _other(points: _Points, words: str) -> tuple[NormIdentity, Array]:
    identity = NormIdentity(
        points.probe.original,
        None,
        kind="element-wise",
        residual=np.inf,
        features=points.shape[-1],
        grouping="none",
        parameters=dict.fromkeys(points.probe.tensors(), "kept as it is"),
        difference=f"each output depends on one input element only, and {words}",
    )
    return identity, points.inputs


def _axis(points: _Points, curve: _Curve) -> int | None:
    """The axis that A, B and m follow: 1 or -1."""
    rank = len(points.shape)
    factor, offset = affine(curve.z(points.x), points.y)
    size, width = np.abs(factor).max() + np.abs(offset).max(), np.abs(curve.mean).max() + curve.lambd
    arrays = [v.reshape(points.shape) for v in (factor / size, offset / size, curve.mean / width)]
    for axis, own in ((1, 0), (-1, rank - 1)):
        others = tuple(i for i in range(rank) if i != own)
        if all(float(np.ptp(v, axis=others).max()) <= 1e-9 for v in arrays if others):
            return axis
    return None


def _values(points: _Points, curve: _Curve, y: Array, *, axis: int, tensor: Array) -> _Values:
    def channel(values: Array) -> Array:
        moved = np.moveaxis(values.reshape(points.shape), 0 if axis == 1 else -1, 0)
        return np.asarray(moved.reshape(moved.shape[0], -1).mean(1))

    factor, offset = (channel(v) for v in affine(curve.z(points.x), y))
    return _Values(curve.lambd, factor, offset, channel(curve.mean), tensor)


def _effect(points: _Points, best: _Curve, now: _Values, *, axis: int, name: str) -> tuple[str, _Values]:
    """What another value of one parameter or buffer changes, in words and in numbers."""
    tensor = points.probe.tensors()[name]
    with perturbed(tensor):
        value = tensor.detach().to(torch.float64).flatten().numpy().copy()
        y = points.outputs()
    if np.array_equal(y, points.y):
        return "has no effect", replace(now, tensor=value)
    curve = best.measured(points.x, y)
    if not curve.explains:
        start = replace(best, mean=value.repeat(best.mean.size // value.size)) if value.size == best.mean.size else best
        curve = points.fitted(y, best if start is best else start)
    if not curve.explains or curve.compression != best.compression:
        raise SpecError(
            f"{name} of {points.probe.name} has an effect that is not that of a scale, a bias, lambda or a running "
            f"statistic (off by {curve.residual:.1e})"
        )
    new = _values(points, curve, y, axis=axis, tensor=value)
    is_parameter = name in dict(points.probe.copy.named_parameters())

    def moved(old: Array, other: Array) -> bool:
        return bool(np.abs(old - other).max() > 1e-9 * (np.abs(now.factor).max() + np.abs(now.offset).max()))

    if abs(new.lambd - now.lambd) > 1e-6 * now.lambd:
        return "lambda", new
    if moved(now.mean, new.mean):
        return "running mean", new
    if moved(now.factor, new.factor):
        return ("scale" if is_parameter else "running variance"), new
    linear = best.compression == "S"
    buffer = "running mean" if linear else "running mean of the compressed values"
    return ("bias" if is_parameter else buffer), new


class _Division:
    """How scale, bias and running statistics divide A and B between them.

    Args:
        points: samples of the norm.
        now: its A, B and m.
        effects: what its tensors change.
    """

    def __init__(self, points: _Points, now: _Values, effects: Mapping[str, tuple[str, _Values]]) -> None:
        self._now = now
        own = dict(points.probe.original.named_parameters())
        # The values that the samples were taken with; those of `own` differ where a scale is 0.
        tensors = points.probe.copy.named_parameters()
        self._sampled = {n: t.detach().to(torch.float64).flatten().numpy().copy() for n, t in tensors}
        name = next((n for n in self._named(effects, "bias") if self._is_bias(n, effects[n][1])), None)
        self.bias = None if name is None else own[name]
        shift = 0.0 if name is None else self._sampled[name]
        self.weight: nn.Parameter | None = None
        self._gain, self._centre = now.factor, shift - now.offset  # y = weight * (gain * c - centre) + bias
        for name in self._named(effects, "scale"):
            changed = effects[name][1]
            for plus in (0.0, 1.0):
                gain = changed.factor / (plus + changed.tensor)
                if np.abs(gain * (plus + self._sampled[name]) - now.factor).max() <= _SAME * np.abs(now.factor).max():
                    self._gain, self._centre = gain, (shift - changed.offset) / (plus + changed.tensor)
                    self.weight = (
                        own[name] if plus == 0.0 else _new(1.0 + own[name].detach().cpu().double().flatten().numpy())
                    )
                    break
            if self.weight is not None:
                break
        if not (self._gain > 0).all():  # a scale that is not a parameter, or of the other sign
            self.weight = _new(self._now.factor)
            self._gain, self._centre = np.ones_like(now.factor), np.zeros_like(now.factor)
            self.bias = _new(self._now.offset)
        self.epsilon = self._epsilon(points, effects)

    def _named(self, effects: Mapping[str, tuple[str, _Values]], role: str) -> list[str]:
        """Parameters with a role and one value for each channel, in one dimension."""
        size = self._now.factor.size
        return [n for n, (found, _) in effects.items() if found == role and self._sampled[n].size == size]

    def _is_bias(self, name: str, changed: _Values) -> bool:
        size = np.abs(self._now.offset).max() + np.abs(self._sampled[name]).max()
        moved = changed.offset - self._now.offset - (changed.tensor - self._sampled[name])
        return bool(np.abs(moved).max() <= _SAME * (1.0 + size))

    def _epsilon(self, points: _Points, effects: Mapping[str, tuple[str, _Values]]) -> float:
        """Epsilon from how A follows the running variance v: A^2 (v + epsilon) is constant."""
        for name, (role, changed) in effects.items():
            if role != "running variance":
                continue
            before, after = self._now.factor**2, changed.factor**2
            v = dict(points.probe.copy.named_buffers())[name].detach().to(torch.float64).flatten().numpy()
            if v.size != before.size or not (before != after).all():
                continue
            value = float(np.median((after * changed.tensor - before * v) / (before - after)))
            for epsilon in candidates(value, ()) if value > 1e-13 else (0.0,):
                product = before * (v + epsilon) - after * (changed.tensor + epsilon)
                fits = np.abs(product).max() <= _SAME * np.abs(before * v).max()
                if fits and (1.0 / self._gain**2 >= epsilon).all():
                    return epsilon
        return 0.0

    def statistics(self) -> dict[str, torch.Tensor]:
        """The buffers of the replacement."""
        arrays = {
            "running_mean": self._now.mean,
            "compressed_mean": self._centre / self._gain,
            "compressed_var": 1.0 / self._gain**2 - self.epsilon,
        }
        return {name: torch.tensor(values, dtype=torch.float64) for name, values in arrays.items()}


def _new(values: Array) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=torch.float64), requires_grad=False)
