"""Norms of the user's own classes are replaced only by what computes the same, whatever an adapter states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ibnorm_export import CheckpointError, IBNormSpec
from ibnorm_export.models import registry
from ibnorm_export.models.own_norms import replace_own_norms
from ibnorm_export.models.registry import register_adapter
from ibnorm_export.op.norm_variants import AxesIBNorm, BatchIBNorm, ChannelIBNorm
from ibnorm_export.op.torch_op import IBNorm

LAMBDA, EPSILON, SIZE = 4.0, 1e-2, 16


class Norm(nn.Module):
    """As a stranger would write it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(1 + 0.1 * torch.randn(SIZE)), nn.Parameter(0.1 * torch.randn(SIZE))

    def squash(self, r: Tensor) -> Tensor:
        return torch.log1p(r / LAMBDA)

    def compressed(self, x: Tensor) -> Tensor:
        d = x - x.mean(-1, keepdim=True)
        c = d.sign() * self.squash(d.abs())
        return c - c.mean(-1, keepdim=True)

    def standardised(self, x: Tensor) -> Tensor:
        c = self.compressed(x)
        return c / torch.sqrt((c * c).mean(-1, keepdim=True) + EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        return self.standardised(x) * self.weight + self.bias


class UnitSlope(Norm):
    def squash(self, r: Tensor) -> Tensor:
        return LAMBDA * torch.log1p(r / LAMBDA)


class Multiply(Norm):
    def squash(self, r: Tensor) -> Tensor:
        return torch.log1p(LAMBDA * r) / LAMBDA


class Outer(Norm):
    def squash(self, r: Tensor) -> Tensor:
        return torch.log1p(r) / LAMBDA


class Unbiased(Norm):
    def standardised(self, x: Tensor) -> Tensor:
        c = self.compressed(x)
        return c / torch.sqrt(c.var(-1, keepdim=True, unbiased=True) + EPSILON)


class EpsilonOutside(Norm):
    def standardised(self, x: Tensor) -> Tensor:
        c = self.compressed(x)
        return c / (c.std(-1, keepdim=True, unbiased=False) + EPSILON)


class NoSecondMean(Norm):
    def standardised(self, x: Tensor) -> Tensor:
        d = x - x.mean(-1, keepdim=True)
        c = d.sign() * self.squash(d.abs())
        return c / torch.sqrt(c.var(-1, keepdim=True, unbiased=False) + EPSILON)


class NoFirstMean(Norm):
    def compressed(self, x: Tensor) -> Tensor:
        c = x.sign() * self.squash(x.abs())
        return c - c.mean(-1, keepdim=True)


class OnePlusWeight(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return self.standardised(x) * (1 + self.weight) + self.bias


class DividedNorm(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return (self.standardised(x) * self.weight + self.bias) / 2**0.5


class GammaNorm(Norm):
    """Its trained scale and bias have other names; at their first values, dropping them changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        del self.weight, self.bias
        self.gamma, self.beta = nn.Parameter(torch.ones(SIZE)), nn.Parameter(torch.zeros(SIZE))

    def forward(self, x: Tensor) -> Tensor:
        return self.standardised(x) * self.gamma + self.beta


class LearnedLambda(Norm):
    """Its lambda is a parameter, which the adapter reads."""

    def __init__(self) -> None:
        super().__init__()
        self.lam = nn.Parameter(torch.tensor(3.0))

    def squash(self, r: Tensor) -> Tensor:
        return torch.log1p(r / self.lam)


def reading(lambd: float = LAMBDA, epsilon: float = EPSILON, convention: str = "divide") -> IBNormSpec:
    return IBNormSpec.from_convention("L", lambd, epsilon=epsilon, convention=convention)


@pytest.fixture(autouse=True)
def _no_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_ADAPTERS", {})
    torch.manual_seed(0)


def replaced(norm: nn.Module, *shape: int) -> tuple[nn.Module, tuple[str, ...]]:
    """What takes the place of a norm in a model, and the notes."""
    model = nn.Sequential(norm).eval().requires_grad_(False)
    x = torch.randn(shape or (3, SIZE))
    notes = replace_own_norms(model, run=lambda: model(x.double()))
    return model[0], notes


def named_like_a_norm(norm: type[nn.Module]) -> type[nn.Module]:
    return type(f"{norm.__name__}Norm", (norm,), {})


@pytest.mark.parametrize("norm", [Norm, UnitSlope, Multiply, Outer, Unbiased, OnePlusWeight, DividedNorm, GammaNorm])
def test_members_need_no_adapter(norm: type[nn.Module]) -> None:
    own = named_like_a_norm(norm)()
    new, notes = replaced(own)
    assert type(new) is IBNorm
    assert notes == ()
    x = torch.randn(5, SIZE, dtype=torch.float64)
    torch.testing.assert_close(new.double()(x), own.double()(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", [EpsilonOutside, NoSecondMean, NoFirstMean])
def test_other_norms_stay_with_a_note(norm: type[nn.Module]) -> None:
    own = norm()
    register_adapter(Norm, lambda _: reading())
    with pytest.raises(CheckpointError, match="No member of the family fits"):
        replaced(own)
    registry._ADAPTERS.clear()
    new, (note,) = replaced(named_like_a_norm(norm)())
    assert not isinstance(new, IBNorm)
    assert note.startswith("0 (")
    assert "exported as its own operators, no fused kernel" in note


@pytest.mark.parametrize(
    ("norm", "spec", "words"),
    [
        (Norm, reading(lambd=2.0), "IBNormSpec('L', 4, epsilon=0.01)"),
        (Norm, reading(epsilon=EPSILON * 100), "IBNormSpec('L', 4, epsilon=0.01)"),
        (Norm, reading(convention="unit_slope"), "IBNormSpec('L', 4, epsilon=0.01)"),
        (Norm, reading(convention="multiply"), "IBNormSpec('L', 4, epsilon=0.01)"),
        (Norm, reading(convention="outer"), "IBNormSpec('L', 4, epsilon=0.01)"),
        (UnitSlope, reading(), "IBNormSpec('L', 4, epsilon=0.000625)"),
        (Multiply, reading(), "IBNormSpec('L', 0.25, epsilon=0.16)"),
        (Outer, reading(), "IBNormSpec('L', 1, epsilon=0.16)"),
        (Unbiased, reading(), "This fits"),
        (OnePlusWeight, reading(), "differs from the class"),
        (DividedNorm, reading(), "differs from the class"),
        (GammaNorm, reading(), "drops 'gamma'"),
        (EpsilonOutside, reading(), "outside the root"),
        (NoSecondMean, reading(), "mean of the compressed values is not subtracted"),
        (NoFirstMean, reading(), "mean of x is not subtracted"),
    ],
)
def test_a_wrong_adapter_is_an_error_that_states_what_fits(norm: type[nn.Module], spec: IBNormSpec, words: str) -> None:
    register_adapter(norm, lambda _: spec)
    with pytest.raises(CheckpointError) as caught:
        replaced(norm())
    message = str(caught.value)
    assert message.startswith(f"0 ({norm.__name__}): the adapter")
    assert words in message
    assert len(message.splitlines()) == 1


def test_an_adapter_holds_for_subclasses_and_is_checked_against_them() -> None:
    register_adapter(Norm, lambda _: reading())
    same = type("Renamed", (Norm,), {})
    assert type(replaced(same())[0]) is IBNorm
    with pytest.raises(CheckpointError, match="UnitSlope"):
        replaced(UnitSlope())
    register_adapter(UnitSlope, lambda _: reading(convention="unit_slope"))
    assert type(replaced(UnitSlope())[0]) is IBNorm, "the nearest class decides"


def test_a_parameter_that_the_adapter_reads_is_not_dropped() -> None:
    register_adapter(LearnedLambda, lambda m: reading(lambd=float(m.lam)))
    assert replaced(LearnedLambda())[0].spec.lambd == pytest.approx(3.0)
    register_adapter(LearnedLambda, lambda _: reading(lambd=3.0))
    with pytest.raises(CheckpointError, match="drops 'lam'"):
        replaced(LearnedLambda())


class ChannelNorm(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class AxesNorm(Norm):
    def forward(self, x: Tensor) -> Tensor:
        y = self.standardised(x.flatten(1)).reshape(x.shape)
        return y * self.weight[:, None, None] + self.bias[:, None, None]


class RunningNorm(Norm):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.randn(SIZE))
        self.register_buffer("compressed_mean", 0.1 * torch.randn(SIZE))
        self.register_buffer("compressed_var", 0.5 + torch.rand(SIZE))
        self.register_buffer("num_batches_tracked", torch.tensor(7))

    def forward(self, x: Tensor) -> Tensor:
        def channels(t: Any) -> Tensor:
            return t[:, None, None]

        d = x - channels(self.running_mean)
        c = d.sign() * self.squash(d.abs())
        y = (c - channels(self.compressed_mean)) / torch.sqrt(channels(self.compressed_var) + EPSILON)
        return y * channels(self.weight) + channels(self.bias)


def grouped(grouping: str, axis: int = -1) -> IBNormSpec:
    return IBNormSpec("L", LAMBDA, epsilon=EPSILON, grouping=grouping, axis=axis)


@pytest.mark.parametrize(
    ("norm", "spec", "kind"),
    [
        (ChannelNorm, grouped("last"), ChannelIBNorm),
        (AxesNorm, grouped("axes", 1), AxesIBNorm),
        (RunningNorm, grouped("batch"), BatchIBNorm),
    ],
)
def test_an_adapter_may_return_every_grouping(norm: type[nn.Module], spec: IBNormSpec, kind: type) -> None:
    register_adapter(norm, lambda _: spec)
    own = norm()
    new, _ = replaced(own, 2, SIZE, 3, 5)
    assert type(new) is kind
    assert new.weight is own.weight
    x = torch.randn(2, SIZE, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(new.double()(x), own.double()(x), rtol=0, atol=1e-12)
    register_adapter(norm, lambda _: reading(lambd=3.0))
    with pytest.raises(CheckpointError, match="the adapter reads it as"):
        replaced(norm(), 2, SIZE, 3, 5)


def test_an_adapter_may_return_the_module() -> None:
    def convert(norm: Any) -> nn.Module:
        new = IBNorm(SIZE, reading())
        new.weight, new.bias = norm.gamma, norm.beta
        return new

    register_adapter(GammaNorm, convert)
    own = GammaNorm()
    new, _ = replaced(own)
    assert new.weight is own.gamma


def broken(_: nn.Module) -> IBNormSpec:
    raise ZeroDivisionError("my own mistake")


@pytest.mark.parametrize(
    ("adapter", "words"),
    [(broken, "my own mistake"), (lambda _: None, "NoneType"), (lambda _: grouped("batch"), "running_mean")],
)
def test_a_broken_adapter_is_one_clear_line(adapter: Callable[[nn.Module], Any], words: str) -> None:
    register_adapter(Norm, adapter)
    with pytest.raises(CheckpointError, match=words):
        replaced(Norm())
