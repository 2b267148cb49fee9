"""The plain data beside the weights of a checkpoint: settings, counters, versions."""

from __future__ import annotations

import enum
from typing import Any, Final

import torch
from torch import Tensor

from ibnorm_export.models.containers.plain_classes import NumpyArray
from ibnorm_export.models.containers.safe_pickle import Allowed, PlainObject
from ibnorm_export.models.containers.stored_tensors import DenseTensor, OtherTensor, UnfitTensorError

__all__ = ["LEFT_OUT", "PlainData"]

_DEEPEST: Final = 100  # levels of nesting; settings have far fewer


class _LeftOut(enum.Enum):
    LEFT_OUT = "left out"


LEFT_OUT: Final = _LeftOut.LEFT_OUT


class PlainData:
    """Turns what a checkpoint contains into plain Python data; what is not such data is `LEFT_OUT`.

    Args:
        without: objects to leave out, such as the weights.
    """

    def __init__(self, without: tuple[object, ...] = ()) -> None:
        # By identity: a container may be in a checkpoint many times, or in itself, which is then left out.
        self._done: dict[int, Any] = {id(value): LEFT_OUT for value in without}

    def convert(self, value: object, *, depth: int = 0) -> Any:
        """The value as dicts, lists, tuples, text, numbers, bytes and None.

        A dict loses the items that are left out; so does its parent, if nothing is left. A list with such an item is
        left out as a whole.
        """
        if value is None or isinstance(value, (str, int, float, complex, bytes)):
            return value
        if isinstance(value, torch.dtype):
            return str(value).removeprefix("torch.")
        if isinstance(value, Allowed):
            return value.name
        if isinstance(value, (DenseTensor, OtherTensor, Tensor)):
            return _number(value)
        if isinstance(value, NumpyArray):
            values = value.to_list()
            return LEFT_OUT if values is None else values
        if id(value) in self._done or depth > _DEEPEST:
            return self._done.get(id(value), LEFT_OUT)
        self._done[id(value)] = LEFT_OUT  # while it is being converted
        self._done[id(value)] = result = self._container(value, depth + 1)
        return result

    def _container(self, value: object, depth: int) -> Any:
        if isinstance(value, PlainObject):
            fields = value.fields
            if value.kind.startswith("omegaconf."):  # a node has one of these, besides flags and its parent
                return self.convert(fields.get("_content", fields.get("_val")), depth=depth)
            return self._container(fields, depth)
        if isinstance(value, dict):
            items = {key: self.convert(one, depth=depth) for key, one in value.items() if isinstance(key, (str, int))}
            kept = {key: one for key, one in items.items() if one is not LEFT_OUT}
            return kept if kept or not value else LEFT_OUT
        if isinstance(value, (list, tuple, set, frozenset)):
            values = [self.convert(one, depth=depth) for one in value]
            if any(one is LEFT_OUT for one in values):
                return LEFT_OUT
            return tuple(values) if isinstance(value, tuple) else values
        return LEFT_OUT


def _number(tensor: DenseTensor | OtherTensor | Tensor) -> Any:
    """The value of a tensor of one element."""
    if isinstance(tensor, OtherTensor) or tuple(tensor.shape) not in ((), (1,)):
        return LEFT_OUT
    try:
        return (tensor if isinstance(tensor, Tensor) else tensor.load()).item()
    except UnfitTensorError:
        return LEFT_OUT
