"""Sizes of a model's dynamic axes for an engine: what the user says, and defaults from the model's own metadata.

A model with a cache gets two profiles, since one kernel is not the best for both: "prefill" takes a prompt and
no past, "decode" one token behind a past. Every other model has one, "default". No default exceeds the longest
sequence that the model was made for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Final

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.errors import EngineError

__all__ = ["Profile", "Range", "axes_of", "fitting_profile", "parse_ranges", "profiles", "profiles_of", "shapes_of"]

_PAST: Final = "past"
_TOTAL: Final = "total"


@dataclass(frozen=True, slots=True)
class Range:
    """Sizes of one axis: the smallest, the one to optimise for, the largest.

    Args:
        axis: its name in the model.
        smallest, optimal, largest: at least 1; `past` may be 0, which is a prompt without a past.
        profile: that it is for; empty is every one.

    Raises:
        EngineError: a size is too small, or they are not in order.
    """

    axis: str
    smallest: int
    _: KW_ONLY
    optimal: int
    largest: int
    profile: str = ""

    def __post_init__(self) -> None:
        least = 0 if self.axis == _PAST else 1
        if not least <= self.smallest <= self.optimal <= self.largest:
            raise EngineError(
                f"profile {self.axis}={self.smallest}x{self.optimal}x{self.largest}: the sizes must be at least "
                f"{least} and in order, MINxOPTxMAX"
            )


@dataclass(frozen=True, slots=True)
class Profile:
    """One optimisation profile: a range for every dynamic axis of the model."""

    name: str
    ranges: tuple[Range, ...]


def parse_ranges(texts: Sequence[str]) -> tuple[Range, ...]:
    """Ranges from "[PROFILE:]AXIS=MINxOPTxMAX".

    Raises:
        EngineError: a text is not of that form, names an axis twice, or has sizes out of order.
    """
    found: dict[tuple[str, str], Range] = {}
    for text in texts:
        name, _, sizes = text.partition("=")
        which, _, axis = name.rpartition(":")
        parts = sizes.split("x")
        if not axis or len(parts) != 3 or not all(part.isascii() and part.isdigit() for part in parts):
            raise EngineError(
                f"profile is {text!r}; it must be NAME=MINxOPTxMAX, as in sequence=1x128x2048 or decode:batch=1x8x32"
            )
        if (which, axis) in found:
            raise EngineError(f"profile {name!r} is given twice")
        smallest, optimal, largest = map(int, parts)
        found[which, axis] = Range(axis, smallest, optimal=optimal, largest=largest, profile=which)
    return tuple(found.values())


def axes_of(model: ExportedModel) -> tuple[str, ...]:
    """Names of the dynamic axes of the inputs, in their order."""
    return tuple(dict.fromkeys(axis for tensor in model.inputs for axis in tensor.shape if isinstance(axis, str)))


Sizes = tuple[int, int, int]


def _defaults(model: ExportedModel, axes: Sequence[str]) -> Mapping[str, Mapping[str, Sizes]]:
    """Sizes by profile and axis. 2048 where the file does not say how long a sequence may be."""
    longest = min(2048, model.max_positions) if model.max_positions > 0 else 2048
    batch, prompt = (1, 1, 8), (1, min(128, longest), longest)
    if _PAST not in axes or "sequence" not in axes:
        return {"default": {"batch": batch, "sequence": prompt}}
    most = longest - 1  # leaves room for the token that is decoded
    past = (min(1, most), min(128, most), most)
    return {
        "prefill": {"batch": batch, "sequence": prompt, _PAST: (0, 0, 0)},
        "decode": {"batch": batch, "sequence": (1, 1, 1), _PAST: past},
    }


def profiles(model: ExportedModel, given: Sequence[Range]) -> tuple[Profile, ...]:
    """A range for every dynamic axis in every profile: what was given for it, else what was given for all, else
    the default; `total` is by default what `past` and `sequence` make together.

    Returns:
        No profile where every axis is fixed.

    Raises:
        EngineError: a range is for an axis or a profile that the model lacks, or for an axis nothing is known.
    """
    axes = axes_of(model)
    defaults = _defaults(model, axes)
    wanted = {(item.profile, item.axis): item for item in given}
    for which, axis in wanted:
        if axis not in axes:
            raise EngineError(f"{model.path} has no dynamic axis {axis!r}; it has {', '.join(axes) or 'none'}")
        if which and which not in defaults:
            raise EngineError(f"{model.path} has no profile {which!r}; it has {', '.join(defaults)}")

    def sizes(name: str, axis: str) -> Sizes | None:
        item = wanted.get((name, axis)) or wanted.get(("", axis))
        return defaults[name].get(axis) if item is None else (item.smallest, item.optimal, item.largest)

    made = []
    for name in defaults if axes else ():
        ranges = []
        for axis in axes:
            found = sizes(name, axis)
            past, sequence = sizes(name, _PAST), sizes(name, "sequence")
            if found is None and axis == _TOTAL and past is not None and sequence is not None:
                found = (past[0] + sequence[0], past[1] + sequence[1], past[2] + sequence[2])
            if found is None:
                raise EngineError(
                    f"{model.path}: no sizes are known for axis {axis!r}: add --profile {axis}=MINxOPTxMAX"
                )
            smallest, optimal, largest = found
            ranges.append(Range(axis, smallest, optimal=optimal, largest=largest, profile=name))
        made.append(Profile(name, tuple(ranges)))
    return tuple(made)


def shapes_of(shape: Sequence[int | str], ranges: Sequence[Range]) -> tuple[tuple[int, ...], ...]:
    """Smallest, optimal and largest shape of one input."""
    sizes = {item.axis: (item.smallest, item.optimal, item.largest) for item in ranges}
    return tuple(tuple(sizes[axis][i] if isinstance(axis, str) else axis for axis in shape) for i in range(3))


def profiles_of(description: Mapping[str, Any]) -> tuple[Profile, ...]:
    """The profiles that an engine's description names, in the engine's order."""
    return tuple(
        Profile(item["name"], tuple(Range(**one) for one in item["ranges"])) for item in description["profiles"]
    )


def fitting_profile(
    candidates: Sequence[Profile],
    axes: Mapping[str, Sequence[int | str]],
    *,
    shapes: Mapping[str, Sequence[int]],
) -> int:
    """Which profile of an engine takes these inputs; of several, the one that was optimised for sizes nearest to them.

    Args:
        candidates: in the engine's order; none where every axis is fixed.
        axes: of every input, by name; a dynamic one is a text.
        shapes: of every input, by name.

    Returns:
        The index to set in an execution context.

    Raises:
        EngineError: an axis has two sizes, or no profile takes them.
    """
    sizes: dict[str, int] = {}
    for name, shape in shapes.items():
        for axis, size in zip(axes[name], shape, strict=True):
            if isinstance(axis, str) and sizes.setdefault(axis, size) != size:
                raise EngineError(f"axis {axis!r} is {sizes[axis]} in one input and {size} in {name}")

    def distance(item: Profile) -> float:
        if any(not one.smallest <= sizes[one.axis] <= one.largest for one in item.ranges):
            return math.inf
        return sum(abs(math.log((sizes[one.axis] + 1) / (one.optimal + 1))) for one in item.ranges)

    if not candidates:
        return 0
    best = min(range(len(candidates)), key=lambda index: distance(candidates[index]))
    if math.isinf(distance(candidates[best])):
        given = ", ".join(f"{axis} {size}" for axis, size in sizes.items())
        taken = "; ".join(
            f"{item.name} takes " + ", ".join(f"{one.axis} {one.smallest} to {one.largest}" for one in item.ranges)
            for item in candidates
        )
        raise EngineError(f"no profile of the engine takes {given}: {taken}; build it with another --profile")
    return best
