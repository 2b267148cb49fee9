"""The numbers in PyTorch's code of a model: a half-precision file holds them rounded, PyTorch does not."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.tensors import Arrays

__all__ = ["find_constants"]

#: Numbers in the definitions of operators that an exporter may write out.
#: Source: torch.nn.functional.gelu, with "none" and "tanh".
_OF_OPERATORS: Final = (0.044715, math.sqrt(2 / math.pi), math.sqrt(0.5), math.sqrt(2.0))


class _Numbers(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Records the numbers that operators take."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.found: dict[float, None] = dict.fromkeys(_OF_OPERATORS)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, float):
                self.found[value] = None
            elif isinstance(value, Tensor) and value.dim() == 0 and value.is_floating_point():
                self.found[float(value)] = None
        if "scaled_dot_product" in func.name():
            self.found |= dict.fromkeys(_scales(args[0].shape[-1], (kwargs or {}).get("scale")))
        return func(*args, **(kwargs or {}))


def _scales(head: int, scale: float | None) -> Iterator[float]:
    """The scale of attention scores, and its root, by which an exporter multiplies queries and keys."""
    scale = head**-0.5 if scale is None else scale
    yield scale
    yield math.sqrt(abs(scale))


def find_constants(model: LoadedModel, *, inputs: Arrays) -> tuple[float, ...]:
    """Run a model once and return the numbers in its code, also those that its operators stand for.

    Args:
        model: the model, with parameters in float32.
        inputs: arrays by name.
    """
    tensors = [torch.from_numpy(inputs[spec.name]) for spec in model.inputs]
    numbers = _Numbers()
    with torch.no_grad(), numbers:
        model.entry()(*tensors)
    return tuple(numbers.found)
