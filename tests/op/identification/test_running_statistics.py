"""Identify norms with running statistics, as strangers wrote them: no code is shared with the package."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ibnorm_export.op.identification.norms import identify
from ibnorm_export.op.spec import Grouping


class RunningNorm2d(nn.Module):
    """As in torchvision's ResNet: channels on axis 1, with the buffer names of BatchNorm."""

    def __init__(self, num_features: int, *, g: str = "L", lam: float = 4.0, eps: float = 1e-5) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.weight, self.bias = nn.Parameter(torch.randn(num_features)), nn.Parameter(torch.randn(num_features))
        self.g, self.lam, self.eps = g, lam, eps
        self.register_buffer("running_mean", 3 * torch.randn(num_features))
        self.register_buffer("running_mean_c", 0.1 * torch.randn(num_features))
        self.register_buffer("running_var", torch.rand(num_features) + 0.1)
        self.register_buffer("num_batches_tracked", torch.tensor(5))

    def compress(self, d: Tensor) -> Tensor:
        if self.g == "T":
            return torch.tanh(d / self.lam)
        return d / self.lam if self.g == "S" else d.sign() * torch.log1p(d.abs() / self.lam)

    def forward(self, x: Tensor) -> Tensor:
        mean, mean_c, var, weight, bias = (
            t[:, None, None] for t in (self.running_mean, self.running_mean_c, self.running_var, self.weight, self.bias)
        )
        return weight * (self.compress(x - mean) - mean_c) * torch.rsqrt(var + self.eps) + bias


class OnePlus(RunningNorm2d):
    """Its weight is the scale less 1."""

    def forward(self, x: Tensor) -> Tensor:
        mean, mean_c, var = (t[:, None, None] for t in (self.running_mean, self.running_mean_c, self.running_var))
        c = (self.compress(x - mean) - mean_c) * torch.rsqrt(var + self.eps)
        return (1 + self.weight[:, None, None]) * c


class LearnedLambda(RunningNorm2d):
    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.lam = nn.Parameter(torch.tensor(2.5))  # type: ignore[assignment]  # a tensor in the place of a number


class DynamicTanh(nn.Module):
    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.alpha, self.weight = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.randn(num_features))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.alpha * x) * self.weight


def agrees(norm: nn.Module, x: Tensor) -> None:
    """The replacement gives the norm's own outputs in float64."""
    found = identify(norm, shape=x.shape)
    assert found, found.difference
    with torch.no_grad():
        expected, got = norm.double()(x.double()), found.replacement().double().eval()(x.double())
    assert float((got - expected).norm() / expected.norm()) < 1e-12


@pytest.mark.parametrize(("g", "epsilon"), [("S", 1e-5), ("L", 1e-3), ("T", 0.0)])
def test_a_norm_with_running_statistics(g: str, epsilon: float) -> None:
    norm = RunningNorm2d(6, g=g, eps=epsilon).eval()
    found = identify(norm, shape=(2, 6, 4, 3))
    assert found, found.difference
    assert found.spec is not None
    assert (found.kind, found.spec.grouping, found.channel_axis) == (g, Grouping.BATCH, 1)
    assert found.lambd == (1.0 if g == "S" else 4.0)
    assert found.epsilon == epsilon
    assert (found.weight, found.bias_parameter) == (norm.weight, norm.bias)
    assert found.parameters == {
        "weight": "scale",
        "bias": "bias",
        "running_mean": "running mean",
        "running_mean_c": "running mean" if g == "S" else "running mean of the compressed values",
        "running_var": "running variance",
        "num_batches_tracked": "has no effect",
    }
    agrees(norm, torch.randn(2, 6, 4, 3))


@pytest.mark.parametrize("kind", [OnePlus, LearnedLambda])
def test_derived_scales_and_a_learned_lambda(kind: type[RunningNorm2d]) -> None:
    agrees(kind(6).eval(), torch.randn(2, 6, 4, 3))


def test_a_scale_of_zero() -> None:
    """As torchvision's `zero_init_residual` sets it: the output does not depend on the input."""
    norm = RunningNorm2d(6).eval()
    nn.init.zeros_(norm.weight)
    found = identify(norm, shape=(2, 6, 4, 3))
    assert (found.kind, found.lambd, found.epsilon) == ("L", 4.0, 1e-5)
    assert found.weight is norm.weight
    replacement = found.replacement()
    nn.init.ones_(norm.weight)  # the parameter is shared, and its replacement follows it
    x = torch.randn(2, 6, 4, 3)
    torch.testing.assert_close(replacement(x), norm(x), rtol=1e-4, atol=1e-5)


def test_batch_norm_is_a_member() -> None:
    norm = nn.BatchNorm2d(6).eval()
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.2, 2.0)
    agrees(norm, torch.randn(2, 6, 4, 3))


def test_an_element_wise_function_without_statistics_is_not_a_member() -> None:
    found = identify(DynamicTanh(6), shape=(2, 5, 6))
    assert not found
    assert "no running statistics" in found.difference
