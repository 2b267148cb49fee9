"""Which weights and norms take part in a checkpoint's output, and which operators leave float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ibnorm_export.artifacts.float64_parameters import storage_identity
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.tensors import Arrays
from ibnorm_export.op.float64_mode import compute_in_float64
from ibnorm_export.op.torch_op import IBNorm

__all__ = ["Coverage", "measure_coverage"]


@dataclass(frozen=True, slots=True)
class Coverage:
    """What one run in float64 used.

    Args:
        weights: names of the state dict that take part in the output.
        norms: module paths of the IBNorm modules that ran.
        narrow_operators: operators that returned floating-point values of a dtype other than float64, although
            `compute_in_float64` widens casts: those that write to a tensor of another dtype.
    """

    weights: frozenset[str]
    norms: frozenset[str]
    narrow_operators: frozenset[str]


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Records the tensors that operators take, and the operators whose results are not float64."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.identities: set[int] = set()
        self.narrow: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, Tensor):
                self.identities.add(storage_identity(value))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64:
                self.narrow.add(str(func))
        return result


def measure_coverage(model: LoadedModel, truth: nn.Module, *, inputs: Arrays) -> Coverage:
    """Run the checkpoint once in float64 and record what it uses.

    Args:
        model: the checkpoint.
        truth: a float64 copy of its module.
        inputs: arrays by name.
    """
    norms: set[str] = set()

    def record(path: str) -> Callable[..., None]:
        return lambda *_: norms.add(path)

    hooks = [m.register_forward_hook(record(path)) for path, m in truth.named_modules() if isinstance(m, IBNorm)]
    tensors = [torch.from_numpy(inputs[spec.name]) for spec in model.inputs]
    tensors = [t.double() if t.is_floating_point() else t for t in tensors]
    watch = _Watch()
    try:
        with compute_in_float64(), torch.no_grad(), watch:
            model.entry(truth)(*tensors)
    finally:
        for hook in hooks:
            hook.remove()
    state = truth.state_dict(keep_vars=True)
    used = {name for name, tensor in state.items() if storage_identity(tensor) in watch.identities}
    return Coverage(frozenset(used), frozenset(norms), frozenset(watch.narrow))
