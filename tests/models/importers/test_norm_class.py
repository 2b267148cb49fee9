"""The reading of a norm from the training code's own class: identified, never guessed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ibnorm_export import import_checkpoint
from ibnorm_export.errors import CheckpointError
from tests.support.import_truth import difference
from tests.support.strangers import (
    GPT,
    BatchNormL,
    ChannelNorm,
    GammaNorm,
    ImageNorm,
    LogNorm,
    ResNet,
    save_nanogpt,
    save_torchvision,
    shake,
)

ARGS: dict[str, Any] = {
    "n_layer": 1,
    "n_head": 2,
    "n_embd": 16,
    "block_size": 24,
    "bias": True,
    "vocab_size": 65,
    "dropout": 0.0,
}
STRANGERS = "tests.support.strangers"


def ids() -> torch.Tensor:
    return torch.randint(0, 65, (2, 24), generator=torch.Generator().manual_seed(1))


def section(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["ibnorm"]
    return found


def test_a_class_with_an_argument(tmp_path: Path) -> None:
    model = shake(GPT(ARGS, lambda c: LogNorm(c.n_embd, 2.5)))
    source = save_nanogpt(tmp_path / "ckpt.pt", model, ARGS)
    report = import_checkpoint(source, tmp_path / "gpt", norm_class=f"{STRANGERS}:LogNorm", norm_args={"lam": 2.5})
    assert difference(model, tmp_path / "gpt", ids()) < 1e-10
    assert section(tmp_path / "gpt")["lambda"] == pytest.approx(0.4, rel=1e-9)
    assert section(tmp_path / "gpt")["epsilon"] == pytest.approx(6.25e-5, rel=1e-6)
    assert all(residual is not None and residual < 1e-11 for _, _, residual in report.norms)
    assert "LogNorm(ndim=features, lam=2.5 (--norm-args), eps=1e-05 (default), bias=True (weights))" in str(report)


def test_a_class_that_reads_the_configuration_and_counts_gamma_from_one(tmp_path: Path) -> None:
    args = ARGS | {"ibn_lambda": 3.0}
    model = shake(GPT(args, GammaNorm))
    source = save_nanogpt(tmp_path / "ckpt.pt", model, args)
    report = import_checkpoint(source, tmp_path / "gpt", norm_class=GammaNorm)
    # 1 + gamma is stored in float32: each of three norms is off by at most 2^-24
    assert difference(model, tmp_path / "gpt", ids()) < 1e-6
    assert section(tmp_path / "gpt")["compression"] == "T"
    assert section(tmp_path / "gpt")["lambda"] == pytest.approx(3.0, rel=1e-9)
    assert report.mapped["transformer.ln_f.weight"] == "derived from beta, gamma"


@pytest.mark.parametrize(("norm", "grouping"), [(ChannelNorm, "last"), (ImageNorm, "axes"), (BatchNormL, "batch")])
def test_classes_of_a_convolutional_network(tmp_path: Path, norm: Any, grouping: str) -> None:
    model = shake(ResNet((1, 1), norm, bottleneck=False))
    source = save_torchvision(tmp_path / "checkpoint.pth", model)
    import_checkpoint(source, tmp_path / "resnet", norm_class=norm)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    assert difference(model, tmp_path / "resnet", pixels) < 1e-10
    assert section(tmp_path / "resnet")["grouping"] == grouping


def test_norms_that_differ_by_layer(tmp_path: Path) -> None:
    model = shake(GPT(ARGS, lambda c: LogNorm(c.n_embd, 2.5)))
    model.transformer["ln_f"] = shake(nn.LayerNorm(16))
    source = save_nanogpt(tmp_path / "ckpt.pt", model, ARGS)
    rules = {"layers": [{"match": "*.ln_f", "norm": "layernorm", "epsilon": 1e-5}]}
    import_checkpoint(source, tmp_path / "gpt", norm_class=LogNorm, norm_args={"lam": 2.5}, norm=rules)
    assert difference(model, tmp_path / "gpt", ids()) < 1e-10


class OutsideEpsilon(LogNorm):
    """Epsilon is outside the root: no IBNorm."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        d = x - x.mean(-1, keepdim=True)
        c = d.sign() * torch.log1p(d.abs())
        c = c - c.mean(-1, keepdim=True)
        return c / (c.std(-1, keepdim=True, unbiased=False) + 1e-2) * self.weight + self.bias


class Broken(LogNorm):
    def __init__(self, ndim: int) -> None:
        raise RuntimeError("no such device")


class Other(nn.Module):
    def __init__(self, ndim: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(ndim))


@pytest.mark.parametrize(
    ("norm", "more", "message"),
    [
        (OutsideEpsilon, {}, "the norm at .*: OutsideEpsilon is not IBNorm: "),
        (Broken, {}, r"Broken\(ndim=16\) raised RuntimeError: no such device"),
        (Other, {}, r"keeps bias \(16,\), weight \(16,\), but Other has g \(16,\)"),
        (
            LogNorm,
            {"norm_args": {"lamda": 2.0}},
            "--norm-args has lamda, which LogNorm does not take; it takes ndim, lam",
        ),
        (LogNorm, {"norm": {"compression": "L"}}, 'with --norm-class, --norm may only have "layers"'),
    ],
)
def test_a_class_that_cannot_be_read(tmp_path: Path, norm: Any, more: dict[str, Any], message: str) -> None:
    source = save_nanogpt(tmp_path / "ckpt.pt", shake(GPT(ARGS, lambda c: LogNorm(c.n_embd))), ARGS)
    with pytest.raises(CheckpointError, match=message) as error:
        import_checkpoint(source, tmp_path / "gpt", norm_class=norm, **more)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "gpt").exists()


def test_a_default_is_not_taken_where_the_checkpoint_states_a_lambda(tmp_path: Path) -> None:
    args = ARGS | {"ibn_lambda": 3.0}
    source = save_nanogpt(tmp_path / "ckpt.pt", shake(GPT(args, lambda c: LogNorm(c.n_embd, c.ibn_lambda))), args)
    with pytest.raises(CheckpointError, match=r"states ibn_lambda = 3\.0, which no argument of LogNorm is called"):
        import_checkpoint(source, tmp_path / "gpt", norm_class=LogNorm)


def test_a_class_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stranger_model.py").write_text(f"from {STRANGERS} import LogNorm\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    source = save_nanogpt(tmp_path / "ckpt.pt", shake(GPT(ARGS, lambda c: LogNorm(c.n_embd))), ARGS)
    assert import_checkpoint(source, tmp_path / "gpt", norm_class="stranger_model:LogNorm")
    sys.modules.pop("stranger_model")
