"""Stress inputs: they reveal arithmetic errors that ordinary random inputs hide.

A naive ln(1 + r) is accurate at a standard deviation of 1 and wrong at 1e-4. E[x^2] - mean^2 is accurate at a mean of
0. A missing epsilon only shows in a constant row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ibnorm_export.artifacts.covering_inputs import LONGEST
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.tensors import Arrays, InputSpec

__all__ = ["STRESS_DISTRIBUTIONS", "draw_stress_inputs"]

_Distribution = Callable[[np.random.Generator, tuple[int, ...]], NDArray[np.float32]]


def _heavy_tails(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Student's t with 3 degrees of freedom, whose kurtosis is infinite."""
    return rng.standard_t(3.0, shape).astype(np.float32)


def _large_means(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """A mean of 10 standard deviations."""
    return rng.standard_normal(shape, dtype=np.float32) + np.float32(10.0)


def _constant_rows(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """All values in the first half of a sample are equal."""
    values = rng.standard_normal(shape, dtype=np.float32)
    values.reshape(shape[0], -1)[:, : values[0].size // 2] = 0.5
    return values


def _near_zero(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """A standard deviation of 1e-4."""
    return rng.standard_normal(shape, dtype=np.float32) * np.float32(1e-4)


#: Distributions of floating-point inputs, by name.
STRESS_DISTRIBUTIONS: Final[dict[str, _Distribution]] = {
    "heavy tails": _heavy_tails,
    "large means": _large_means,
    "constant rows": _constant_rows,
    "near-zero rows": _near_zero,
}


def _filled(
    arrays: Arrays, inputs: tuple[InputSpec, ...], *, distribution: _Distribution, rng: np.random.Generator
) -> Arrays:
    floating = {spec.name for spec in inputs if spec.floating}
    return {name: distribution(rng, a.shape) if name in floating and a.size else a for name, a in arrays.items()}


def _one_long_sample(model: LoadedModel, rng: np.random.Generator) -> Arrays:
    """One row of the longest sequence that the model takes; the first half repeats one token."""
    first: Any = model.sample(rng, 0)
    ids = first["input_ids"]
    longest = min(model.max_positions, LONGEST)
    row = np.full((1, longest), ids.flat[0], dtype=np.int64)
    row[:, longest // 2 :] = rng.integers(0, int(ids.max()) + 1, (1, longest - longest // 2))
    return {"input_ids": row, "attention_mask": np.ones_like(row)}


def draw_stress_inputs(model: LoadedModel, rng: np.random.Generator) -> dict[str, Arrays]:
    """Draw stress inputs for a model.

    A model with floating-point inputs (images, a cache) gets one sample from each of `STRESS_DISTRIBUTIONS`; one of
    them has batch size 1. A language model without a cache gets the longest sequence, half of which repeats one token.

    Args:
        model: the model, for its inputs.
        rng: the generator.

    Returns:
        Samples by the name of their distribution; empty for a model with other inputs.
    """
    if any(spec.floating for spec in model.inputs):
        return {
            name: _filled(model.sample(rng, index), model.inputs, distribution=distribution, rng=rng)
            for index, (name, distribution) in enumerate(STRESS_DISTRIBUTIONS.items())
        }
    names = {spec.name for spec in model.inputs}
    if model.max_positions and names == {"input_ids", "attention_mask"}:
        return {"maximum length": _one_long_sample(model, rng)}
    return {}
