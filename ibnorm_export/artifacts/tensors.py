"""Inputs and outputs of a model, whatever runs it: their names, shapes, element types and values."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

__all__ = ["Arrays", "DType", "InputSpec"]

#: Tensors by name.
Arrays = dict[str, NDArray[Any]]


class DType(enum.StrEnum):
    """Element types that a model is exported, compared and timed in."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"


@dataclass(frozen=True, slots=True)
class InputSpec:
    """One input of a model.

    Args:
        name: as in the ONNX file.
        shape: an integer is fixed, a string names a dynamic axis.
        floating: True where values have the model's own dtype, False for int64.
    """

    name: str
    shape: tuple[int | str, ...]
    floating: bool
