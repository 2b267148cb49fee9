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
from ibnorm_export.runtimes.runner import Runner
from ibnorm_export.runtimes.torch import Float64TorchRunner, TorchRunner
from ibnorm_export.verifier.mapping import MappingMeasurement
from ibnorm_export.verifier.report import MappingReport
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
        """The user's own module in float64; where their code is not there, the checkpoint's, with IBNorm in place."""
        return self.model.truth()

    @cached_property
    def mapped(self) -> nn.Module:
        """The checkpoint's module, with IBNorm in place, in float64."""
        return self.model.in_float64() if self.model.replaced_norms else self.truth

    @cached_property
    def baseline(self) -> nn.Module:
        """The checkpoint's module in `dtype`."""
        return self.model.in_dtype(torch_dtype(self.dtype))

    def exact(self, module: nn.Module) -> Runner:
        """A runner of `truth` or `mapped`, which computes in float64 throughout."""
        return Float64TorchRunner(self.model, module)

    @cached_property
    def mapping(self) -> MappingReport | None:
        """The user's own norms against their replacements, on every input; None if no norm is replaced."""
        _, measurement = self._runs
        return None if measurement is None else measurement.report()

    @property
    def samples(self) -> tuple[Sample, ...]:
        """Every input with the outputs of PyTorch.

        Raises:
            RefusedInputError: PyTorch cannot run on an input.
        """
        return self._runs[0]

    @cached_property
    def _runs(self) -> tuple[tuple[Sample, ...], MappingMeasurement | None]:
        baseline = TorchRunner(self.model, self.baseline)
        measurement = (
            MappingMeasurement(self.model, self.truth, mapped=self.mapped) if self.model.replaced_norms else None
        )
        samples = []
        for index, inputs in enumerate(self.inputs):
            self.progress("running PyTorch", index, len(self.inputs))
            with refusals(index, inputs):
                exact, offset = self._run_truth(inputs, measurement)
            plain = baseline.run(inputs)
            plain |= {name: plain[name] + difference for name, difference in offset.items()}
            samples.append(Sample(inputs, self.model.valid(inputs), plain, exact))
        return tuple(samples), measurement

    def _run_truth(self, inputs: Arrays, measurement: MappingMeasurement | None) -> tuple[Arrays, Arrays]:
        """The outputs of `truth`, and what to add to those of the baseline, so that it has only the dtype's error.

        The baseline has IBNorm in place. If these norms are not the user's, its error would be large, and so would the
        tolerance of the file.
        """
        truth = self.exact(self.truth)
        if measurement is None:
            return truth.run(inputs), {}
        with measurement.recording():
            exact = truth.run(inputs)
        mapped = self.exact(self.mapped).run(inputs)

        def rounded() -> Arrays:
            with measurement.rounding_norms():
                return truth.run(inputs)

        measurement.add_outputs(mapped, exact, rounded=rounded)
        if measurement.report():
            return exact, {}
        comparable = [n for n, a in exact.items() if a.shape == mapped[n].shape and np.issubdtype(a.dtype, np.floating)]
        return exact, {name: exact[name] - mapped[name] for name in comparable}
