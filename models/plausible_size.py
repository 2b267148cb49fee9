"""Refuse a configuration that describes a far larger model than the weights beside it, before memory is taken for it.

A damaged or hostile config.json can ask for more blocks than fit into any memory; each is an object of Python, even
where its weights take no memory.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ibnorm_export.errors import CheckpointError, quoted

__all__ = ["StoredWeights", "check_counts", "check_parameters"]

#: Settings that count parts of a model, each of which has a tensor; and classes, each of which has a number.
_PARTS: Final = re.compile(r"(?:^|_)(?:layers?|blocks?|depths?|stages?|experts?)$")
_CLASSES: Final = ("num_labels", "num_classes")

#: A count up to this is built whatever the weights are: settings may describe parts that this model does not have.
_ALWAYS: Final = 1000

#: Parameters that a model may have for each one that is stored, and beyond: weights that are missing are named later.
_FACTOR: Final = 4
_BEYOND: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """How many weights the files of a checkpoint have.

    Args:
        tensors: number of tensors.
        elements: number of elements of all of them.
    """

    tensors: int
    elements: int

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor]) -> StoredWeights:
        """Those of tensors in memory."""
        return cls(len(state), sum(tensor.numel() for tensor in state.values()))

    @classmethod
    def of_safetensors(cls, files: list[Path]) -> StoredWeights:
        """Those of safetensors files, of which only the headers are read.

        Raises:
            SafetensorError: a file is truncated or of another kind.
        """
        sizes: list[int] = []
        for path in files:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())  # the file is no mapping
                sizes += [math.prod(file.get_slice(name).get_shape()) for name in names]
        return cls(len(sizes), sum(sizes))


def _numbers(settings: object, name: str = "") -> Iterator[tuple[str, int]]:
    """Whole numbers in settings, with the name that each has; those of a list have the name of the list."""
    if isinstance(settings, Mapping):
        for key, value in settings.items():
            yield from _numbers(value, str(key))
    elif isinstance(settings, list):
        for value in settings:
            yield from _numbers(value, name)
    elif isinstance(settings, int):
        yield name, settings


def check_counts(settings: Mapping[str, Any], stored: StoredWeights, *, source: Path) -> None:
    """Raise CheckpointError if settings ask for more blocks than there are tensors, or more classes than elements.

    Args:
        settings: a config.json.
        stored: the weights beside it.
        source: its path, for the message.
    """
    for name, number in _numbers(settings):
        most, what = _ALWAYS, ""
        if _PARTS.search(name):
            most, what = max(_ALWAYS, stored.tensors), f"{stored.tensors:,} tensors"
        elif name in _CLASSES:
            most, what = max(_ALWAYS, stored.elements), f"{stored.elements:,} numbers"
        if what and number > most:
            raise CheckpointError(f"{source}: {name} is {quoted(number)}, but the weight files have only {what}")


def check_parameters(build: Callable[[], nn.Module], stored: StoredWeights, *, source: Path) -> None:
    """Raise CheckpointError if a model has far more parameters than are stored.

    Args:
        build: makes the model; it is called on the meta device, where weights take no memory.
        stored: the weights that it shall have.
        source: path of its settings, for the message.
    """
    with torch.device("meta"):
        wanted = sum(parameter.numel() for parameter in build().parameters())
    if wanted > _FACTOR * stored.elements + _BEYOND:
        raise CheckpointError(
            f"{source} describes a model of {wanted:,} parameters, but its weight files have only {stored.elements:,}"
        )
