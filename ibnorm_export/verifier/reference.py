"""What PyTorch computes from a checkpoint: the truth in float64, and the baseline in the file's dtype."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from ibnorm_export.artifacts.loaded_model import LoadedModel, torch_dtype
from ibnorm_export.artifacts.tensors import Arrays, DType
from ibnorm_export.progress import Progress
from ibnorm_export.runtimes.torch import TorchRunner
from ibnorm_export.verifier.samples import refusals

__all__ = ["Reference", "Sample"]


@dataclass(frozen=True, slots=True)
class Sample:
    """One input, and what PyTorch computes from it.

    Args:
        inputs: arrays by name.
        valid: for some outputs, which leading positions have a defined value (padding has none).
        baseline: outputs of PyTorch in the file's dtype.
        truth: outputs of PyTorch in float64.
    """

    inputs: Arrays
    valid: Mapping[str, NDArray[np.bool_]]
    baseline: Arrays
    truth: Arrays

    def select(self, arrays: Arrays, name: str) -> NDArray[Any]:
        """The values of output `name` that are defined."""
        return arrays[name][self.valid[name]] if name in self.valid else arrays[name]


@dataclass(frozen=True)
class Reference:
    """A checkpoint and the inputs that it is run on. Everything is computed once, when it is first used.

    Args:
        model: the checkpoint.
        dtype: dtype of the baseline.
        inputs: one entry for each sample.
        progress: receives the progress of the work.
    """

    model: LoadedModel
    dtype: DType
    inputs: tuple[Arrays, ...]
    progress: Progress

    @cached_property
    def truth(self) -> nn.Module:
        """The checkpoint's module in float64."""
        return self.model.in_float64()

    @cached_property
    def baseline(self) -> nn.Module:
        """The checkpoint's module in `dtype`."""
        return self.model.in_dtype(torch_dtype(self.dtype))

    @cached_property
    def samples(self) -> tuple[Sample, ...]:
        """Every input with the outputs of PyTorch.

        Raises:
            RefusedInputError: PyTorch cannot run on an input.
        """
        truth, baseline = TorchRunner(self.model, self.truth), TorchRunner(self.model, self.baseline)
        samples = []
        for index, inputs in enumerate(self.inputs):
            self.progress("running PyTorch", index, len(self.inputs))
            with refusals(index, inputs):
                exact = truth.run(inputs)
            samples.append(Sample(inputs, self.model.valid(inputs), baseline.run(inputs), exact))
        return tuple(samples)
