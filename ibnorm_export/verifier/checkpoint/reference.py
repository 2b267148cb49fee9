"""What PyTorch computes from a checkpoint: the truth in float64, and the baseline in the file's dtype."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from torch import nn

from ibnorm_export.artifacts.covering_inputs import LARGE_VALUES
from ibnorm_export.artifacts.loaded_model import LoadedModel, torch_dtype
from ibnorm_export.artifacts.tensors import Arrays, DType
from ibnorm_export.progress import Progress
from ibnorm_export.runtimes.runner import Runner
from ibnorm_export.runtimes.torch import Float64TorchRunner, TorchRunner
from ibnorm_export.verifier.checkpoint.coverage import Coverage, measure_coverage
from ibnorm_export.verifier.checkpoint.mapping import MappingMeasurement
from ibnorm_export.verifier.checkpoint.realisations import largest_errors, pooled_spread
from ibnorm_export.verifier.checkpoint.samples import RefusedInputError, refusals
from ibnorm_export.verifier.report import MappingReport
from ibnorm_export.verifier.tolerances import MAX_BASELINE_ERROR

__all__ = ["REALISED", "Reference", "Sample"]

#: Ordinary samples that are run under several realisations of rounding. In half precision, most of the error is that
#: of rounding stored values, which another order of summation hardly changes.
REALISED: Final = MappingProxyType({DType.FP32: 2, DType.FP16: 1, DType.BF16: 1})

#: What inputs cover whose sizes differ from those of a user's example.
_OTHER_SIZES: Final = "inputs of other sizes than your example's"


@dataclass(frozen=True, slots=True)
class Sample:
    """One input, and what PyTorch computes from it.

    Args:
        inputs: arrays by name.
        valid: for some outputs, which leading positions have a defined value (padding has none).
        baseline: outputs of PyTorch in the file's dtype.
        truth: outputs of PyTorch in float64.
        index: number of the sample.
        covers: what a covering input covers; empty for an ordinary sample.
        least_error: by output, the largest error of several realisations of rounding, where they were run.
    """

    inputs: Arrays
    valid: Mapping[str, NDArray[np.bool_]]
    _: KW_ONLY
    baseline: Arrays
    truth: Arrays
    index: int
    covers: str = ""
    least_error: Mapping[str, float] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The number of the sample, and what it covers."""
        return f"sample {self.index}{f', {self.covers}' if self.covers else ''}"

    @property
    def masked_rows(self) -> NDArray[np.bool_]:
        """Which rows are masked throughout; empty for inputs without a mask."""
        mask = self.inputs.get("attention_mask")
        found: NDArray[np.bool_] = np.zeros(0, bool) if mask is None or mask.ndim != 2 else (mask == 0).all(1)
        return found

    def select(self, arrays: Arrays, name: str) -> NDArray[Any]:
        """The values of output `name` that are defined."""
        return arrays[name][self.valid[name]] if name in self.valid else arrays[name]


@dataclass(frozen=True, slots=True)
class _Runs:
    """What PyTorch computed, which covering inputs are not compared, and the mapping of the norms."""

    samples: tuple[Sample, ...]
    left_out: tuple[str, ...]
    _: KW_ONLY
    spread: float
    measurement: MappingMeasurement | None


@dataclass(frozen=True)
class Reference:
    """A checkpoint and the inputs that it is run on. Everything is computed once, when it is first used.

    Args:
        model: the checkpoint.
        dtype: dtype of the baseline.
        inputs: one entry for each sample.
        progress: receives the progress of the work.
        covers: what a covering input covers, by its index. It is left out where PyTorch cannot run it.
        other_sizes: indices of inputs of other sizes than the example of a user's code. Those that the code refuses are
            left out.
        skipped: indices of inputs that are not run.
    """

    model: LoadedModel
    dtype: DType
    _: KW_ONLY
    inputs: tuple[Arrays, ...]
    progress: Progress
    covers: Mapping[int, str] = field(default_factory=dict)
    other_sizes: Collection[int] = ()
    skipped: Collection[int] = ()

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

    @cached_property
    def coverage(self) -> Coverage:
        """What takes part in the checkpoint's output, from a run of the first input.

        Raises:
            RefusedInputError: PyTorch cannot run on it.
        """
        with refusals(0, self.inputs[0]):
            return measure_coverage(self.model, self.mapped, inputs=self.inputs[0])

    def exact(self, module: nn.Module) -> Runner:
        """A runner of `truth` or `mapped`, which computes in float64 throughout."""
        return Float64TorchRunner(self.model, module)

    @cached_property
    def mapping(self) -> MappingReport | None:
        """The user's own norms against their replacements, on every input; None if no norm is replaced."""
        return None if self._runs.measurement is None else self._runs.measurement.report()

    @property
    def samples(self) -> tuple[Sample, ...]:
        """Every input that PyTorch can run, with the outputs of PyTorch.

        Raises:
            RefusedInputError: PyTorch cannot run on an input that is not a covering one, nor one of other sizes.
        """
        return self._runs.samples

    @property
    def left_out(self) -> tuple[str, ...]:
        """Covering inputs that are not compared, and why."""
        return self._runs.left_out

    @property
    def spread(self) -> float:
        """The largest error of several realisations of rounding over that of one run; at least 1."""
        return self._runs.spread

    @cached_property
    def _runs(self) -> _Runs:
        measurement = (
            MappingMeasurement(self.model, self.truth, mapped=self.mapped) if self.model.replaced_norms else None
        )
        samples, left_out = [], []
        for index, inputs in enumerate(self.inputs):
            if index in self.skipped:
                continue
            self.progress("running PyTorch", index, len(self.inputs))
            try:
                sample = self._run(index, inputs, measurement=measurement)
            except RefusedInputError as error:
                what = self.covers.get(index, _OTHER_SIZES if index in self.other_sizes else "")
                if not what:
                    raise
                left_out.append(f"{what}: {error}")
                continue
            reason = _reason_to_leave_out(sample, self.dtype) if sample.covers else ""
            if reason:
                left_out.append(f"{sample.covers}: {reason}")
            else:
                samples.append(sample)
        realised, spread = self._realise(samples)
        return _Runs(realised, tuple(left_out), spread=spread, measurement=measurement)

    def _realise(self, samples: Sequence[Sample]) -> tuple[tuple[Sample, ...], float]:
        """The samples, some with their errors under several realisations of rounding, and the spread of the others."""
        self.progress("running PyTorch with other rounding", 0, 0)
        ordinary = [sample for sample in samples if not sample.covers][: REALISED[self.dtype]]
        # Large values are ill-conditioned, so one run of PyTorch is the least typical there.
        chosen = [*ordinary, *(sample for sample in samples if sample.covers.startswith(LARGE_VALUES))]
        names = [name for name in self.model.outputs if not name.startswith("present.")]
        errors = largest_errors(
            self.model,
            self.baseline,
            dtype=torch_dtype(self.dtype),
            samples=[(sample.inputs, sample.truth, sample.select) for sample in chosen],
            names=names,
        )
        own = [_relative_error(sample, name) for sample in ordinary for name in names]
        spread = pooled_spread(own, [error for found in errors[: len(ordinary)] for error in found.values()])
        by_index = dict(zip((sample.index for sample in chosen), errors, strict=True))
        return tuple(replace(s, least_error=by_index.get(s.index, {})) for s in samples), spread

    def _run(self, index: int, inputs: Arrays, *, measurement: MappingMeasurement | None) -> Sample:
        with refusals(index, inputs):
            exact, offset = self._run_truth(inputs, measurement)
        plain = TorchRunner(self.model, self.baseline).run(inputs)
        plain |= {name: plain[name] + difference for name, difference in offset.items()}
        return Sample(
            inputs,
            self.model.valid(inputs),
            baseline=plain,
            truth=exact,
            index=index,
            covers=self.covers.get(index, ""),
        )

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


def _reason_to_leave_out(sample: Sample, dtype: DType) -> str:
    """Why a covering input cannot be compared; empty if it can."""
    for name in sample.truth:
        exact, rounded = (sample.select(arrays, name).astype(np.float64) for arrays in (sample.truth, sample.baseline))
        if not np.isfinite(exact).all():
            return "the checkpoint itself gives NaN or infinity"
        if not np.isfinite(rounded).all():
            return f"PyTorch overflows in {dtype.value}"
        error = _relative_error(sample, name)
        if error > MAX_BASELINE_ERROR:
            return f"PyTorch in {dtype.value} differs from float64 by {error:.0%}"
    return ""


def _relative_error(sample: Sample, name: str) -> float:
    """The baseline error of one output; infinite if the truth is 0 and the baseline is not."""
    exact, rounded = (sample.select(arrays, name).astype(np.float64) for arrays in (sample.truth, sample.baseline))
    error, size = float(np.linalg.norm(rounded - exact)), float(np.linalg.norm(exact))
    return error / size if size else (np.inf if error else 0.0)
