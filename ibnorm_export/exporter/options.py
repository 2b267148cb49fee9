"""How a model is exported. Options are checked when they are created."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from ibnorm_export.artifacts.axes import PAST, axis_name, axis_sizes
from ibnorm_export.artifacts.metadata import CacheKind
from ibnorm_export.artifacts.tensors import DType, WeightType
from ibnorm_export.choices import choice, whole_number
from ibnorm_export.errors import ExportError, quoted
from ibnorm_export.exporter.runtime_settings import RuntimeSettings, check_settings, runtime_settings
from ibnorm_export.graph.quantization import Quantization
from ibnorm_export.op.onnx_functions import OPSETS

if TYPE_CHECKING:
    import torch

__all__ = ["ExportOptions", "parse_shape"]

#: A size in a text.
_SIZE: Final = re.compile("[0-9]{1,9}")


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """How to export a model. Every value is converted to its type and checked.

    Args:
        dtype: type of weights, activations and floating-point inputs, as `DType.of` reads it.
        opset: version of ONNX's default domain; None is the default of the model's family.
        inline: expand the norms into standard operators, for runtimes without local functions (OpenVINO). The fused
            kernels cannot run such a file. None does what the runtime needs, and keeps the functions if none is named.
        fuse_skip: fuse a residual addition and the norm that follows it into one SkipIBNorm node: the results are
            bit-identical, and the values are read one time fewer.
        quantization: how the weights of a language model are quantised; None stores them in the dtype.
        cache: "dynamic" (a language model returns a longer tensor at every step) or "static" (it writes to a buffer in
            place; needs opset 24).
        shape: fixed sizes by name of the axis, such as `batch_size` and `sequence_length`, for runtimes that take no
            dynamic axes.
        runtime: the runtime to export for, such as "openvino" or "ort>=1.18"; see `runtime_settings`. None is any that
            takes local functions and the opset.

    Raises:
        ExportError: a value is not legal.
    """

    dtype: DType = DType.FP32
    opset: int | None = None
    _: KW_ONLY
    inline: bool | None = None
    fuse_skip: bool = True
    quantization: Quantization | None = None
    cache: CacheKind = CacheKind.DYNAMIC
    shape: Mapping[str, int] = field(default_factory=dict)
    runtime: RuntimeSettings | None = None

    if TYPE_CHECKING:  # every spelling is accepted

        def __init__(
            self,
            dtype: DType | str | torch.dtype = DType.FP32,
            opset: int | None = None,
            *,
            inline: bool | None = None,
            fuse_skip: bool = True,
            quantization: Quantization | None = None,
            cache: CacheKind | str = CacheKind.DYNAMIC,
            shape: Mapping[str, int] = MappingProxyType({}),
            runtime: RuntimeSettings | str | None = None,
        ) -> None: ...

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", DType.of(self.dtype, error=ExportError))
        if self.opset is not None and (type(self.opset) is not int or self.opset not in OPSETS):
            raise ExportError(f"opset is {quoted(self.opset)}; it must be {OPSETS.start} to {OPSETS.stop - 1}, or None")
        for name in ("inline", "fuse_skip"):
            value = getattr(self, name)
            if not isinstance(value, bool) and not (name == "inline" and value is None):
                raise ExportError(f"{name} is {quoted(value)}; it must be True or False")
        object.__setattr__(self, "cache", choice(CacheKind, self.cache, name="cache", error=ExportError))
        object.__setattr__(self, "shape", _sizes(self.shape))
        self._check_quantization()
        self._resolve_runtime()

    def _check_quantization(self) -> None:
        if self.quantization is None:
            return
        if not isinstance(self.quantization, Quantization):
            raise ExportError(f"quantization is {quoted(self.quantization)}; it must be a Quantization or None")
        if self.dtype is not DType.FP32:
            raise ExportError(f"dtype is {self.dtype}; a model with quantised weights must compute in fp32")

    def _resolve_runtime(self) -> None:
        """Read the runtime, check the other options against it, and decide whether to expand the norms."""
        if self.runtime is not None:
            settings = runtime_settings(self.runtime)
            object.__setattr__(self, "runtime", settings)
            wanted = self.quantization
            check_settings(
                settings,
                inline=self.inline,
                opset=self.opset,
                dtype=self.dtype,
                bits=() if wanted is None else {wanted.bits, wanted.head_bits or wanted.bits},
                static_cache=self.cache is CacheKind.STATIC,
            )
        if self.inline is None:
            object.__setattr__(self, "inline", self.runtime is not None and self.runtime.inline)

    @classmethod
    def with_weights(
        cls,
        weights: WeightType | str,
        *,
        block_size: int = 32,
        head: WeightType | str | None = None,
        **others: Any,
    ) -> ExportOptions:
        """Return options for a type of stored weights, quantised or not.

        Args:
            weights: "fp32", "fp16", "bf16", "int8" or "int4".
            block_size: number of quantised weights that share a scale.
            head: "int8", "int4" or "fp32": type of the matrix that produces the logits, if the others are quantised.
                None is int8, or int4 for a runtime without int8.
            others: `opset`, `inline`, `fuse_skip`, `cache`, `shape` and `runtime`, as in `ExportOptions`.

        Raises:
            ExportError: a value is not legal.
        """
        weights, quantization = choice(WeightType, weights, name="weights", error=ExportError), None
        if weights.bits is not None:
            heads = (WeightType.INT8, WeightType.INT4, WeightType.FP32)
            if head is None:
                settings = None if others.get("runtime") is None else runtime_settings(others["runtime"])
                head = WeightType.INT4 if settings is not None and settings.bits == (4,) else WeightType.INT8
            if head not in heads:
                raise ExportError(
                    f"head is {quoted(str(head))}; with quantised weights it must be one of {', '.join(heads)}"
                )
            quantization = Quantization(weights.bits, block_size, WeightType(head).bits)
        return cls(weights.dtype, quantization=quantization, **others)


def parse_shape(text: str) -> dict[str, int]:
    """Read sizes from a text of the form "AXIS=SIZE,AXIS=SIZE".

    Raises:
        ExportError: the text does not have that form, or names an axis twice.
    """
    sizes: dict[str, int] = {}
    for item in text.split(","):
        axis, _, size = (part.strip() for part in item.partition("="))
        if not axis or not _SIZE.fullmatch(size):
            raise ExportError(
                f"shape is {quoted(text)}; it must be AXIS=SIZE,... as in batch_size=1,sequence_length=128"
            )
        if axis_name(axis) in sizes:
            raise ExportError(f"shape is {quoted(text)}, which names {axis} twice")
        sizes[axis_name(axis)] = int(size)
    return sizes


def _sizes(shape: object) -> Mapping[str, int]:
    """Sizes by today's names of axes, checked."""
    if not isinstance(shape, Mapping):
        raise ExportError(f"shape is {quoted(shape)}; it must hold sizes by name of the axis")
    sizes = {
        str(axis): whole_number(
            size, name=f"size of {axis}", least=0 if axis_name(str(axis)) == PAST else 1, error=ExportError
        )
        for axis, size in shape.items()
    }
    return axis_sizes(sizes, error=ExportError)
