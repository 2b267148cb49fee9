"""`ibnorm-export identify` as a user sees it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from tests.support.json_documents import read_document

SOURCE = '''
import torch
from torch import nn
from ibnorm_export import CustomModel, InputSpec


class SoftNorm(nn.Module):
    def __init__(self, features, lam=4.0):
        super().__init__()
        self.gamma, self.lam = nn.Parameter(torch.linspace(0.5, 1.5, features)), lam

    def forward(self, x):
        d = torch.tanh((x - x.mean(-1, keepdim=True)) / self.lam)
        d = d - d.mean(-1, keepdim=True)
        return self.gamma * d * torch.rsqrt(d.pow(2).mean(-1, keepdim=True) + 1e-5)


class Squash(SoftNorm):
    """Named like no norm; the epsilon is outside the root."""

    def forward(self, x):
        d = torch.tanh((x - x.mean(-1, keepdim=True)) / self.lam)
        d = d - d.mean(-1, keepdim=True)
        return self.gamma * d / (d.std(-1, keepdim=True, unbiased=False) + 1e-3)


ready = SoftNorm(8, 2.0)


def network():
    return nn.Sequential(nn.Linear(8, 8), SoftNorm(8), nn.Linear(8, 8), Squash(8), nn.LayerNorm(8))


def model():
    return CustomModel(network(), (InputSpec("x", ("batch", 8), True),))
'''


@pytest.fixture
def cli(cli: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[int, str, str]]:
    """`identify` in a folder with a module of norms."""
    (tmp_path / "stranger.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "stranger", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    return lambda *words: cli("identify", *words)


@pytest.mark.parametrize(
    ("words", "lambd"),
    [
        (["stranger:SoftNorm", "--args", '{"features": 8, "lam": 3.0}'], 3.0),
        (["stranger:SoftNorm", "--args", "[16]", "--shape", "2,16"], 4.0),
        (["stranger:ready"], 2.0),
    ],
)
def test_a_class_or_a_norm(cli: Any, words: list[str], lambd: float) -> None:
    code, out, err = cli(*words, "--json")
    found = read_document(out, "identify")
    assert (code, err) == (0, "")
    assert (found["kind"], found["lambda"], found["epsilon"]) == ("T", lambd, 1e-5)
    assert found["parameters"] == {"gamma": "scale"}
    assert found["config"]["convention"] == "divide"


def test_another_norm_is_named_and_fails(cli: Any) -> None:
    code, out, err = cli("stranger:Squash", "--args", "[8]")
    assert (code, err) == (1, "")
    assert out.startswith("Squash is not IBNorm: epsilon is added to the standard deviation, outside the root")


def test_every_norm_of_a_checkpoint(cli: Any, tmp_path: Path) -> None:
    import stranger  # type: ignore[import-not-found]  # written by the fixture

    net = stranger.model().module
    torch.save(net.state_dict(), tmp_path / "weights.pt")
    code, out, err = cli("weights.pt", "--model", "stranger:model")
    assert code == 0, err
    assert err.endswith("next: ibnorm-export export weights.pt -o weights.onnx --model stranger:model\n")
    lines = [line.split() for line in out.splitlines()]
    assert lines[1][:5] == ["1", "SoftNorm", "T", "4", "1e-05"]
    assert lines[2][:3] == ["4", "LayerNorm", "PyTorch's"]
    code, out, _ = cli("weights.pt", "--model", "stranger:model", "--norm-class", "stranger:Squash", "--json")
    found = read_document(out, "identify")
    assert code == 1
    assert found["norms"]["3"]["kind"] == "T, epsilon outside the root"
    assert set(found["norms"]) == {"1", "3"}
    numpy.savez(tmp_path / "example.npz", input=numpy.ones((2, 8), numpy.float32))
    code, out, err = cli("weights.pt", "--model", "stranger:network", "--inputs", "example.npz", "--json")
    assert (code, err) == (0, "")
    assert set(read_document(out, "identify")["norms"]) == {"1"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stranger"], "must be package.module:Class, or a checkpoint with --model"),
        (["nowhere:Norm"], "no module named 'nowhere'"),
        (["stranger:Nothing"], "has no attribute 'Nothing'"),
        (["stranger:SoftNorm"], "Its signature is SoftNorm(features, lam=4.0); give arguments with --args"),
        (["stranger:SOURCE"], "has no attribute"),
        (["stranger:SoftNorm", "--args", "8"], "--args is '8'; it must be a JSON list or object"),
        (["stranger:SoftNorm", "--args", "{"], "--args is not valid JSON"),
        (["stranger:ready", "--shape", "8"], "it must be two sizes or more"),
        (["stranger:ready", "--shape", "2,9"], "raised RuntimeError"),
        (["stranger:ready", "--norm-class", "A"], "are for a checkpoint with --model"),
        (["weights.pt", "--model", "stranger:network"], "give example inputs with --inputs FILE.npz"),
        (["missing.pt", "--model", "stranger:model"], "missing.pt does not exist"),
        (["missing.pt", "--model", "stranger:model", "--shape", "2,8"], "--args and --shape are for a class"),
    ],
)
def test_bad_input_ends_in_one_line(cli: Any, words: list[str], message: str, tmp_path: Path) -> None:
    import stranger

    torch.save(stranger.network().state_dict(), tmp_path / "weights.pt")
    code, out, err = cli(*words)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
