"""Fixed sizes of a file's axes, for runtimes that take no dynamic ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

import psutil

from ibnorm_export.artifacts.axes import PAST, SEQUENCE, TOTAL, axis_name
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.tensors import default_length
from ibnorm_export.errors import ExportError
from ibnorm_export.exporter.options import ExportOptions

__all__ = ["fixed_sizes", "with_fixed_sizes"]

#: Share of the machine's memory that the inputs may take: the model is traced with them.
_SHARE: Final = 0.25


def fixed_sizes(model: LoadedModel, options: ExportOptions) -> dict[str, int]:
    """Return the sizes that a file of `model` has fixed, by name of the axis.

    They are the user's, and those that the runtime needs. The total length of a cache is the past plus the sequence.

    Raises:
        ExportError: the model has no such dynamic axis, or a size does not fit it.
    """
    axes = {axis_name(axis) for spec in model.inputs for axis in spec.shape if isinstance(axis, str)}
    needed = {} if options.runtime is None else options.runtime.shape
    sizes = {axis: size for axis, size in needed.items() if axis in axes}
    if SEQUENCE in sizes:
        sizes[SEQUENCE] = default_length(model.max_positions)
    for axis, size in options.shape.items():
        if axis not in axes:
            raise ExportError(
                f"shape has {axis}={size}, but {model.source} has no such dynamic axis; it has "
                f"{', '.join(sorted(axes)) or 'none'}"
            )
        sizes[axis] = size
    _check_length(model, sizes, axes=axes)
    _check_memory(model, sizes)
    if needed and (dynamic := sorted(axes - set(sizes))):
        raise ExportError(
            f"--for {options.runtime} takes fixed sizes, but {model.source} has the dynamic axis {dynamic[0]}: add "
            f"--shape {dynamic[0]}=SIZE"
        )
    return sizes


def _check_length(model: LoadedModel, sizes: dict[str, int], *, axes: set[str]) -> None:
    """Derive the total length where it follows from the others, and compare all with the model."""
    known = [sizes[axis] for axis in (PAST, SEQUENCE) if axis in sizes]
    if TOTAL in axes and len(known) == 2 and sizes.setdefault(TOTAL, sum(known)) != sum(known):
        raise ExportError(
            f"shape has {TOTAL}={sizes[TOTAL]}, but {PAST}={sizes[PAST]} and {SEQUENCE}={sizes[SEQUENCE]} make "
            f"{sum(known)}; leave {TOTAL} out"
        )
    if TOTAL in sizes and len(known) < 2:
        raise ExportError(f"shape has {TOTAL}={sizes[TOTAL]}; give {PAST} and {SEQUENCE} instead, whose sum it is")
    longest = model.max_positions
    for axis in (SEQUENCE, PAST, TOTAL):
        if longest and sizes.get(axis, 0) > longest:
            raise ExportError(f"shape has {axis}={sizes[axis]}, but {model.source} takes at most {longest} tokens")


def _check_memory(model: LoadedModel, sizes: Mapping[str, int]) -> None:
    """Raise ExportError for sizes with which the inputs alone would fill the memory."""
    needed = 0
    for spec in with_fixed_sizes(model, sizes).inputs:
        bytes_each = 4 if spec.floating else 8
        needed += bytes_each * math.prod(n for n in spec.shape if isinstance(n, int))
    memory = psutil.virtual_memory().total
    if needed > _SHARE * memory:
        stated = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
        raise ExportError(
            f"shape has {stated}, with which the inputs take {needed / 1e9:.3g} GB; this machine has "
            f"{memory / 1e9:.3g} GB: choose smaller sizes"
        )


def with_fixed_sizes(model: LoadedModel, sizes: Mapping[str, int]) -> LoadedModel:
    """Return the model with the sizes in the place of its dynamic axes."""
    if not sizes:
        return model
    inputs = tuple(
        replace(spec, shape=tuple(n if isinstance(n, int) else sizes.get(axis_name(n), n) for n in spec.shape))
        for spec in model.inputs
    )
    return replace(model, inputs=inputs)
