"""Samples of a norm whose statistics are those of its input, in groups of the values that share them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ibnorm_export.errors import SpecError
from ibnorm_export.op.identification.probe import NormProbe, Structure, samples

__all__ = ["Groups", "Rows"]

Array = NDArray[np.float64]

#: A formula is searched for with about so many values; what is found is confirmed with all.
_SEARCHED: Final = 50_000


@dataclass(frozen=True, slots=True)
class Groups:
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


class Rows:
    """Samples of a norm, in groups.

    Args:
        probe: the norm.
        shape: shape of its input, the batch first.
        found: which values share statistics.
    """

    def __init__(self, probe: NormProbe, shape: tuple[int, ...], *, found: Structure) -> None:
        self.probe, self.shape, self.structure = probe, shape, found
        self.groups = Groups(shape[1:], tuple(axis - 1 for axis in found.axes), found.groups)
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
