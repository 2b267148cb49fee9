"""Sizes of a model's dynamic axes for an engine: from the user, or defaults from the model's metadata.

A model with a cache gets two profiles, because no kernel is best for both: "prefill" takes a prompt without a past, and
"decode" takes one token after a past. Every other model has one profile, "default". No default exceeds the longest
sequence for which the model was made.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Final

from ibnorm_export.artifacts.axes import BATCH, PAST, SEQUENCE, TOTAL, axis_name
from ibnorm_export.artifacts.tensors import DEFAULT_LENGTH, default_length
from ibnorm_export.choices import whole_number
from ibnorm_export.errors import EngineError, quoted

if TYPE_CHECKING:  # the help of a command imports this module, and ONNX takes longer than the help
    from ibnorm_export.artifacts.exported_model import ExportedModel

__all__ = ["Profile", "Range", "axes_of", "fitting_profile", "parse_ranges", "profiles", "shapes_of"]

#: A size of an axis; TensorRT counts in 32 bits.
_SIZE: Final = re.compile("[0-9]{1,9}")


@dataclass(frozen=True, slots=True)
class Range:
    """Sizes of one axis: the smallest, the one to optimise for, and the largest.

    Args:
        axis: name of the axis in the model.
        smallest, optimal, largest: sizes, at least 1; a past may be 0 tokens long, for a prompt.
        profile: name of the profile; empty is every profile.

    Raises:
        EngineError: a size is too small, or the sizes are not in order.
    """

    axis: str
    smallest: int
    _: KW_ONLY
    optimal: int
    largest: int
    profile: str = ""

    def __post_init__(self) -> None:
        minimum = 0 if axis_name(self.axis) == PAST else 1
        for size in (self.smallest, self.optimal, self.largest):
            whole_number(size, name=f"a size of the axis {self.axis}", least=0, error=EngineError)
        if not minimum <= self.smallest <= self.optimal <= self.largest:
            raise EngineError(
                f"profile {self.axis}={self.smallest}x{self.optimal}x{self.largest}: the sizes must be at least "
                f"{minimum} and in order, MINxOPTxMAX"
            )


@dataclass(frozen=True, slots=True)
class Profile:
    """One optimisation profile.

    Args:
        name: its name.
        ranges: a range for every dynamic axis of the model.
    """

    name: str
    ranges: tuple[Range, ...]


def parse_ranges(items: Sequence[Range | str]) -> tuple[Range, ...]:
    """Read ranges from texts of the form "[PROFILE:]AXIS=MINxOPTxMAX"; a `Range` stays as it is.

    Raises:
        EngineError: a text does not have that form, repeats an axis, or has sizes out of order.
    """
    found: dict[tuple[str, str], Range] = {}
    for item in items:
        parsed = item if isinstance(item, Range) else _parse_range(item)
        if (parsed.profile, axis_name(parsed.axis)) in found:
            raise EngineError(f"profile {f'{parsed.profile}:{parsed.axis}'.lstrip(':')!r} is given twice")
        found[parsed.profile, axis_name(parsed.axis)] = parsed
    return tuple(found.values())


def _parse_range(text: str) -> Range:
    name, _, sizes = text.partition("=")
    profile, _, axis = name.rpartition(":")
    parts = sizes.split("x")
    if not axis or len(parts) != 3 or not all(_SIZE.fullmatch(part) for part in parts):
        raise EngineError(
            f"profile is {quoted(text)}; it must be NAME=MINxOPTxMAX, as in sequence_length=1x128x2048 or "
            "decode:batch_size=1x8x32"
        )
    smallest, optimal, largest = map(int, parts)
    return Range(axis, smallest, optimal=optimal, largest=largest, profile=profile)


def axes_of(model: ExportedModel) -> tuple[str, ...]:
    """Return the names of the dynamic axes of the inputs, in order."""
    return tuple(dict.fromkeys(axis for tensor in model.inputs for axis in tensor.shape if isinstance(axis, str)))


Sizes = tuple[int, int, int]


def _defaults(model: ExportedModel, axes: Sequence[str]) -> Mapping[str, Mapping[str, Sizes]]:
    """Return sizes by profile and axis. The longest sequence is 2048 if the file does not name it."""
    longest = min(2048, model.metadata.max_positions) if model.metadata.max_positions > 0 else 2048
    batch, prompt = (1, 1, 8), (1, default_length(longest), longest)
    if not {PAST, SEQUENCE} <= {axis_name(axis) for axis in axes}:
        return {"default": {BATCH: batch, SEQUENCE: prompt}}
    longest_past = longest - 1  # leaves room for the next token
    past = (min(1, longest_past), min(DEFAULT_LENGTH, longest_past), longest_past)
    return {
        "prefill": {BATCH: batch, SEQUENCE: prompt, PAST: (0, 0, 0)},
        "decode": {BATCH: batch, SEQUENCE: (1, 1, 1), PAST: past},
    }


def profiles(model: ExportedModel, ranges: Sequence[Range]) -> tuple[Profile, ...]:
    """Choose a range for every dynamic axis in every profile.

    The range is the one for that axis and profile, else the one for that axis in every profile, else the default. The
    default of the total length is the past plus the sequence.

    Args:
        model: the model.
        ranges: ranges from the user.

    Returns:
        The profiles; none if every axis has a fixed size.

    Raises:
        EngineError: a range is for an axis or a profile that the model does not have, or an axis has neither a range
            nor a default.
    """
    axes = axes_of(model)
    defaults = _defaults(model, axes)
    wanted = {(item.profile, axis_name(item.axis)): item for item in ranges}
    known = {axis_name(axis) for axis in axes}
    for item in ranges:
        if axis_name(item.axis) not in known:
            raise EngineError(f"{model.path} has no dynamic axis {item.axis!r}; it has {', '.join(axes) or 'none'}")
        if item.profile and item.profile not in defaults:
            raise EngineError(f"{model.path} has no profile {item.profile!r}; it has {', '.join(defaults)}")

    def sizes(name: str, axis: str) -> Sizes | None:
        item = wanted.get((name, axis)) or wanted.get(("", axis))
        return defaults[name].get(axis) if item is None else (item.smallest, item.optimal, item.largest)

    result = []
    for name in defaults if axes else ():
        chosen = []
        for axis in axes:
            found = sizes(name, axis_name(axis))
            past, sequence = sizes(name, PAST), sizes(name, SEQUENCE)
            if found is None and axis_name(axis) == TOTAL and past is not None and sequence is not None:
                found = (past[0] + sequence[0], past[1] + sequence[1], past[2] + sequence[2])
            if found is None:
                raise EngineError(
                    f"{model.path}: axis {axis!r} has no default sizes: add the range {axis}=MINxOPTxMAX "
                    "(--profile, or ranges= in Python)"
                )
            smallest, optimal, largest = found
            chosen.append(Range(axis, smallest, optimal=optimal, largest=largest, profile=name))
        result.append(Profile(name, tuple(chosen)))
    return tuple(result)


def shapes_of(shape: Sequence[int | str], ranges: Sequence[Range]) -> tuple[tuple[int, ...], ...]:
    """Return the smallest, optimal and largest shape of one input."""
    sizes = {item.axis: (item.smallest, item.optimal, item.largest) for item in ranges}
    return tuple(tuple(sizes[axis][i] if isinstance(axis, str) else axis for axis in shape) for i in range(3))


def fitting_profile(
    candidates: Sequence[Profile],
    axes: Mapping[str, Sequence[int | str]],
    *,
    shapes: Mapping[str, Sequence[int]],
) -> int:
    """Find the profile of an engine that accepts these inputs and whose optimal sizes are nearest to theirs.

    Args:
        candidates: profiles in the engine's order; none if every axis has a fixed size.
        axes: axes of every input, by name; a dynamic axis is a string.
        shapes: shape of every input, by name.

    Returns:
        The index to set in an execution context.

    Raises:
        EngineError: an axis has two different sizes, or no profile accepts the inputs.
    """
    sizes: dict[str, int] = {}
    for name, shape in shapes.items():
        for axis, size in zip(axes[name], shape, strict=True):
            if isinstance(axis, str) and sizes.setdefault(axis, size) != size:
                raise EngineError(f"axis {axis!r} has size {sizes[axis]} in one input and {size} in {name}")

    def distance(item: Profile) -> float:
        if any(not one.smallest <= sizes[one.axis] <= one.largest for one in item.ranges):
            return math.inf
        return sum(abs(math.log((sizes[one.axis] + 1) / (one.optimal + 1))) for one in item.ranges)

    if not candidates:
        return 0
    best = min(range(len(candidates)), key=lambda index: distance(candidates[index]))
    if math.isinf(distance(candidates[best])):
        requested = ", ".join(f"{axis} {size}" for axis, size in sizes.items())
        accepted = "; ".join(
            f"{item.name} accepts " + ", ".join(f"{one.axis} {one.smallest} to {one.largest}" for one in item.ranges)
            for item in candidates
        )
        raise EngineError(
            f"no profile of the engine accepts {requested}: {accepted}; build it with other ranges (--profile, or "
            "ranges= in Python)"
        )
    return best
