"""Copy a module, so that export, verification and benchmarks never change the caller's object."""

from __future__ import annotations

import copy
import types

import torch
from torch import Tensor, nn

from ibnorm_export.errors import CheckpointError

__all__ = ["cast_buffers", "copy_module", "copy_without_values", "deep_copy"]


def copy_module(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Copy a module in evaluation mode, with little memory.

    Parameters that already have the dtype share their values with those of `module`; others are converted. The
    parameters are new objects, so moving the copy to another device or dtype does not change `module`. Buffers are
    copied.

    Args:
        module: the module; it does not change, nor does its training mode.
        dtype: dtype of floating-point parameters and saved buffers; None keeps their dtypes.

    Raises:
        CheckpointError: the module holds an object that Python cannot copy.
    """
    shared: dict[int, object] = {}
    for parameter in module.parameters():
        wanted = parameter.dtype if dtype is None or not parameter.is_floating_point() else dtype
        # A tied parameter is one object, and stays one in the copy.
        shared[id(parameter)] = nn.Parameter(parameter.detach().to(wanted), requires_grad=False)
    copied = deep_copy(module, shared).eval()
    if dtype is not None:
        cast_buffers(copied, dtype)
    return copied


def copy_without_values(module: nn.Module, dtype: torch.dtype) -> tuple[nn.Module, dict[int, Tensor]]:
    """Copy a module for a trace; unlike in `copy_module`, parameters that would be converted have no values.

    Returns:
        The copy, and the parameters of `module` that it has no values of, by the address of those of the copy.

    Raises:
        CheckpointError: the module holds an object that Python cannot copy.
    """
    shared: dict[int, object] = {}
    sources: dict[int, Tensor] = {}
    for parameter in module.parameters():
        stored = parameter.detach()
        if parameter.is_floating_point() and parameter.dtype != dtype:
            stored = torch.empty_like(stored, dtype=dtype)  # takes no memory: nothing is written to it
            sources[stored.data_ptr()] = parameter.detach()
        shared[id(parameter)] = nn.Parameter(stored, requires_grad=False)
    copied = deep_copy(module, shared).eval()
    cast_buffers(copied, dtype)
    return copied, sources


def deep_copy(module: nn.Module, shared: dict[int, object]) -> nn.Module:
    """Copy a module with `copy.deepcopy`; what `torch.compile` made of a part is that part in the copy.

    Args:
        module: the module.
        shared: objects that replace those of `module` in the copy, by the `id` of the replaced object.

    Raises:
        CheckpointError: the module holds an object that Python cannot copy, TorchScript, or a `forward` that the copy
            cannot have.
    """
    _require_python_code(module)
    _require_forward_of_class(module)
    try:
        for inner in list(module.modules()):
            if _is_compiled(inner):
                shared[id(inner)] = copy.deepcopy(inner._orig_mod, shared)
        return copy.deepcopy(module, shared)
    except (TypeError, RuntimeError, copy.Error) as error:
        # a lock, an open file, or a tensor that is computed from others
        raise CheckpointError(
            f"{type(module).__name__} cannot be copied, which export and verify require: {error}. Create "
            "such objects when they are first used, or define __deepcopy__"
        ) from error


def _is_compiled(module: nn.Module) -> bool:
    """Whether a module is the wrapper that `torch.compile` puts around another one."""
    return isinstance(module.__dict__.get("_modules", {}).get("_orig_mod"), nn.Module)


def _require_python_code(module: nn.Module) -> None:
    """Refuse TorchScript, which has no Python code to trace and cannot be copied with other parameters."""
    for path, inner in module.named_modules():
        if isinstance(inner, torch.jit.ScriptModule):
            raise CheckpointError(
                f"{path or 'the model'} ({type(inner).__name__}) is TorchScript: use the module that it was made from, "
                "with its weights: module.load_state_dict(script.state_dict())"
            )


def _require_forward_of_class(module: nn.Module) -> None:
    """Refuse a `forward` that was set on an instance and that a copy would share with the original.

    A bound method of a module in the tree is bound to the copy of that module, but a function keeps referring to the
    original, whose weights have another dtype.
    """
    modules = list(module.named_modules())
    own = {id(inner) for _, inner in modules}
    for path, inner in modules:
        forward = inner.__dict__.get("forward")
        if (
            forward is None
            or _is_compiled(inner)
            or (isinstance(forward, types.MethodType) and id(forward.__self__) in own)
        ):
            continue
        raise CheckpointError(
            f"{path or 'the model'} ({type(inner).__name__}) has a `forward` that was set on the instance, "
            "which a copy cannot have: define it in a subclass, or bind it with types.MethodType(function, module)"
        )


def cast_buffers(module: nn.Module, dtype: torch.dtype) -> None:
    """Convert the saved floating-point buffers of `module` to `dtype`, in place.

    Buffers that a checkpoint does not save (rotary frequencies) keep their dtype. `module.half()` would round them,
    which no framework does when it serves a model.
    """
    saved = set(module.state_dict(keep_vars=True))
    done: dict[int, Tensor] = {}
    for name, buffer in list(module.named_buffers(remove_duplicate=False)):
        if name in saved and buffer.is_floating_point():
            # A new tensor replaces the buffer, which may be a view of a file's tensor; the base keeps its dtype.
            path, _, own = name.rpartition(".")
            module.get_submodule(path).register_buffer(own, done.setdefault(id(buffer), buffer.to(dtype)))
