"""A model in memory, with everything that export, verification and benchmarks need to know about it."""

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
    """PyTorch's dtype of an element type."""
    return {DType.FP32: torch.float32, DType.FP16: torch.float16, DType.BF16: torch.bfloat16}[dtype]


@dataclass(frozen=True, slots=True)
class CustomModel:
    """What a user's own factory (`--model package.module:factory`) returns.

    Args:
        module: the model with its norms in place. The weights of the checkpoint are loaded into it.
        inputs: the inputs of `module.forward`, in order.
        outputs: names of the tensors that `module.forward` returns: one tensor or a tuple.
        sample: (generator, index) -> arrays by input name. If None, inputs are normal values and small integers.
        exact: makes a float64 copy of `module` compute in float64 throughout. It is only needed if the model's code
            casts to another type.
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
    """The signature that is exported: tensors in, a tuple of tensors out."""

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
    """A model with its weights, and everything that the tools need to know about it.

    It has more than eight fields because each family of models sets all of them, once.

    Args:
        module: the model in evaluation mode, on the CPU, with parameters as the checkpoint stores them. Its norms are
            IBNorm; it is what is exported.
        original: the user's own module with the user's own norm classes, whose parameters share the memory of those of
            `module`. None where the user's code is not there, as for a folder that only has a config.
        family: name of the architecture, e.g. "llama".
        inputs: the inputs of `call`, in order.
        outputs: names of the outputs of `call`, in order.
        call: (module, *tensors) -> tuple of outputs.
        sample: (generator, index) -> inputs with shapes as in practice. The index selects one of the shapes that matter
            (batch 1, one token, padding, ...).
        valid: inputs -> a mask by output name of the positions that have a defined value; padding has none. All
            positions of an output that is not named are valid.
        exact: makes a float64 copy of `module` compute in float64 throughout.
        opset: default opset for export.
        source: path of the checkpoint, as given.
        source_sha256: hash of its config and weights.
        section: the `ibnorm` section; None for a model that the user's own code builds.
        warnings: what the user should know about the weights.
        notes: how the checkpoint was read: which weights were chosen, which prefix was stripped.
        task: what the model was loaded for.
        trace_sizes: sizes of dynamic axes to trace with, for axes that do not take every size.
        vocabulary: number of tokens of a language model that was loaded for text generation; else 0.
        max_positions: the longest sequence of a language model, in tokens; 0 if that is unknown.
        arguments: how `forward` is called, as far as the inputs do not show it; see `ModelMetadata.arguments`.
        blocks: path of a list of blocks of `module`, of which a model with fewer can be made by cutting the list and
            setting `module.config.num_hidden_layers`; "" if that is not known.
        norms: the spec of every IBNorm by module path; empty if all norms are of another kind, as in a baseline.
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
    original: nn.Module | None = None
    valid: Callable[[Arrays], dict[str, NDArray[np.bool_]]] = _all_valid
    exact: Callable[[nn.Module], None] | None = None
    opset: int = 20
    section: Mapping[str, Any] | None = None
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    task: Task = Task.FORWARD
    trace_sizes: Mapping[str, int] = field(default_factory=dict)
    vocabulary: int = 0
    max_positions: int = 0
    arguments: Mapping[str, Any] = field(default_factory=dict)
    blocks: str = ""
    norms: Mapping[str, IBNormSpec] = field(init=False)

    def __post_init__(self) -> None:
        modules = list(self.module.named_modules())
        norms = {path: m.spec for path, m in modules if isinstance(m, (IBNorm, BatchIBNorm))}
        if not any(p.is_floating_point() for p in self.module.parameters()):
            raise CheckpointError(
                f"{self.source}: the model has no floating-point parameter, so its dtype is unknown; give it one, for "
                "example the scale of a norm"
            )
        object.__setattr__(self, "norms", norms)

    def entry(self, module: nn.Module | None = None) -> nn.Module:
        """Return the callable that is exported and compiled: it takes tensors by position.

        Args:
            module: a copy of `module` that the caller has made; None makes one in evaluation mode.
        """
        return _Entry(copy_module(self.module) if module is None else module, self.call)

    def in_dtype(self, dtype: torch.dtype) -> nn.Module:
        """Return a copy of `module` in evaluation mode with parameters in `dtype`; see `copy_module`."""
        return copy_module(self.module, dtype)

    def converted(self, dtype: torch.dtype) -> LoadedModel:
        """Return the same model with `in_dtype(dtype)` as its module, and no original; this one does not change."""
        return replace(self, module=self.in_dtype(dtype), original=None)

    def widened(self, dtype: torch.dtype) -> LoadedModel:
        """Return what `converted` returns for a wider type, without a copy of the weights; see `float64_parameters`."""
        module = widened_copy(self.module, dtype).eval()
        cast_buffers(module, dtype)
        return replace(self, module=module, original=None)

    def in_float64(self) -> nn.Module:
        """Return a copy of `module` that computes in float64 throughout.

        Its parameters share the memory of those of `module`; see `float64_parameters`.
        """
        return self._in_float64(self.module)

    def truth(self) -> nn.Module:
        """Return what every comparison is held to, in float64: `original` if there is one, otherwise `module`."""
        return self._in_float64(self.module if self.original is None else self.original)

    def _in_float64(self, module: nn.Module) -> nn.Module:
        copied = widened_copy(module).eval()
        cast_buffers(copied, torch.float64)
        if self.exact is not None:
            self.exact(copied)
        return copied

    @property
    def replaced_norms(self) -> tuple[str, ...]:
        """Paths of the modules whose class differs between `original` and `module`."""
        if self.original is None:
            return ()
        own = dict(self.original.named_modules(remove_duplicate=False))
        return tuple(path for path, m in self.module.named_modules() if path in own and type(own[path]) is not type(m))

    def example(self) -> tuple[Tensor, ...]:
        """Return small inputs to trace with. Sizes of dynamic axes are above 1 and, where possible, all different."""
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
