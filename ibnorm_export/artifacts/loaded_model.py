"""A model in memory that is ready to be exported, compared or timed: the type between `models` and the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ibnorm_export.artifacts.float64_parameters import widened_copy
from ibnorm_export.artifacts.metadata import Task
from ibnorm_export.artifacts.module_copy import cast_buffers, copy_module
from ibnorm_export.artifacts.tensors import Arrays, DType, InputSpec
from ibnorm_export.errors import CheckpointError
from ibnorm_export.op.norm_variants import BatchIBNorm
from ibnorm_export.op.spec import IBNormSpec
from ibnorm_export.op.torch_op import IBNorm

__all__ = ["CustomModel", "LoadedModel", "torch_dtype"]


def torch_dtype(dtype: DType) -> torch.dtype:
    """PyTorch's name of an element type."""
    return {DType.FP32: torch.float32, DType.FP16: torch.float16, DType.BF16: torch.bfloat16}[dtype]


@dataclass(frozen=True, slots=True)
class CustomModel:
    """What a user's own factory (`--model package.module:factory`) returns.

    Args:
        module: the model, norms in place, weights of any value (they are loaded into it).
        inputs: in the order of `module.forward`.
        outputs: names of what forward returns, one tensor or a tuple of them.
        sample: (generator, index) -> arrays by input name; None draws normal values and
            small integers.
        exact: makes a float64 copy of `module` compute in float64 throughout; needed only where
            the model's own code forces another type.
        opset: default opset for export.
    """

    module: nn.Module
    inputs: tuple[InputSpec, ...]
    _: KW_ONLY
    outputs: tuple[str, ...] = ("output",)
    sample: Callable[[np.random.Generator, int], Arrays] | None = None
    exact: Callable[[nn.Module], None] | None = None
    opset: int = 20


class _Entry(nn.Module):
    """Tensors in, tuple of tensors out: the signature that is exported."""

    def __init__(self, checkpoint: nn.Module, call: Callable[..., tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.checkpoint = checkpoint
        self._call = call
        self.training = False  # of this wrapper; `checkpoint` keeps its mode

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return self._call(self.checkpoint, *tensors)


def _all_valid(arrays: Arrays) -> dict[str, NDArray[np.bool_]]:
    return {}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model with its weights, and all that the toolchain must know about it.

    Args:
        module: in evaluation mode, on the CPU, parameters as the checkpoint stores them.
        family: name of the architecture, e.g. "llama".
        inputs, outputs: of `call`, in order.
        call: (module, *tensors) -> tuple of outputs.
        sample: (generator, index) -> inputs shaped as in use; the index walks through the shapes
            that matter (batch 1, one token, padding, ...).
        valid: inputs -> for some outputs, which leading positions have a defined value (padding
            has none); outputs that are not named count whole.
        exact: makes a float64 copy of `module` compute in float64 throughout.
        opset: default opset for export.
        source: where the checkpoint came from, as given.
        source_sha256: hash of its config and weights.
        section: the `ibnorm` section, or None for a model built by the user's own code.
        warnings: what the user should know about the weights.
        task: what it was loaded for.
        trace_sizes: sizes of dynamic axes to trace with, where they are not free.
        vocabulary: of a language model loaded for text generation.
        max_positions: the longest sequence of a language model; 0 where nothing is known of one.
        norms: IBNorm by module path; empty for a baseline, whose section names other norms alone.
    """

    module: nn.Module
    family: str
    _: KW_ONLY
    inputs: tuple[InputSpec, ...]
    outputs: tuple[str, ...]
    call: Callable[..., tuple[Tensor, ...]]
    sample: Callable[[np.random.Generator, int], Arrays]
    source: str
    source_sha256: str
    valid: Callable[[Arrays], dict[str, NDArray[np.bool_]]] = _all_valid
    exact: Callable[[nn.Module], None] | None = None
    opset: int = 20
    section: Mapping[str, Any] | None = None
    warnings: tuple[str, ...] = ()
    task: Task = Task.FORWARD
    trace_sizes: Mapping[str, int] = field(default_factory=dict)
    vocabulary: int = 0
    max_positions: int = 0
    norms: Mapping[str, IBNormSpec] = field(init=False)

    def __post_init__(self) -> None:
        modules = list(self.module.named_modules())
        norms = {path: m.spec for path, m in modules if isinstance(m, (IBNorm, BatchIBNorm))}
        if not norms and self.section is None:  # a section may say that all are of another kind: a baseline
            raise CheckpointError(
                f"{self.source}: the model has no IBNorm module. A class of your own becomes one through "
                "ibnorm_export.models.register_adapter(YourClass, convert)"
            )
        if not any(p.is_floating_point() for p in self.module.parameters()):
            raise CheckpointError(
                f"{self.source}: the model has no floating-point parameter, and theirs is the type that it computes "
                "in; give it one, the scale of a norm for instance"
            )
        object.__setattr__(self, "norms", norms)

    def entry(self, module: nn.Module | None = None) -> nn.Module:
        """The callable of positional tensors that is exported and compiled.

        Args:
            module: a copy of `module` that the caller has made; None makes one in evaluation mode.
        """
        return _Entry(copy_module(self.module) if module is None else module, self.call)

    def in_dtype(self, dtype: torch.dtype) -> nn.Module:
        """A copy of `module` in evaluation mode, its parameters in `dtype`; see `copy_module`."""
        return copy_module(self.module, dtype)

    def converted(self, dtype: torch.dtype) -> LoadedModel:
        """The same model with `in_dtype(dtype)` as its module; this one stays as it is."""
        return replace(self, module=self.in_dtype(dtype))

    def in_float64(self) -> nn.Module:
        """A copy of `module` that computes in float64 throughout: the truth of every comparison.

        Its parameters stand for those of `module` and take no memory; see `float64_parameters`.
        """
        module = widened_copy(self.module).eval()
        cast_buffers(module, torch.float64)
        if self.exact is not None:
            self.exact(module)
        return module

    def example(self) -> tuple[Tensor, ...]:
        """Small inputs to trace with: every dynamic axis above 1 and of its own size where free."""
        sizes = dict(self.trace_sizes)
        tensors = []
        for spec in self.inputs:
            shape = [n if isinstance(n, int) else sizes.setdefault(n, 2 + len(sizes) * 5) for n in spec.shape]
            if spec.floating:
                dtype = next(p.dtype for p in self.module.parameters() if p.is_floating_point())
                tensors.append(torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype))
            else:
                tensors.append(torch.ones(shape, dtype=torch.int64))
        return tuple(tensors)
