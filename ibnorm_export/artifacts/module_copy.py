"""Copies of a module that leave it as it is: what is exported, compared and timed is never the caller's own object."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ibnorm_export.errors import CheckpointError

__all__ = ["cast_buffers", "copy_module", "deep_copy"]


def copy_module(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Copy a module in evaluation mode, with little memory.

    Parameters that have the type already share their values with those of `module`; others are converted, so that
    there is never a whole second copy in the stored type. The parameters themselves are new objects: moving the copy
    to another device or type does not touch `module`. Buffers are copied.

    Args:
        module: stays as it is, its training mode included.
        dtype: of floating-point parameters and saved buffers; None keeps their types.

    Raises:
        CheckpointError: the module holds something that Python cannot copy.
    """
    shared: dict[int, object] = {}
    for parameter in module.parameters():
        wanted = parameter.dtype if dtype is None or not parameter.is_floating_point() else dtype
        # a tied parameter is one object, so it stays one in the copy
        shared[id(parameter)] = nn.Parameter(parameter.detach().to(wanted), requires_grad=False)
    copied = deep_copy(module, shared).eval()
    if dtype is not None:
        cast_buffers(copied, dtype)
    return copied


def deep_copy(module: nn.Module, shared: dict[int, object]) -> nn.Module:
    """`copy.deepcopy` with an error that says what to do.

    Args:
        module: to copy.
        shared: by `id` of an object in `module`, what stands for it in the copy.

    Raises:
        CheckpointError: the module holds something that Python cannot copy.
    """
    try:
        return copy.deepcopy(module, shared)
    except (
        TypeError,
        RuntimeError,
        copy.Error,
    ) as error:  # a lock or an open file; a tensor that is computed from others
        raise CheckpointError(
            f"{type(module).__name__} cannot be copied, and only a copy is exported and compared: {error}. Create such "
            "objects when they are first used, or define __deepcopy__"
        ) from error


def cast_buffers(module: nn.Module, dtype: torch.dtype) -> None:
    """Convert the saved floating-point buffers of `module` to `dtype`, in place.

    Buffers that a checkpoint does not save (rotary frequencies) keep their type: `module.half()` would round them,
    and no framework serves a model so.
    """
    saved = set(module.state_dict(keep_vars=True))
    done: dict[int, Tensor] = {}
    for name, buffer in list(module.named_buffers(remove_duplicate=False)):
        if name in saved and buffer.is_floating_point():
            # a new tensor: one that was read from a file may be a view, whose base keeps its type
            path, _, own = name.rpartition(".")
            module.get_submodule(path).register_buffer(own, done.setdefault(id(buffer), buffer.to(dtype)))
