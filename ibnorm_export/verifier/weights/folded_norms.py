"""Norms with running statistics that a tool has folded into the convolution before them, or into a scale and a shift.

At inference such a norm is y = scale * x + shift for each channel, so a convolution with it is another convolution:
scale * (W x + b) + shift = (scale * W) x + (scale * b + shift).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.op.norm_variants import BatchIBNorm
from ibnorm_export.op.spec import Compression
from ibnorm_export.verifier.weights.tool_layouts import blocked_forms

__all__ = ["FoldedNorms"]

#: Largest difference over the largest value, in steps of the file's dtype.
_STEPS: Final = 16


@dataclass(frozen=True, slots=True)
class _Affine:
    """A norm as scale and shift (features,), and the tensors that they are computed from."""

    scale: NDArray[np.float64]
    shift: NDArray[np.float64]
    tensors: tuple[Tensor, ...]


class FoldedNorms:
    """Recognises constants that consist of a weight and a norm.

    Args:
        model: the checkpoint.
        dtype: the dtype that the file has weights in.
    """

    def __init__(self, model: LoadedModel, dtype: torch.dtype) -> None:
        self._model = model
        self._dtype = dtype

    def find(self, array: NDArray[Any], *, blocked: bool) -> tuple[Tensor, ...]:
        """The tensors of the checkpoint that a constant was computed from; empty if it is not a folded norm.

        Args:
            array: a constant of the file.
            blocked: whether it may be in blocks of channels; see `tool_layouts`.
        """
        actual = np.asarray(array, dtype=np.float64).reshape(-1)
        for norm in self._norms:
            if actual.size % len(norm.scale) and not blocked:
                continue
            for expected, tensors in self._folded(norm, actual.size, blocked=blocked):
                if any(self._close(actual, form) for form in (blocked_forms(expected) if blocked else [expected])):
                    return (*norm.tensors, *tensors)
        return ()

    def _close(self, actual: NDArray[np.float64], expected: NDArray[np.float64]) -> bool:
        if actual.size != expected.size:
            return False
        tolerance = _STEPS * float(torch.finfo(self._dtype).eps) * float(np.abs(expected).max(initial=0.0))
        return bool((np.abs(actual - expected.reshape(-1)) <= tolerance).all())

    def _folded(
        self, norm: _Affine, size: int, *, blocked: bool
    ) -> Iterator[tuple[NDArray[np.float64], tuple[Tensor, ...]]]:
        """What a norm can have become: its scale, its shift, and every weight that it may follow, scaled."""
        yield norm.scale, ()
        yield norm.shift, ()
        for weight in self._weights:
            features = len(norm.scale)
            if weight.dim() == 0 or weight.shape[0] != features or (weight.numel() != size and not blocked):
                continue
            value = self._value(weight)
            if weight.dim() == 1:
                yield value * norm.scale + norm.shift, (weight,)
            else:
                yield value * norm.scale.reshape(-1, *[1] * (weight.dim() - 1)), (weight,)

    @cached_property
    def _weights(self) -> tuple[Tensor, ...]:
        return tuple(p for p in self._model.module.parameters() if p.is_floating_point())

    @cached_property
    def _norms(self) -> tuple[_Affine, ...]:
        return tuple(found for module in self._model.module.modules() if (found := self._affine(module)) is not None)

    def _value(self, tensor: Tensor) -> NDArray[np.float64]:
        rounded: NDArray[np.float64] = tensor.detach().to(self._dtype).double().numpy()
        return rounded

    def _affine(self, module: nn.Module) -> _Affine | None:
        """The scale and shift of a norm; None for a module that is not an affine function of each channel."""
        own: tuple[Tensor, ...]
        if isinstance(module, BatchIBNorm) and module.spec.compression is Compression.LINEAR:
            own = (module.running_mean, module.compressed_mean, module.compressed_var)
            mean, c_mean, c_var = (self._value(tensor) for tensor in own)
            lambd = module.spec.lambd
            mean, variance, epsilon = mean + lambd * c_mean, lambd**2 * c_var, lambd**2 * module.spec.epsilon
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            assert module.running_var is not None
            own = (module.running_mean, module.running_var)
            (mean, variance), epsilon = (self._value(tensor) for tensor in own), module.eps
        else:
            return None
        weight, bias = module.weight, module.bias
        scale = (1.0 if weight is None else self._value(weight)) / np.sqrt(variance + epsilon)
        shift = (0.0 if bias is None else self._value(bias)) - mean * scale
        return _Affine(scale, shift, (*own, *(p for p in (weight, bias) if p is not None)))
