"""Preprocessing and accuracy against timm's and torchvision's own validation, and transformers' own processors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ibnorm_export import EvaluationOptions, evaluate
from ibnorm_export.evaluation.preprocessing import find_preprocessing

timm = pytest.importorskip("timm", reason="timm is not installed (make test-families installs it)")
pytest.importorskip("torchvision", reason="torchvision is not installed (make test-families installs it)")
from tests.support.validation_loop import make_validation, picture, validation_loop  # noqa: E402 - needs both

SIZES = [(375, 500), (500, 333), (31, 47), (224, 224), (257, 255)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "settings",
    [
        {"input_size": [3, 224, 224], "crop_pct": 0.875, "interpolation": "bicubic"},
        {"input_size": [3, 32, 32], "crop_pct": 0.9, "interpolation": "bilinear", "mean": [0.5] * 3, "std": [0.5] * 3},
        {"input_size": [3, 33, 33], "crop_pct": 1.0, "interpolation": "bicubic", "crop_mode": "squash"},
        {"input_size": [3, 48, 32], "crop_pct": 0.8, "interpolation": "bicubic", "crop_mode": "squash"},
    ],
)
def test_timms_transform(tmp_path: Path, settings: dict[str, Any], size: tuple[int, int]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "x", "pretrained_cfg": settings}))
    found = find_preprocessing(tmp_path)
    assert found is not None
    config = timm.data.resolve_data_config(pretrained_cfg=settings)
    expected = timm.data.create_transform(**config, is_training=False)(picture(*size)).numpy()
    assert np.array_equal(found.apply(picture(*size), 3), expected)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("module", "name", "settings"),
    [
        ("vit", "ViTImageProcessor", {"size": {"height": 32, "width": 48}, "resample": 2}),
        ("convnext", "ConvNextImageProcessor", {"size": {"shortest_edge": 64}, "crop_pct": 0.875, "resample": 3}),
        ("convnext", "ConvNextImageProcessor", {"size": {"shortest_edge": 384}, "crop_pct": 0.875, "resample": 3}),
        (
            "clip",
            "CLIPImageProcessor",
            {
                "size": {"shortest_edge": 64},
                "crop_size": {"height": 57, "width": 57},
                "do_center_crop": True,
                "resample": 3,
                "image_mean": [0.48, 0.46, 0.41],
                "image_std": [0.27, 0.26, 0.28],
            },
        ),
    ],
)
def test_transformers_processors(
    tmp_path: Path, module: str, name: str, settings: dict[str, Any], size: tuple[int, int]
) -> None:
    import importlib

    kind = getattr(importlib.import_module(f"transformers.models.{module}.image_processing_pil_{module}"), f"{name}Pil")
    processor = kind(**settings)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({**json.loads(processor.to_json_string()), "image_processor_type": name})
    )
    found = find_preprocessing(tmp_path)
    assert found is not None
    expected = processor(picture(*size), return_tensors="np")["pixel_values"][0]
    # the order of scaling and rounding differs: values of at most 4, rounded to float32 three times
    np.testing.assert_allclose(found.apply(picture(*size), 3), expected, rtol=0, atol=2e-6)


def test_the_same_answers_as_the_validation_loop_of_timm(tmp_path: Path) -> None:
    """Every prediction, top-1 and top-5, of torchvision's ImageFolder, timm's transform and PyTorch."""
    make_validation(tmp_path)
    predictions, top1, top5 = validation_loop(tmp_path)
    options = EvaluationOptions(results=tmp_path / "results")
    report = evaluate(tmp_path / "model", task="classification", data=tmp_path / "val", options=options)
    journal = next((tmp_path / "results").glob("*.jsonl")).read_text(encoding="utf-8").splitlines()[1:]
    assert [int(json.loads(line)[2][1]) for line in journal] == predictions
    assert report.candidates[0].metrics[0].value == pytest.approx(top1 / 72)
    assert report.candidates[0].metrics[1].value == pytest.approx(top5 / 72)
