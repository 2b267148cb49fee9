"""Inputs that expose wrong arithmetic: what a normal draw of moderate size leaves hidden.

A naive ln(1 + r) is right at a standard deviation of 1 and wrong at 1e-4; E[x^2] - mean^2 is right at a
mean of 0; a lost epsilon shows only where a row is constant.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.tensors import Arrays, InputSpec

__all__ = ["STRESS_DISTRIBUTIONS", "draw_stress_inputs"]

_Regime = Callable[[np.random.Generator, tuple[int, ...]], NDArray[np.float32]]


def _heavy_tails(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Student's t with 3 degrees of freedom: its kurtosis is infinite."""
    return rng.standard_t(3.0, shape).astype(np.float32)


def _large_means(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """A mean of 10 standard deviations."""
    return rng.standard_normal(shape, dtype=np.float32) + np.float32(10.0)


def _constant_rows(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Every value of a sample's first half is the same."""
    values = rng.standard_normal(shape, dtype=np.float32)
    values.reshape(shape[0], -1)[:, : values[0].size // 2] = 0.5
    return values


def _near_zero(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """A standard deviation of 1e-4."""
    return rng.standard_normal(shape, dtype=np.float32) * np.float32(1e-4)


#: What floating inputs are drawn from, by name.
STRESS_DISTRIBUTIONS: Final[dict[str, _Regime]] = {
    "heavy tails": _heavy_tails,
    "large means": _large_means,
    "constant rows": _constant_rows,
    "near-zero rows": _near_zero,
}


def _filled(arrays: Arrays, inputs: tuple[InputSpec, ...], *, regime: _Regime, rng: np.random.Generator) -> Arrays:
    floating = {spec.name for spec in inputs if spec.floating}
    return {name: regime(rng, a.shape) if name in floating and a.size else a for name, a in arrays.items()}


def _one_long_sample(model: LoadedModel, rng: np.random.Generator) -> Arrays:
    """Batch 1 and the longest sequence that the model takes, of one token over and over, then of others."""
    first: Any = model.sample(rng, 0)
    ids = first["input_ids"]
    longest = model.max_positions
    row = np.full((1, longest), ids.flat[0], dtype=np.int64)
    row[:, longest // 2 :] = rng.integers(0, int(ids.max()) + 1, (1, longest - longest // 2))
    return {"input_ids": row, "attention_mask": np.ones_like(row)}


def draw_stress_inputs(model: LoadedModel, rng: np.random.Generator) -> dict[str, Arrays]:
    """Inputs by the name of what they expose.

    A model with floating inputs (images, a cache) gets each of `STRESS_DISTRIBUTIONS` in them, batch 1 among them; a
    language model without a cache gets the longest sequence, half of it one token.

    Args:
        model: says what its inputs are.
        rng: to draw with.
    """
    if any(spec.floating for spec in model.inputs):
        return {
            name: _filled(model.sample(rng, index), model.inputs, regime=regime, rng=rng)
            for index, (name, regime) in enumerate(STRESS_DISTRIBUTIONS.items())
        }
    names = {spec.name for spec in model.inputs}
    if model.max_positions and names == {"input_ids", "attention_mask"}:
        return {"maximum length": _one_long_sample(model, rng)}
    return {}
