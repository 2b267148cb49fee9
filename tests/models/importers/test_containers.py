"""Containers around one architecture: Lightning's .ckpt, torch.distributed.checkpoint, DDP, EMA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ibnorm_export import import_checkpoint
from ibnorm_export.errors import CheckpointError
from tests.models.importers.test_nanogpt import ARGS, NORM, gpt
from tests.support.import_truth import difference
from tests.support.strangers import (
    GPT,
    ChannelNorm,
    LogNorm,
    ResNet,
    save_distributed,
    save_torchvision,
    shake,
)

CHANNELS = {"compression": "L", "lambda": 3.0, "epsilon": 1e-5, "convention": "divide"}


def ids() -> torch.Tensor:
    return torch.randint(0, 65, (2, 24), generator=torch.Generator().manual_seed(1))


def lightning(path: Path, model: torch.nn.Module, hyper_parameters: dict[str, Any], prefix: str = "model.") -> Path:
    """What Lightning's Trainer saves."""
    checkpoint = {
        "epoch": 1,
        "global_step": 20,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": {prefix + name: tensor for name, tensor in model.state_dict().items()},
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {},
        "optimizer_states": [],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": hyper_parameters,
    }
    torch.save(checkpoint, path)
    return path


@pytest.mark.parametrize("kind", ["lightning", "auto"])
@pytest.mark.parametrize("prefix", ["model.", "net._orig_mod."])
def test_lightning(tmp_path: Path, kind: str, prefix: str) -> None:
    model = gpt()
    source = lightning(tmp_path / "last.ckpt", model, {"lr": 1e-3, "config": ARGS}, prefix)
    report = import_checkpoint(source, tmp_path / "gpt", kind=kind, norm=NORM)
    assert report.kind == "nanogpt"
    assert difference(model, tmp_path / "gpt", ids()) < 1e-10
    assert any("removed" in note for note in report.notes)


def test_lightning_without_the_number_of_heads(tmp_path: Path) -> None:
    source = lightning(tmp_path / "last.ckpt", gpt(), {"lr": 1e-3})
    with pytest.raises(CheckpointError, match=r"--settings '\{\"n_head\": VALUE\}'"):
        import_checkpoint(source, tmp_path / "gpt", norm=NORM)
    import_checkpoint(source, tmp_path / "gpt", norm=NORM, settings={"n_head": 2})
    assert difference(gpt(), tmp_path / "gpt", ids()) < 1e-10


@pytest.mark.parametrize("kind", ["dcp", "auto"])
def test_a_distributed_checkpoint(tmp_path: Path, kind: str) -> None:
    model = gpt()
    save_distributed(tmp_path / "step-10", model)
    report = import_checkpoint(tmp_path / "step-10", tmp_path / "gpt", kind=kind, norm=NORM, settings={"n_head": 2})
    assert report.kind == "nanogpt"
    assert difference(model, tmp_path / "gpt", ids()) < 1e-10


def test_raw_and_ema_weights(tmp_path: Path) -> None:
    raw, ema = (shake(ResNet((1, 1), ChannelNorm, False), seed) for seed in (0, 1))
    source = save_torchvision(tmp_path / "checkpoint.pth", raw, ema, distributed=True)
    with pytest.raises(CheckpointError, match=r"raw.*ema"):
        import_checkpoint(source, tmp_path / "resnet", norm=CHANNELS)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    for name, model, other in (("raw", raw, ema), ("ema", ema, raw)):
        import_checkpoint(source, tmp_path / "resnet", norm=CHANNELS, weights=name)
        assert difference(model, tmp_path / "resnet", pixels) < 1e-10
        assert difference(other, tmp_path / "resnet", pixels) > 1e-3


def test_weights_in_half_precision_and_in_two_types(tmp_path: Path) -> None:
    model = gpt()
    model.transformer["wpe"].half()
    torch.save({"model": model.state_dict(), "model_args": ARGS}, tmp_path / "ckpt.pt")
    report = import_checkpoint(tmp_path / "ckpt.pt", tmp_path / "gpt", norm=NORM)
    assert any(note == "weights of float16 and float32: all are stored as float32" for note in report.notes)
    assert difference(model, tmp_path / "gpt", ids()) < 1e-10


def test_a_model_that_nobody_knows(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), LogNorm(8))
    source = lightning(tmp_path / "last.ckpt", model, {})
    with pytest.raises(CheckpointError, match=r"those of no known architecture .*--model package\.module:factory"):
        import_checkpoint(source, tmp_path / "gpt", kind="lightning", norm=NORM)


def test_the_model_is_the_one_that_was_saved() -> None:
    """The tests above compare with `gpt()`, which must be the same each time."""
    first, second = gpt().state_dict(), gpt().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert isinstance(gpt(), GPT)
