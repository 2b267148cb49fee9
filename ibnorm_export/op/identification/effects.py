"""What every parameter and buffer of a norm does, found by changing one after the other."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from ibnorm_export.errors import SpecError
from ibnorm_export.op.identification.fitting import Array, Fit, affine, fit, refine
from ibnorm_export.op.identification.forms import FAMILY
from ibnorm_export.op.identification.probe import perturbed
from ibnorm_export.op.identification.rows import Rows

__all__ = ["SAME", "Effect", "find_effects"]

#: A scale or bias that differs by less, relative to the largest, is the same: the fit has an error of 1e-15 to 1e-13.
SAME: Final = 1e-12


@dataclass(frozen=True, slots=True)
class Effect:
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


def find_effects(rows: Rows, best: Fit) -> dict[str, Effect]:
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
            found[name] = Effect("has no effect", value, scale, bias)
            continue
        if not best.measured(rows.x, y).explains:
            found[name] = Effect(_formula_role(rows, best, y, name=name), value, scale, bias)
            continue
        new_scale, new_bias = affine(z, y)
        size = float(np.abs(new_scale).max() + np.abs(new_bias).max())
        changes = [
            word
            for word, old, new in (("scale", scale, new_scale), ("bias", bias, new_bias))
            if np.abs(new - old).max() > SAME * size
        ]
        found[name] = Effect(" and ".join(changes) or "has no effect", value, new_scale, new_bias)
    return found


def _formula_role(rows: Rows, best: Fit, y: Array, *, name: str) -> str:
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
