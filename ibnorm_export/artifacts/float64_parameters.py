"""Parameters in a wider type without a copy in memory, for the models that a file is compared with.

A `Widened` tensor has dtype float64 or float32 but holds the parameter in the dtype in which it is stored. Each
operator receives wide values that exist only while it runs. They are the values that a wide copy would have, so results
are bit-identical.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ibnorm_export.artifacts.module_copy import deep_copy

__all__ = ["Widened", "storage_identity", "widened_copy"]


class Widened(Tensor):
    """A tensor that is converted to a wider type for one operator at a time.

    An operator that writes to it leaves it stored in that type.

    Args:
        cell: a list with one element, the stored tensor. Tensors that are detached from this one share the list.
        dtype: the wider type.
    """

    cell: list[Tensor]

    # Only `__torch_dispatch__` intercepts operators, so that PyTorch's fast paths accept modules with such parameters.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # torch's own idiom

    @staticmethod
    def __new__(cls, cell: list[Tensor], dtype: torch.dtype = torch.float64) -> Widened:
        (stored,) = cell
        tensor: Widened = Tensor._make_wrapper_subclass(
            cls, stored.shape, stored.stride(), dtype=dtype, device=stored.device
        )
        tensor.cell = cell
        return tensor

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # the base class declares the disabled form
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        writes = func._schema.is_mutable

        def values(argument: Any) -> Any:
            if isinstance(argument, (tuple, list, dict)):
                return tree_map_only(Widened, values, argument)
            if not isinstance(argument, Widened):
                return argument
            wide = argument.cell[0].to(argument.dtype)
            if writes:
                argument.cell[0] = wide
            return wide

        # Parameters are not inference tensors, so their views must not be either.
        views = func.is_view and torch.is_inference_mode_enabled()
        with torch.inference_mode(False) if views else nullcontext():
            if func is torch.ops.aten.detach.default:
                return Widened(args[0].cell, args[0].dtype)
            return func(*map(values, args), **{name: values(argument) for name, argument in (kwargs or {}).items()})

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        self.cell[0] = value.detach()


def storage_identity(tensor: Tensor) -> int:
    """A number that is equal for two live tensors exactly when they share their storage."""
    return id(tensor.cell) if isinstance(tensor, Widened) else tensor.untyped_storage().data_ptr()


def widened_copy(module: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Return a copy whose floating-point parameters are `Widened`; buffers are copied as they are.

    Args:
        module: the module; it does not change.
        dtype: the wider type. Parameters that have it already are copied.
    """
    narrow = [p for p in module.parameters() if p.is_floating_point() and p.dtype != dtype]
    # The memo replaces a parameter wherever the model refers to it: tied weights, and attributes outside its modules.
    return deep_copy(module, {id(p): nn.Parameter(Widened([p.detach()], dtype), requires_grad=False) for p in narrow})
