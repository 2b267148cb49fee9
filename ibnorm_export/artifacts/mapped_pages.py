"""Give back the memory of weights that are mapped from a file, once they have been read.

A mapped page that was read counts as memory of the process until the kernel needs it for something else. A model that
is read from beginning to end would hold all of its weights, though each is needed only once.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import os
import sys
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

__all__ = ["release_pages"]

#: Bits of an entry of /proc/self/pagemap. Source: Documentation/admin-guide/mm/pagemap.rst of Linux.
_PRESENT: Final = np.uint64(1 << 63)
_SWAPPED: Final = np.uint64(1 << 62)
_FROM_FILE: Final = np.uint64(1 << 61)

#: Smaller tensors are not worth two calls of the kernel.
_LEAST_BYTES: Final = 1 << 20


@functools.cache
def _madvise() -> Any:
    function = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


def _all_from_file(first_page: int, count: int) -> bool:
    """Whether the pages that are in memory are those of a file, so that they can be read from it again.

    A page that was written to is a private copy, which would be lost.
    """
    with Path("/proc/self/pagemap").open("rb", buffering=0) as stream:
        entries = np.frombuffer(os.pread(stream.fileno(), 8 * count, 8 * first_page), dtype=np.uint64)
    private = (entries & _PRESENT).astype(bool) & ~(entries & _FROM_FILE).astype(bool)
    return len(entries) == count and not private.any() and not (entries & _SWAPPED).any()


def release_pages(tensor: Tensor) -> None:
    """Let the kernel have the pages of a tensor that is mapped from a file; other tensors are left alone.

    Its values do not change: they are read from the file when they are next used. Does nothing except on Linux.

    Args:
        tensor: a contiguous tensor of the CPU, which no other thread writes to.
    """
    size = tensor.numel() * tensor.element_size()
    if sys.platform != "linux" or size < _LEAST_BYTES or tensor.device != torch.device("cpu"):
        return
    if tensor.layout is not torch.strided or not tensor.is_contiguous():
        return
    first, end = -(-tensor.data_ptr() // mmap.PAGESIZE), (tensor.data_ptr() + size) // mmap.PAGESIZE
    with contextlib.suppress(OSError):  # /proc may be missing, as in some sandboxes
        if _all_from_file(first, end - first):
            _madvise()(first * mmap.PAGESIZE, (end - first) * mmap.PAGESIZE, mmap.MADV_DONTNEED)
