"""Sizes of a model's dynamic axes for an engine: what the user says, and defaults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from ibnorm_export.artifact import ExportedModel
from ibnorm_export.errors import EngineError

__all__ = ["Range", "axes_of", "parse_ranges", "profile", "shapes_of"]


@dataclass(frozen=True, slots=True)
class Range:
    """Sizes of one axis: the smallest, the one to optimise for, the largest.

    Raises:
        EngineError: a size is below 1, or they are not in order.
    """

    axis: str
    smallest: int
    optimal: int
    largest: int

    def __post_init__(self) -> None:
        if not 1 <= self.smallest <= self.optimal <= self.largest:
            raise EngineError(
                f"profile {self.axis}={self.smallest}x{self.optimal}x{self.largest}: the sizes must be at least 1 and "
                "in order, MINxOPTxMAX"
            )


#: Where nothing is said. A longer sequence needs --profile sequence=...: a file does not say how long one may be.
_DEFAULTS: Final = {"batch": (1, 1, 8), "sequence": (1, 128, 2048)}


def parse_ranges(texts: Sequence[str]) -> tuple[Range, ...]:
    """Ranges from "NAME=MINxOPTxMAX".

    Raises:
        EngineError: a text is not of that form, names an axis twice, or has sizes out of order.
    """
    found: dict[str, Range] = {}
    for text in texts:
        axis, _, sizes = text.partition("=")
        parts = sizes.split("x")
        if not axis or len(parts) != 3 or not all(part.isascii() and part.isdigit() for part in parts):
            raise EngineError(f"profile is {text!r}; it must be NAME=MINxOPTxMAX, as in sequence=1x128x2048")
        if axis in found:
            raise EngineError(f"profile {axis!r} is given twice")
        found[axis] = Range(axis, *map(int, parts))
    return tuple(found.values())


def axes_of(model: ExportedModel) -> tuple[str, ...]:
    """Names of the dynamic axes of the inputs, in their order."""
    return tuple(dict.fromkeys(axis for tensor in model.inputs for axis in tensor.shape if isinstance(axis, str)))


def profile(model: ExportedModel, given: Sequence[Range]) -> tuple[Range, ...]:
    """One range for every dynamic axis: what was given, else the default for the axis's name.

    Raises:
        EngineError: a range is for an axis that the model lacks, or an axis has neither.
    """
    axes = axes_of(model)
    wanted = {item.axis: item for item in given}
    for name in wanted:
        if name not in axes:
            raise EngineError(f"{model.path} has no dynamic axis {name!r}; it has {', '.join(axes) or 'none'}")
    made = []
    for axis in axes:
        if axis not in wanted and axis not in _DEFAULTS:
            raise EngineError(f"{model.path}: no sizes are known for axis {axis!r}: add --profile {axis}=MINxOPTxMAX")
        made.append(wanted.get(axis) or Range(axis, *_DEFAULTS[axis]))
    return tuple(made)


def shapes_of(shape: Sequence[int | str], ranges: Sequence[Range]) -> tuple[tuple[int, ...], ...]:
    """Smallest, optimal and largest shape of one input."""
    sizes = {item.axis: (item.smallest, item.optimal, item.largest) for item in ranges}
    return tuple(tuple(sizes[axis][i] if isinstance(axis, str) else axis for axis in shape) for i in range(3))
