"""Parameters in float64 that take no memory: the truth of a comparison holds no second, doubled copy of a model.

A `Widened` tensor is of type float64 to whoever looks at it, and keeps the parameter that it stands for as it is
stored. An operator that takes it is given the float64 values, made for that operator and freed behind it: the same
values as those of a copy, hence the same results to the bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ibnorm_export.artifacts.module_copy import deep_copy

__all__ = ["Widened", "storage_identity", "widened_copy"]


class Widened(Tensor):
    """`stored` in float64, one operator at a time; an operator that writes to it leaves it in float64 for good.

    Args:
        cell: a list that holds the stored tensor alone, shared with what is detached from this one.
    """

    cell: list[Tensor]

    # operators arrive below, so that torch's own fast paths take a module as they take any other
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # torch's own idiom

    @staticmethod
    def __new__(cls, cell: list[Tensor]) -> Widened:
        (stored,) = cell
        made: Widened = Tensor._make_wrapper_subclass(
            cls, stored.shape, stored.stride(), dtype=torch.float64, device=stored.device
        )
        made.cell = cell
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # typed as what it is where it is switched off
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        writes = func._schema.is_mutable

        def values(tensor: Widened) -> Tensor:
            wide = tensor.cell[0].to(torch.float64)
            if writes:
                tensor.cell[0] = wide
            return wide

        # a view is of the kind of what it views: parameters are no inference tensors
        with torch.inference_mode(torch.is_inference_mode_enabled() and not func.is_view):
            if func is torch.ops.aten.detach.default:
                return Widened(args[0].cell)
            args, kwargs = tree_map_only(Widened, values, (args, kwargs or {}))
            return func(*args, **kwargs)

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        self.cell[0] = value.detach()


def storage_identity(tensor: Tensor) -> int:
    """What two tensors have in common that hold the same values in the same place, while both live."""
    return id(tensor.cell) if isinstance(tensor, Widened) else tensor.untyped_storage().data_ptr()


def widened_copy(module: nn.Module) -> nn.Module:
    """A copy whose floating parameters are in float64 and take no memory; buffers are copied as they are."""
    narrow = [p for p in module.parameters() if p.is_floating_point() and p.dtype != torch.float64]
    # what stands for a parameter stands for it wherever the model keeps it: tied, or in a list of its own
    return deep_copy(module, {id(p): nn.Parameter(Widened([p.detach()]), requires_grad=False) for p in narrow})
