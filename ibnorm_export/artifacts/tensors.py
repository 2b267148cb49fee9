"""Inputs and outputs of a model: names, shapes, element types and values."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any, Final

from numpy.typing import NDArray

__all__ = ["DEFAULT_LENGTH", "Arrays", "DType", "InputSpec", "default_length"]

#: Tokens of a sequence where the user gives no length.
DEFAULT_LENGTH: Final = 128

#: Tensors by name.
Arrays = dict[str, NDArray[Any]]


def default_length(max_positions: int) -> int:
    """Tokens of a sequence where the user gives no length.

    Args:
        max_positions: the longest sequence that the model takes, in tokens; 0 where that is unknown.
    """
    return min(DEFAULT_LENGTH, max_positions or DEFAULT_LENGTH)


class DType(enum.StrEnum):
    """Element types that a model is exported, compared and timed in."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"


@dataclass(frozen=True, slots=True)
class InputSpec:
    """One input of a model.

    Args:
        name: its name in the ONNX file.
        shape: an integer is fixed, a string names a dynamic axis.
        floating: whether values have the dtype of the model; they are int64 otherwise.
    """

    name: str
    shape: tuple[int | str, ...]
    floating: bool
