"""Watches one float64 run of a checkpoint: what plays a part in its output, and what is not float64 in it."""

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
from ibnorm_export.op.torch_op import IBNorm

__all__ = ["Reach", "reach"]


@dataclass(frozen=True, slots=True)
class Reach:
    """What one run touched.

    Args:
        weights: names of the state dict that play a part in the output.
        norms: module paths of the IBNorm modules that ran.
        narrow: operators that gave floating values of another type than float64.
    """

    weights: frozenset[str]
    norms: frozenset[str]
    narrow: frozenset[str]


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
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


def reach(
    model: LoadedModel,
    module: nn.Module,  # a float64 copy of model.module
    *,
    inputs: Arrays,
) -> Reach:
    """Run `module` once and say what it touched."""
    norms: set[str] = set()

    def note(path: str) -> Callable[..., None]:
        return lambda *_: norms.add(path)

    hooks = [m.register_forward_hook(note(path)) for path, m in module.named_modules() if isinstance(m, IBNorm)]
    tensors = [torch.from_numpy(inputs[spec.name]) for spec in model.inputs]
    tensors = [t.double() if t.is_floating_point() else t for t in tensors]
    watch = _Watch()
    try:
        with torch.no_grad(), watch:
            model.entry(module)(*tensors)
    finally:
        for hook in hooks:
            hook.remove()
    state = module.state_dict(keep_vars=True)
    used = {name for name, tensor in state.items() if storage_identity(tensor) in watch.identities}
    return Reach(frozenset(used), frozenset(norms), frozenset(watch.narrow))
