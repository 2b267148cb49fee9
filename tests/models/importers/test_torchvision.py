"""Checkpoints of torchvision's reference training: import, and the logits of the stranger's own model in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ibnorm_export import import_checkpoint
from tests.support.import_truth import difference
from tests.support.strangers import BatchNormL, ChannelNorm, ImageNorm, ResNet, save_torchvision, shake

NORMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "channels": (ChannelNorm, {"compression": "L", "lambda": 3.0, "epsilon": 1e-5, "convention": "divide"}),
    "image": (
        ImageNorm,
        {"compression": "T", "lambda": 2.0, "epsilon": 1e-5, "convention": "divide", "grouping": "axes", "axis": 1},
    ),
    "batch": (
        BatchNormL,
        {"compression": "L", "lambda": 4.0, "epsilon": 1e-5, "convention": "divide", "grouping": "batch"},
    ),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("depths", "bottleneck"), [((2, 1), False), ((1, 2), True)])
def test_the_logits_are_those_of_the_training_code(
    tmp_path: Path, norm: str, depths: tuple[int, ...], bottleneck: bool
) -> None:
    norm_class, section = NORMS[norm]
    model = shake(ResNet(depths, norm_class, bottleneck))
    source = save_torchvision(tmp_path / "checkpoint.pth", model)
    report = import_checkpoint(source, tmp_path / "resnet", norm=section)
    assert report.kind == "torchvision"
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    assert difference(model, tmp_path / "resnet", pixels) < 1e-10
