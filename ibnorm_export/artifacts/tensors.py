"""Inputs and outputs of a model: names, shapes, element types and values."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from ibnorm_export.errors import IBNormError, quoted

__all__ = ["DEFAULT_LENGTH", "Arrays", "DType", "InputSpec", "WeightType", "default_length"]

#: Default length of a sequence, in tokens.
DEFAULT_LENGTH: Final = 128

if TYPE_CHECKING:
    from numpy.typing import NDArray

    #: Tensors by name.
    Arrays = dict[str, NDArray[Any]]
else:  # the help of every command imports this module, and NumPy takes longer than the help
    Arrays = dict


def default_length(max_positions: int) -> int:
    """Return the default length of a sequence, in tokens.

    Args:
        max_positions: the longest sequence that the model takes, in tokens; 0 if that is unknown.
    """
    return min(DEFAULT_LENGTH, max_positions or DEFAULT_LENGTH)


class DType(enum.StrEnum):
    """Element types that a model is exported, compared and timed in."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"

    @classmethod
    def of(cls, value: object, *, error: type[IBNormError] = IBNormError) -> DType:
        """Read an element type in any common spelling.

        Args:
            value: a `DType`, a name ("fp16", "float16", "half"), or a type of PyTorch or NumPy (`torch.float16`).
            error: class of the error that is raised.

        Raises:
            IBNormError: the value is none of these.
        """
        # Types are compared by their names, so that neither PyTorch nor NumPy must be imported.
        match = _DTYPE_SPELLING.fullmatch(str(value).strip().lower())
        name = match["name"] if match else ""
        if name in _DTYPE_NAMES:
            return _DTYPE_NAMES[name]
        hint = ""
        if name in ("int8", "int4"):
            hint = f". {name} is a type of stored weights: use ExportOptions.with_weights({quoted(name)})"
        raise error(f"dtype is {quoted(str(value))}; it must be one of {', '.join(cls)}{hint}")


#: Spellings of an element type: its name, with the prefix "torch.", or as NumPy prints its class.
_DTYPE_SPELLING: Final = re.compile(r"(torch\.|<class '(numpy|ml_dtypes)\.)?(?P<name>\w+)('>)?")

_DTYPE_NAMES: Final = {
    **dict.fromkeys(("fp32", "float32", "float"), DType.FP32),
    **dict.fromkeys(("fp16", "float16", "half"), DType.FP16),
    **dict.fromkeys(("bf16", "bfloat16"), DType.BF16),
}


class WeightType(enum.StrEnum):
    """What the weights of an exported file are stored as."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"
    """Blocks of 8-bit integers that share a scale."""
    INT4 = "int4"
    """Blocks of 4-bit integers that share a scale."""

    @property
    def bits(self) -> int | None:
        """Bits of a quantised weight; None if weights are floating-point numbers."""
        return {WeightType.INT8: 8, WeightType.INT4: 4}.get(self)

    @property
    def dtype(self) -> DType:
        """The type that a model with such weights computes in."""
        return DType.FP32 if self.bits else DType(self.value)


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
