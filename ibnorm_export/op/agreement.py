"""Whether two computations agree to rounding in float64, also where rounding is amplified."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = ["NORM_TOLERANCE", "Agreement", "float64_tensors", "perturbed"]

#: The largest relative error of one norm in float64. Two orders of evaluation differ by about ten roundings of 1.1e-16,
#: and by more where the mean is far above the standard deviation: this covers a mean of 1000 standard deviations.
NORM_TOLERANCE: Final = 1e-12

#: Where rounding is amplified (rows that are nearly constant), an error may also be this many times the change that one
#: rounding of every value causes: each side rounds about eight times.
_ROUNDINGS: Final = 16


def float64_tensors(values: Any) -> list[Tensor]:
    """The tensors in any nesting of tuples, lists and dicts, in float64."""
    return [leaf.detach().double() for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def perturbed(values: Any) -> Any:
    """The same nesting, in which every floating-point value is rounded once more in float64, up or down."""

    def perturb(value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        signs = torch.ones(value.numel(), dtype=torch.float64)
        signs[1::2] = -1
        order = torch.randperm(value.numel(), generator=torch.Generator().manual_seed(0))
        return value * (1 + signs[order].reshape(value.shape) * torch.finfo(torch.float64).eps)

    return tree_map_only(Tensor, perturb, values)


def _squares(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> tuple[float, float]:
    """Sums of squares of the difference and of `expected`; infinite where shapes or non-finite values differ."""
    if [a.shape for a in actual] != [e.shape for e in expected]:
        return math.inf, 1.0
    difference = total = 0.0
    for a, e in zip(actual, expected, strict=True):
        finite = torch.isfinite(e)
        if not torch.equal(torch.isfinite(a), finite):
            return math.inf, 1.0
        difference += float(((a - e)[finite] ** 2).sum())
        total += float((e[finite] ** 2).sum())
    return difference, total


@dataclass(slots=True)
class Agreement:
    """Running sums of squares over all values: the error, the expected values, and the change that one rounding causes.

    Args:
        limit: the largest relative error where rounding is not amplified.
    """

    limit: float = NORM_TOLERANCE
    _error: float = field(default=0.0, init=False)
    _expected: float = field(default=0.0, init=False)
    _rounding: float = field(default=0.0, init=False)

    def add(
        self, actual: Sequence[Tensor], expected: Sequence[Tensor], *, rounded: Callable[[], Sequence[Tensor]]
    ) -> None:
        """Add values; `rounded` computes the expected ones from inputs that are `perturbed`."""
        error, squares = _squares(actual, expected)
        self._error += error
        self._expected += squares
        if math.isfinite(error) and error > self.limit**2 * squares:
            change, _ = _squares(rounded(), expected)
            self._rounding += change if math.isfinite(change) else 0.0

    def _relative(self, squares: float) -> float:
        return math.sqrt(squares / self._expected) if self._expected else math.sqrt(squares)

    @property
    def error(self) -> float:
        """The relative error over all values."""
        return self._relative(self._error)

    @property
    def tolerance(self) -> float:
        """The largest error that rounding explains."""
        return self.limit + _ROUNDINGS * self._relative(self._rounding)

    def __bool__(self) -> bool:
        return self.error <= self.tolerance
