"""The weights of a checkpoint by value, to recognise one that a tool has renamed, reshaped, transposed or converted."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.verifier.weights.folded_norms import FoldedNorms
from ibnorm_export.verifier.weights.tool_layouts import blocked_forms, split_joined

__all__ = ["WeightValue", "WeightValues", "as_float32"]

#: Number of values that are compared before a whole weight is.
_FINGERPRINT: Final = 16

#: The share of equal values from which a constant counts as a changed copy of a weight.
_COPY: Final = 0.5


@dataclass(frozen=True, slots=True)
class WeightValue:
    """One weight or buffer of the checkpoint, by the first of its names."""

    name: str
    tensor: Tensor
    dtype: torch.dtype

    @property
    def value(self) -> Tensor:
        """Its values as the file's dtype rounds them, in float32; integers as they are."""
        value = self.tensor.detach()
        return value.to(self.dtype).float() if value.is_floating_point() else value

    def layouts(self) -> Iterator[Tensor]:
        """Its values in every order of its axes: a reshape changes nothing."""
        value = self.value
        axes = [axis for axis, size in enumerate(value.shape) if size > 1]
        for order in itertools.permutations(axes) if len(axes) <= 4 else (tuple(axes),):
            kept = [axis for axis in range(value.dim()) if axis not in axes]
            yield value.permute((*order, *kept))  # a tuple, which a single number has too


class WeightValues:
    """Finds weights by value.

    Args:
        model: the checkpoint.
        dtype: the dtype that the file has weights in.
    """

    def __init__(self, model: LoadedModel, dtype: torch.dtype) -> None:
        self._model = model
        self._dtype = dtype
        self.folded = FoldedNorms(model, dtype)
        """Recognises norms that were folded into other constants."""

    @cached_property
    def _by_size(self) -> dict[int, list[WeightValue]]:
        state = self._model.module.state_dict(keep_vars=True)
        found: dict[int, list[WeightValue]] = defaultdict(list)
        seen: set[int] = set()
        for name, tensor in {**state, **dict(self._model.module.named_buffers())}.items():
            if id(tensor) not in seen:
                seen.add(id(tensor))
                # A buffer that no checkpoint saves keeps its own dtype in the file.
                found[tensor.numel()].append(WeightValue(name, tensor, self._dtype if name in state else tensor.dtype))
        return found

    def find(self, array: NDArray[Any], *, blocked: bool = False) -> tuple[Tensor, ...]:
        """The weight that has exactly these values, in any order of its axes, or the weights that it consists of.

        Args:
            array: a constant of the file.
            blocked: whether it may be in blocks of channels; see `tool_layouts`.

        Returns:
            Tensors of the checkpoint; empty if the array is not a weight.
        """
        actual = as_float32(array)
        for weight in self._by_size.get(array.size, ()):
            if _has_values(weight, actual):
                return (weight.tensor,)
        if blocked:
            return self._find_blocked(actual)
        if array.ndim not in (1, 2) or not np.issubdtype(array.dtype, np.number) or array.size < 2:
            return ()
        whole = actual.reshape(array.shape)
        smaller = [weight for size, group in self._by_size.items() if size < array.size for weight in group]
        parts = [weight for weight in smaller if _may_be_part(weight.tensor, array.shape)]
        found = split_joined(whole, [weight.value.numpy() for weight in parts])
        return tuple(parts[index].tensor for index in found)

    def _find_blocked(self, actual: NDArray[np.float32]) -> tuple[Tensor, ...]:
        for group in self._by_size.values():
            for weight in group:
                if weight.tensor.dim() in (1, 4) and weight.tensor.numel() <= actual.size:
                    forms = blocked_forms(weight.value.numpy())
                    if any(form.size == actual.size and np.array_equal(form, actual) for form in forms):
                        return (weight.tensor,)
        return ()

    def holds(self, array: NDArray[Any], tensor: Tensor) -> bool:
        """Whether an array of the file has the value of one tensor of the checkpoint."""
        same_size = array.size == tensor.numel()
        return same_size and _has_values(WeightValue("", tensor, self._dtype), as_float32(array))

    def nearest(self, array: NDArray[Any]) -> str:
        """A sentence about the weight that an array is a changed copy of; empty if there is none."""
        if not np.issubdtype(array.dtype, np.integer) or array.dtype.itemsize > 1:
            actual = as_float32(array)
            for weight in self._by_size.get(array.size, ()):
                for layout in weight.layouts():
                    same = np.count_nonzero(layout.reshape(-1).numpy() == actual)
                    if same >= _COPY * actual.size:
                        wrong = actual.size - same
                        return f"it is a copy of the weight {weight.name} with {wrong} of {actual.size} values changed"
        return ""


def as_float32(array: NDArray[Any]) -> NDArray[np.float32]:
    """Values, flat, in float32, which holds every float16 and bfloat16 exactly."""
    return np.asarray(array, dtype=np.float32).reshape(-1)


def _may_be_part(tensor: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether a weight may be some rows or columns of a matrix, or some values of a vector."""
    return tensor.dim() == len(shape) and (tensor.dim() == 1 or bool(set(tensor.shape) & set(shape)))


def _has_values(weight: WeightValue, actual: NDArray[np.float32]) -> bool:
    for layout in weight.layouts():
        if np.array_equal(_start(layout), actual[:_FINGERPRINT]) and np.array_equal(
            layout.reshape(-1).numpy(), actual, equal_nan=layout.is_floating_point()
        ):
            return True
    return False


def _start(layout: Tensor) -> NDArray[Any]:
    """The first values of a layout, without a copy of the whole."""
    count = min(_FINGERPRINT, layout.numel())
    index = np.unravel_index(np.arange(count), tuple(layout.shape)) if layout.dim() else ()
    found: NDArray[Any] = layout[tuple(torch.from_numpy(np.asarray(i)) for i in index)].reshape(-1).numpy()
    return found
