"""Run any PyTorch code in float64, also code that casts to float32.

A norm that ends in `x.float()` or a rotary embedding that builds its tables with `dtype=torch.float32` computes in
float32 whatever its parameters are. Inside `compute_in_float64()` such casts and factories give float64, and operators
receive float64 values, so that the code computes what its author means without the rounding.

It is in `op`, the lowest package that needs it: `op.identification` runs a user's norm in it, and `artifacts` builds
the reference of a comparison with it. Parameters may be of any type, `artifacts.float64_parameters.Widened` included.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

__all__ = ["compute_in_float64"]

#: Types that become wider. The types of 8 bits are left as they are: a cast to them is quantisation, not economy.
_WIDER: Final = {
    torch.float32: torch.float64,
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.complex32: torch.complex128,
    torch.complex64: torch.complex128,
}

#: Functions that read Python numbers, which are rounded before any operator sees them.
_FROM_NUMBERS: Final = (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor)

#: Functions that compare the types of their arguments before any operator sees them.
_COMPARING_TYPES: Final = (torch.conv1d, torch.conv2d, torch.conv3d, torch.bilinear)


def _widen(value: Any) -> Any:
    """A tensor or dtype in its wider type; anything else as it is."""
    if isinstance(value, Tensor):
        return value.to(_WIDER[value.dtype]) if value.dtype in _WIDER else value
    return _WIDER.get(value, value) if isinstance(value, torch.dtype) else value


def _widen_dtype(value: Any) -> Any:
    return value if isinstance(value, Tensor) else _widen(value)


def _map(change: Callable[[Any], Any], value: Any) -> Any:
    """What `tree_map` gives, several times faster for a value that is not a container, as most are."""
    return tree_map(change, value) if isinstance(value, (tuple, list, dict)) else change(value)


class _WideOperators(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's base has no types
    """Replaces narrow types in the arguments of every operator, and narrow tensors in its results."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No need to hide it from the compiler, which PyTorch would import for that; nothing is compiled inside."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.view.dtype:  # reads the bits of a value as another type
            return func(*args, **kwargs)
        # The result of a view or of an operator in place shares memory with an argument, which must stay the same.
        shares = func.is_view or func._schema.is_mutable
        change = _widen_dtype if shares else _widen
        result = func(*(_map(change, a) for a in args), **{name: _map(change, a) for name, a in kwargs.items()})
        return result if shares else _map(_widen, result)


class _WideNumbers(TorchFunctionMode):
    """Replaces narrow types where tensors are made from Python numbers, and where types are compared first."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _FROM_NUMBERS:
            kwargs = {name: _widen_dtype(value) for name, value in kwargs.items()}
        elif func in _COMPARING_TYPES:
            args, kwargs = tuple(map(_widen, args)), {name: _widen(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)


@contextmanager
def compute_in_float64() -> Iterator[None]:
    """Compute in float64 throughout, whatever types the code asks for.

    - Casts to float32, float16 and bfloat16, and tensors made in these types, give float64.
    - Every operator receives float64 values, also from parameters, buffers and inputs of narrower types.
    - `torch.autocast` has no effect, because it leaves float64 values alone. Compiled functions run eagerly.
    - An operator in place keeps the type of the tensor that it changes: convert buffers that the code writes to.
      Copy modules before, not inside.

    The default dtype is float64 meanwhile. It belongs to the process, so other threads see it too.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        operators = _WideOperators()  # type: ignore[no-untyped-call]  # as above
        # Before the compiler is imported, which takes seconds, nothing can have been compiled.
        compiled = "torch._dynamo" in sys.modules
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext(), _WideNumbers(), operators:
            yield
    finally:
        torch.set_default_dtype(before)
