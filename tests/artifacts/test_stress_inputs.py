"""Stress inputs: each has the property that it is named for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from scipy.stats import kurtosis

from ibnorm_export import models
from ibnorm_export.artifacts.stress_inputs import STRESS_DISTRIBUTIONS, draw_stress_inputs


def test_each_has_the_property_that_it_is_named_for(vit_checkpoint: Path, llama_checkpoint: Path) -> None:
    found = draw_stress_inputs(models.load(vit_checkpoint), np.random.default_rng(0))
    assert set(found) == set(STRESS_DISTRIBUTIONS)
    pixels = {name: arrays["pixel_values"] for name, arrays in found.items()}
    assert kurtosis(STRESS_DISTRIBUTIONS["heavy tails"](np.random.default_rng(0), (4, 10_000)), axis=None) > 3
    assert abs(pixels["large means"].mean() / pixels["large means"].std() - 10) < 2
    assert all(np.ptp(image.ravel()[: image.size // 2]) == 0 for image in pixels["constant rows"])
    assert pixels["near-zero rows"].std() < 2e-4
    assert 1 in {len(array) for array in pixels.values()}
    (longest,) = draw_stress_inputs(models.load(llama_checkpoint), np.random.default_rng(0)).values()
    assert longest["input_ids"].shape == longest["attention_mask"].shape == (1, 64)
    assert np.ptp(longest["input_ids"][0, :32]) == 0
