"""Hold what a converted file computes to PyTorch in float64, for runtimes that `verify` does not read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

import numpy as np

from ibnorm_export.artifacts.loaded_model import LoadedModel, torch_dtype
from ibnorm_export.artifacts.tensors import Arrays, DType
from ibnorm_export.errors import ExportError
from ibnorm_export.runtimes.torch import Float64TorchRunner, TorchRunner

__all__ = ["SAMPLES", "check_numbers"]

#: Number of inputs that are compared; each has another shape where shapes are dynamic.
SAMPLES: Final = 3

#: Factor and floor of the tolerance over PyTorch's error in the same dtype; the reasons are those of
#: `verifier.tolerances.BOUNDS`.
_BOUNDS: Final = {DType.FP32: (3.0, 1e-6), DType.FP16: (2.0, 1e-6), DType.BF16: (2.0, 1e-6)}


def _error(found: Arrays, truth: Arrays, *, model: LoadedModel, inputs: Arrays) -> dict[str, float]:
    """Norm-wise relative error of each output that has values, where they are defined."""
    masks = model.valid(inputs)
    errors = {}
    for name, expected in truth.items():
        mask = masks.get(name, np.ones(expected.shape[: expected.ndim - 1], dtype=bool))
        difference = (found[name].astype(np.float64) - expected)[mask]
        size = float(np.linalg.norm(expected[mask]))
        if size:
            errors[name] = float(np.linalg.norm(difference)) / size
    return errors


def check_numbers(
    model: LoadedModel, run: Callable[[Arrays], Arrays], *, dtype: DType, samples: Iterable[Arrays], what: str
) -> float:
    """Compare every output with the float64 truth, and return the largest relative error.

    Args:
        model: the model that was exported.
        run: runs the converted file on arrays by input name, and returns arrays by output name.
        dtype: type of the file's weights and activations.
        samples: the inputs.
        what: the runtime, for the message.

    Raises:
        ExportError: an error is above its tolerance, or a value is not finite.
    """
    truth = Float64TorchRunner(model, model.truth())
    baseline = TorchRunner(model, model.in_dtype(torch_dtype(dtype)))
    factor, floor = _BOUNDS[dtype]
    largest = 0.0
    for inputs in samples:
        exact = truth.run(inputs)
        own = _error(baseline.run(inputs), exact, model=model, inputs=inputs)
        for name, error in _error(run(inputs), exact, model=model, inputs=inputs).items():
            tolerance = factor * own[name] + floor
            if not error <= tolerance:  # also for NaN
                raise ExportError(
                    f"{what} computes {name} with a relative error of {error:.2e}, and PyTorch in {dtype} with "
                    f"{own[name]:.2e}; the tolerance is {tolerance:.2e}. The file was not written"
                )
            largest = max(largest, error)
    return largest
