"""Checkpoints of timm's train.py: import, and the logits of the stranger's own model in float64."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ibnorm_export import import_checkpoint
from ibnorm_export.errors import CheckpointError
from tests.support.import_truth import difference
from tests.support.strangers import LogNorm, shake

timm = pytest.importorskip("timm", reason="timm is not installed (make test-families installs it)")

VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
NORM = {"compression": "L", "lambda": 4.0, "epsilon": 1e-5, "convention": "multiply"}


def vit(seed: int = 0) -> nn.Module:
    model = timm.create_model(
        "vit_tiny_patch16_224", num_classes=10, norm_layer=lambda width, **_: LogNorm(width), **VIT
    )
    return shake(model, seed)


def saved(path: Path, model: nn.Module, ema: nn.Module | None = None, **arguments: Any) -> Path:
    """What CheckpointSaver of timm saves."""
    defaults: dict[str, Any] = {
        "model": "vit_tiny_patch16_224",
        "num_classes": 10,
        "img_size": 32,
        "input_size": None,
        "in_chans": None,
        "gp": None,
        "model_kwargs": VIT,
        "opt": "lamb",
        "opt_eps": 1e-6,
    }
    checkpoint: dict[str, Any] = {
        "epoch": 3,
        "arch": "vit_tiny_patch16_224",
        "state_dict": model.state_dict(),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1).state_dict(),
        "version": 2,
        "args": argparse.Namespace(**(defaults | arguments)),
        "metric": 71.5,
    }
    if ema is not None:
        checkpoint["state_dict_ema"] = ema.state_dict()
    torch.save(checkpoint, path)
    return path


def pixels() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_the_logits_are_those_of_the_training_code(tmp_path: Path) -> None:
    model = vit()
    report = import_checkpoint(saved(tmp_path / "last.pth.tar", model), tmp_path / "vit", norm=NORM)
    assert report.kind == "timm"
    assert difference(model, tmp_path / "vit", pixels()) < 1e-10


def test_the_norm_class_and_ema_weights(tmp_path: Path) -> None:
    raw, ema = vit(0), vit(1)
    source = saved(tmp_path / "last.pth.tar", raw, ema)
    with pytest.raises(CheckpointError, match=r"raw.*ema"):
        import_checkpoint(source, tmp_path / "vit", norm_class=LogNorm)
    import_checkpoint(source, tmp_path / "vit", norm_class=LogNorm, weights="ema")
    assert difference(ema, tmp_path / "vit", pixels()) < 1e-10
    assert difference(raw, tmp_path / "vit", pixels()) > 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model_kwargs": VIT | {"depth": 3}}, r"a norm at blocks\.2\.norm1, but the weights have no tensor"),
        ({"model_kwargs": VIT | {"embed_dim": 16}}, "of the wrong shape"),
        ({"model_kwargs": VIT | {"depht": 2}}, "timm cannot build vit_tiny_patch16_224"),
    ],
)
def test_arguments_that_do_not_fit(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    source = saved(tmp_path / "last.pth.tar", vit(), **arguments)
    with pytest.raises(CheckpointError, match=message):
        import_checkpoint(source, tmp_path / "vit", norm=NORM)
    assert not (tmp_path / "vit").exists()


def test_an_architecture_that_timm_does_not_have(tmp_path: Path) -> None:
    source = saved(tmp_path / "last.pth.tar", vit())
    checkpoint = torch.load(source, weights_only=False)  # the test's own file
    checkpoint["arch"] = "my_vit"
    torch.save(checkpoint, source)
    with pytest.raises(CheckpointError, match="has no architecture 'my_vit'"):
        import_checkpoint(source, tmp_path / "vit", norm=NORM)
