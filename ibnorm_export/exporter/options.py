"""How a model is exported. Options are checked when they are created."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any

from ibnorm_export.artifacts.metadata import CacheKind
from ibnorm_export.artifacts.tensors import DType, WeightType
from ibnorm_export.choices import choice
from ibnorm_export.errors import ExportError, quoted
from ibnorm_export.graph.quantization import Quantization
from ibnorm_export.op.onnx_functions import OPSETS

if TYPE_CHECKING:
    import torch

__all__ = ["ExportOptions"]


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """How to export a model. Every value is converted to its type and checked.

    Args:
        dtype: type of weights, activations and floating-point inputs, as `DType.of` reads it.
        opset: version of ONNX's default domain; None is the default of the model's family.
        inline: expand the norms into standard operators, for runtimes without local functions (OpenVINO). The fused
            kernels cannot run such a file.
        fuse_skip: fuse a residual addition and the norm that follows it into one SkipIBNorm node: the results are
            bit-identical, and the values are read one time fewer.
        quantization: how the weights of a language model are quantised; None stores them in the dtype.
        cache: "dynamic" (a language model returns a longer tensor at every step) or "static" (it writes to a buffer in
            place; needs opset 24).

    Raises:
        ExportError: a value is not legal.
    """

    dtype: DType = DType.FP32
    opset: int | None = None
    _: KW_ONLY
    inline: bool = False
    fuse_skip: bool = True
    quantization: Quantization | None = None
    cache: CacheKind = CacheKind.DYNAMIC

    if TYPE_CHECKING:  # every spelling is accepted

        def __init__(
            self,
            dtype: DType | str | torch.dtype = DType.FP32,
            opset: int | None = None,
            *,
            inline: bool = False,
            fuse_skip: bool = True,
            quantization: Quantization | None = None,
            cache: CacheKind | str = CacheKind.DYNAMIC,
        ) -> None: ...

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", DType.of(self.dtype, error=ExportError))
        if self.opset is not None and (type(self.opset) is not int or self.opset not in OPSETS):
            raise ExportError(f"opset is {quoted(self.opset)}; it must be {OPSETS.start} to {OPSETS.stop - 1}, or None")
        for name in ("inline", "fuse_skip"):
            if not isinstance(getattr(self, name), bool):
                raise ExportError(f"{name} is {quoted(getattr(self, name))}; it must be True or False")
        object.__setattr__(self, "cache", choice(CacheKind, self.cache, name="cache", error=ExportError))
        if self.quantization is None:
            return
        if not isinstance(self.quantization, Quantization):
            raise ExportError(f"quantization is {quoted(self.quantization)}; it must be a Quantization or None")
        if self.dtype is not DType.FP32:
            raise ExportError(f"dtype is {self.dtype}; a model with quantised weights must compute in fp32")

    @classmethod
    def with_weights(
        cls,
        weights: WeightType | str,
        *,
        block_size: int = 32,
        head: WeightType | str = WeightType.INT8,
        **others: Any,
    ) -> ExportOptions:
        """Return options for a type of stored weights, quantised or not.

        Args:
            weights: "fp32", "fp16", "bf16", "int8" or "int4".
            block_size: number of quantised weights that share a scale.
            head: "int8", "int4" or "fp32": type of the matrix that produces the logits, if the others are quantised.
            others: `opset`, `inline`, `fuse_skip` and `cache`, as in `ExportOptions`.

        Raises:
            ExportError: a value is not legal.
        """
        weights, quantization = choice(WeightType, weights, name="weights", error=ExportError), None
        if weights.bits is not None:
            heads = (WeightType.INT8, WeightType.INT4, WeightType.FP32)
            if head not in heads:
                raise ExportError(
                    f"head is {quoted(str(head))}; with quantised weights it must be one of {', '.join(heads)}"
                )
            quantization = Quantization(weights.bits, block_size, WeightType(head).bits)
        return cls(weights.dtype, quantization=quantization, **others)
