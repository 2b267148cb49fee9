"""Forms in which optimisers store weights: several matrices joined into one, and blocks of channels.

onnxsim and onnxoptimizer join matrices that multiply the same input. ONNX Runtime, when it writes an optimised file for
one processor, stores the weights of convolutions in blocks of 8 or 16 output channels (its domain com.microsoft.nchwc).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["BLOCKED_DOMAIN", "blocked_forms", "split_joined"]

#: Domain of ONNX Runtime's operators on blocks of channels.
BLOCKED_DOMAIN: Final = "com.microsoft.nchwc"

_BLOCKS: Final = (8, 16)


def blocked_forms(weight: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """The forms of a weight in blocks of channels, flat; missing channels are zeros.

    Args:
        weight: a kernel (output, input, height, width), or one value for each channel.
    """
    for block in _BLOCKS:
        padded = _padded(weight, 0, block=block)
        outer = padded.reshape(-1, block, *weight.shape[1:])
        yield np.moveaxis(outer, 1, -1).reshape(-1)
        if weight.ndim == 4:  # (output, input, height, width, input in block, output in block)
            both = _padded(padded, 1, block=block)
            out_blocks, in_blocks = both.shape[0] // block, both.shape[1] // block
            split = both.reshape(out_blocks, block, in_blocks, block, *weight.shape[2:])
            yield split.transpose(0, 2, 4, 5, 3, 1).reshape(-1)


def _padded(weight: NDArray[Any], axis: int, *, block: int) -> NDArray[Any]:
    widths = [(0, 0)] * weight.ndim
    widths[axis] = (0, -weight.shape[axis] % block)
    return np.pad(weight, widths)


def split_joined(joined: NDArray[Any], parts: Sequence[NDArray[Any]]) -> tuple[int, ...]:
    """Find the weights that were joined into one along its last or its first axis.

    Args:
        joined: a matrix, or a vector of biases.
        parts: the weights that may be in it.

    Returns:
        Positions in `parts`, in order; empty if the array does not consist of whole weights.
    """
    for turned in (joined.T, joined) if joined.ndim == 2 else (joined,):
        candidates = [form for index, part in enumerate(parts) for form in _rows(index, part, turned=turned)]
        found = _split(turned, candidates)
        if len(found) > 1:
            return tuple(found)
    return ()


def _rows(index: int, part: NDArray[Any], *, turned: NDArray[Any]) -> Iterable[tuple[int, NDArray[Any]]]:
    """The orientations of a part that can be some rows of a matrix."""
    forms = (part, part.T) if part.ndim == 2 else (part,)
    return ((index, form) for form in forms if form.ndim == turned.ndim and form.shape[1:] == turned.shape[1:])


def _split(turned: NDArray[Any], candidates: Sequence[tuple[int, NDArray[Any]]]) -> list[int]:
    found: list[int] = []
    start = 0
    while start < len(turned):
        for index, form in candidates:
            rows = turned[start : start + len(form)]
            if len(rows) == len(form) and np.array_equal(rows[0], form[0]) and np.array_equal(rows, form):
                found.append(index)
                start += len(form)
                break
        else:
            return []
    return found
