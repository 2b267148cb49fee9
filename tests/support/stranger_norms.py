"""Norms as strangers write them, for `identify`. None of them imports the package or shares code with it.

`Written` is the paper's norm in each of the four conventions. `MEMBERS` are members of the family in another form, with
the lambda and epsilon that they really have. `OTHERS` are not members, with words that must name them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def log_compress(t: Tensor) -> Tensor:
    return torch.sign(t) * torch.log1p(t.abs())


G: dict[str, Callable[[Tensor], Tensor]] = {"S": lambda t: t, "L": log_compress, "T": torch.tanh}

#: f(r) for r = |x - mu|, by convention; the sign comes afterwards.
F_OF_R: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor, float], Tensor]] = {
    "divide": lambda g, r, lam: g(r / lam),
    "unit_slope": lambda g, r, lam: lam * g(r / lam),
    "multiply": lambda g, r, lam: g(lam * r) / lam,
    "outer": lambda g, r, lam: g(r) / lam,
}


class Written(nn.Module):
    """Section 4.2 of the paper: s(x) = mu + sign(x - mu) f(|x - mu|), standardised, then the affine map."""

    def __init__(self, dim: int, *, g: str, lam: float, eps: float, convention: str = "divide") -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(dim)), nn.Parameter(torch.randn(dim))
        self.g, self.lam, self.eps, self.convention = g, lam, eps, convention

    def forward(self, x: Tensor) -> Tensor:
        mu = x.mean(-1, keepdim=True)
        d = x - mu
        s = torch.sign(d) * F_OF_R[self.convention](G[self.g], d.abs(), self.lam)
        s = s - s.mean(-1, keepdim=True)
        return self.w * s / torch.sqrt((s * s).mean(-1, keepdim=True) + self.eps) + self.b


def canonical(g: str, lam: float, eps: float, convention: str) -> tuple[float, float]:
    """Lambda and epsilon of the same norm in the convention `divide`; lambda 1 for S."""
    lam, eps = {
        "divide": (lam, eps),
        "unit_slope": (lam, eps / lam**2),
        "multiply": (1 / lam, eps * lam**2),
        "outer": (1.0, eps * lam**2),
    }[convention]
    return (1.0, eps * lam**2) if g == "S" else (lam, eps)


class Base(nn.Module):
    """What most of these classes have."""

    def __init__(self, dim: int = 16, lam: float = 4.0, eps: float = 1e-3) -> None:
        super().__init__()
        torch.manual_seed(dim)
        self.weight, self.bias = nn.Parameter(torch.randn(dim)), nn.Parameter(torch.randn(dim))
        self.lam, self.eps = lam, eps

    def compressed(self, x: Tensor) -> Tensor:
        return log_compress((x - x.mean(-1, keepdim=True)) / self.lam)

    def affine(self, z: Tensor) -> Tensor:
        return z * self.weight + self.bias


# Members.


class LlamaLike(nn.Module):
    """transformers' style: float32 inside, no bias, back to the input's dtype."""

    def __init__(self, hidden_size: int = 16, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        hidden_states = hidden_states - hidden_states.mean(-1, keepdim=True)
        hidden_states = torch.tanh(hidden_states / 2.0)
        hidden_states = hidden_states - hidden_states.mean(-1, keepdim=True)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden_states * torch.rsqrt(variance + self.variance_epsilon)).to(input_dtype)


class GemmaLike(Base):
    """1 + weight, and an unbiased variance."""

    def forward(self, x: Tensor) -> Tensor:
        c = self.compressed(x)
        c = (c - c.mean(-1, keepdim=True)) / torch.sqrt(torch.var(c, dim=-1, keepdim=True) + self.eps)
        return c * (1.0 + self.weight)


class HalfPower(Base):
    """An output divided by sqrt(2)."""

    def forward(self, x: Tensor) -> Tensor:
        c = self.compressed(x)
        c = (c - c.mean(-1, keepdim=True)) / torch.sqrt(c.var(-1, keepdim=True, unbiased=False) + self.eps)
        return self.affine(c) / math.sqrt(2)


class AroundLayerNorm(nn.Module):
    """Compresses, and leaves the rest to nn.LayerNorm."""

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.inner = nn.LayerNorm(dim, eps=1e-5)
        nn.init.normal_(self.inner.weight)

    def forward(self, x: Tensor) -> Tensor:
        d = x - x.mean(-1, keepdim=True)
        result: Tensor = self.inner(torch.where(d > 0, torch.log1p(d.abs() / 8), -torch.log1p(d.abs() / 8)))
        return result


class LearnedLambda(Base):
    def __init__(self) -> None:
        super().__init__()
        self.log_lam = nn.Parameter(torch.tensor(0.75))

    def forward(self, x: Tensor) -> Tensor:
        c = torch.tanh((x - x.mean(-1, keepdim=True)) * torch.exp(-self.log_lam))
        return self.affine(F.layer_norm(c, c.shape[-1:], eps=self.eps))


class TimmLike2d(Base):
    """As timm's LayerNorm2d: channels on axis 1, moved to the end and back."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = self.compressed(x)
        x = F.layer_norm(x, (x.shape[-1],), self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class Over3Axes(nn.Module):
    """As GroupNorm with one group, parameters of shape (1, C, 1, 1)."""

    axes: tuple[int, ...] = (1, 2, 3)

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.scale, self.shift = (nn.Parameter(torch.randn(1, channels, 1, 1)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        c = torch.asinh(torch.sinh(torch.tanh((x - x.mean(self.axes, keepdim=True)) / 4)))
        c = c - c.mean(self.axes, keepdim=True)
        return self.scale * c / (c.pow(2).mean(self.axes, keepdim=True) + 1e-4) ** 0.5 + self.shift


class PerImage(Over3Axes):
    """As InstanceNorm: statistics of each channel."""

    axes = (2, 3)


class ElementNorm(nn.Module):
    """As nn.LayerNorm((C, H, W)): a scale, counted from 1, and a bias for each element of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma, self.beta = (nn.Parameter(torch.randn(6, 5, 4)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        c = log_compress((x - x.mean((1, 2, 3), keepdim=True)) / 3)
        return F.layer_norm(c, (6, 5, 4), eps=1e-4) * (1 + self.gamma) + self.beta


class PlainElementNorm(ElementNorm):
    """The same, with a scale as it is."""

    def forward(self, x: Tensor) -> Tensor:
        c = log_compress((x - x.mean((1, 2, 3), keepdim=True)) / 3)
        return F.layer_norm(c, (6, 5, 4), self.gamma, self.beta, 1e-4)


class WithoutAffine(Base):
    """Parameters that nothing uses, and a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.tensor(3))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(self.compressed(x), x.shape[-1:], eps=self.eps)


class OneGain(nn.Module):
    """One scale for all features."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([1.7]))

    def forward(self, x: Tensor) -> Tensor:
        d = x - x.mean(-1, keepdim=True)
        return self.gain * F.layer_norm(log_compress(d), d.shape[-1:], eps=1e-5)


@dataclass(frozen=True)
class Member:
    """A member, and what it is."""

    build: Callable[[], nn.Module]
    kind: str
    lambd: float
    epsilon: float
    shape: tuple[int, ...] = (2, 3, 16)


MEMBERS: dict[str, Member] = {
    "LLaMA-like": Member(LlamaLike, "T", 2.0, 1e-6),
    "1 + weight, unbiased": Member(GemmaLike, "L", 4.0, 1e-3 * 15 / 16),
    "divided by sqrt(2)": Member(HalfPower, "L", 4.0, 1e-3),
    "around nn.LayerNorm": Member(AroundLayerNorm, "L", 8.0, 1e-5),
    "a learned lambda": Member(LearnedLambda, "T", math.exp(0.75), 1e-3),
    "channels": Member(TimmLike2d, "L", 4.0, 1e-3, (2, 16, 5, 4)),
    "axes 1 to 3": Member(Over3Axes, "T", 4.0, 1e-4, (2, 16, 5, 4)),
    "axes 2 and 3": Member(PerImage, "T", 4.0, 1e-4, (2, 16, 5, 4)),
    "elements of an image": Member(PlainElementNorm, "L", 3.0, 1e-4, (2, 6, 5, 4)),
    "elements, 1 + weight": Member(ElementNorm, "L", 3.0, 1e-4, (2, 6, 5, 4)),
    "unused parameters": Member(WithoutAffine, "L", 4.0, 1e-3),
    "one gain": Member(OneGain, "L", 1.0, 1e-5),
    "nn.LayerNorm": Member(lambda: nn.LayerNorm(16), "S", 1.0, 1e-5),
    "nn.GroupNorm, one group": Member(lambda: nn.GroupNorm(1, 16), "S", 1.0, 1e-5, (2, 16, 5, 4)),
}


# Not members.


def made(function: Callable[[Base, Tensor], Tensor]) -> Callable[[], nn.Module]:
    """A class whose forward is `function`."""

    class Norm(Base):
        def forward(self, x: Tensor) -> Tensor:
            return function(self, x)

    return Norm


def mean(x: Tensor) -> Tensor:
    return x.mean(-1, keepdim=True)


def standard(m: Base, c: Tensor) -> Tensor:
    c = c - mean(c)
    return c / torch.sqrt(mean(c * c) + m.eps)


def epsilon_outside(m: Base, x: Tensor) -> Tensor:
    c = m.compressed(x)
    return m.affine((c - mean(c)) / (c.std(-1, keepdim=True, unbiased=False) + m.eps))


def epsilon_outside_tanh(m: Base, x: Tensor) -> Tensor:
    c = torch.tanh((x - mean(x)) / m.lam)
    return m.affine((c - mean(c)) / (torch.std(c, dim=-1, keepdim=True) + m.eps))


def no_second_mean(m: Base, x: Tensor) -> Tensor:
    c = m.compressed(x)
    return m.affine(c / torch.sqrt(c.var(-1, keepdim=True, unbiased=False) + m.eps))


def no_second_mean_rms(m: Base, x: Tensor) -> Tensor:
    c = m.compressed(x)
    return m.affine(c * torch.rsqrt(mean(c * c) + m.eps))


def mean_square(m: Base, x: Tensor) -> Tensor:
    c = m.compressed(x)
    return m.affine((c - mean(c)) * torch.rsqrt(mean(c * c) + m.eps))


def no_first_mean(m: Base, x: Tensor) -> Tensor:
    return m.affine(standard(m, torch.tanh(x / m.lam)))


def no_mean(m: Base, x: Tensor) -> Tensor:
    c = log_compress(x / m.lam)
    return c * torch.rsqrt(mean(c * c) + m.eps) * m.weight


def rms_norm(m: Base, x: Tensor) -> Tensor:
    return m.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + m.eps))


def clipped_d(m: Base, x: Tensor) -> Tensor:
    return m.affine(standard(m, log_compress((x - mean(x)).clamp(-6, 6) / m.lam)))


def clipped_c(m: Base, x: Tensor) -> Tensor:
    return m.affine(standard(m, m.compressed(x).clamp(-1, 1)))


def clipped_y(m: Base, x: Tensor) -> Tensor:
    return m.affine(standard(m, m.compressed(x))).clamp(-2, 2)


def clipped_z(m: Base, x: Tensor) -> Tensor:
    return m.affine(standard(m, m.compressed(x)).clamp(-1.5, 1.5))


def clipped_x(m: Base, x: Tensor) -> Tensor:
    return m.affine(standard(m, m.compressed(x.clamp(-20, 20))))


def far_clipped(m: Base, x: Tensor) -> Tensor:
    return m.affine(standard(m, m.compressed(x.clamp(-3000, 3000))))


def equal_rows(m: Base, x: Tensor) -> Tensor:
    y = m.affine(standard(m, m.compressed(x)))
    return torch.where((x == x[..., :1]).all(-1, keepdim=True), torch.zeros_like(y), y)


def rectified(m: Base, x: Tensor) -> Tensor:
    return torch.relu(m.affine(standard(m, m.compressed(x))))


def in_groups(m: Base, x: Tensor) -> Tensor:
    groups = x.reshape(*x.shape[:-1], 2, 8)
    return m.affine(standard(m, m.compressed(groups)).reshape(x.shape))


def over_positions(m: Base, x: Tensor) -> Tensor:
    d = (x - x.mean((1, 2), keepdim=True)) / m.lam
    c = log_compress(d)
    c = c - c.mean((1, 2), keepdim=True)
    return m.affine(c / torch.sqrt(c.pow(2).mean((1, 2), keepdim=True) + m.eps))


def residual(m: Base, x: Tensor) -> Tensor:
    return x + m.affine(standard(m, m.compressed(x)))


def by(g: Callable[[Tensor], Tensor]) -> Callable[[Base, Tensor], Tensor]:
    return lambda m, x: m.affine(standard(m, g((x - mean(x)) / m.lam)))


def variance_of_x(m: Base, x: Tensor) -> Tensor:
    c = m.compressed(x)
    return m.affine((c - mean(c)) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + m.eps))


def relative_lambda(m: Base, x: Tensor) -> Tensor:
    d = x - mean(x)
    return m.affine(standard(m, log_compress(d / (2 * torch.sqrt(mean(d * d) + m.eps)))))


def compressed_last(m: Base, x: Tensor) -> Tensor:
    return m.affine(torch.tanh(standard(m, x) / 1.5))


def mean_deviation(m: Base, x: Tensor) -> Tensor:
    c = m.compressed(x)
    c = c - mean(c)
    return m.affine(c / (mean(c.abs()) + m.eps))


def minimum(m: Base, x: Tensor) -> Tensor:
    c = m.compressed(x)
    c = c - mean(c)
    return m.affine(c / torch.sqrt(mean(c * c)).clamp(min=m.eps))


def mean_again(m: Base, x: Tensor) -> Tensor:
    c = m.compressed(x)
    return m.affine(c / torch.sqrt(c.var(-1, keepdim=True, unbiased=False) + m.eps) + mean(x))


def median_centred(m: Base, x: Tensor) -> Tensor:
    return m.affine(standard(m, log_compress((x - x.median(-1, keepdim=True).values) / m.lam)))


def double_compressed(m: Base, x: Tensor) -> Tensor:
    return m.affine(standard(m, log_compress(m.compressed(x))))


@dataclass(frozen=True)
class Other:
    """A norm that is not a member, and words of its difference."""

    forward: Callable[[Base, Tensor], Tensor]
    words: str
    shape: tuple[int, ...] = (2, 3, 16)


OTHERS: dict[str, Other] = {
    "epsilon outside, L": Other(epsilon_outside, "outside the root"),
    "epsilon outside, T, unbiased": Other(epsilon_outside_tanh, "outside the root"),
    "no second mean": Other(no_second_mean, "mean of the compressed values is not subtracted"),
    "no second mean, mean square": Other(no_second_mean_rms, "mean of the compressed values is not subtracted"),
    "mean square for the variance": Other(mean_square, "mean square of the compressed values takes the place"),
    "no first mean": Other(no_first_mean, "the mean of x is not subtracted"),
    "no mean": Other(no_mean, "no mean is subtracted"),
    "RMSNorm": Other(rms_norm, "no mean is subtracted"),
    "d clipped": Other(clipped_d, "centred values are clipped"),
    "c clipped": Other(clipped_c, "centred values are clipped"),
    "y clipped": Other(clipped_y, "the output is clipped"),
    "z clipped": Other(clipped_z, "the output is clipped"),
    "x clipped": Other(clipped_x, "the input is clipped"),
    "x clipped far away": Other(far_clipped, "for values of about 10000"),
    "equal rows": Other(equal_rows, "rows of equal values"),
    "ReLU": Other(rectified, "as in an activation"),
    "two groups": Other(in_groups, "2 groups of last axis"),
    "positions and features": Other(over_positions, "axes [1, 2]", (2, 3, 4, 16)),
    "residual": Other(residual, "the input is added to the output"),
    "asinh": Other(by(torch.asinh), "the compression is asinh"),
    "softsign": Other(by(F.softsign), "the compression is softsign"),
    "atan": Other(by(torch.atan), "the compression is atan"),
    "erf": Other(by(torch.erf), "no known formula"),
    "variance of x": Other(variance_of_x, "the variance is that of x"),
    "relative lambda": Other(relative_lambda, "lambda is relative to the standard deviation"),
    "compressed last": Other(compressed_last, "after the standardisation"),
    "mean deviation": Other(mean_deviation, "mean absolute deviation"),
    "epsilon as a minimum": Other(minimum, "epsilon is the smallest standard deviation"),
    "mean added again": Other(mean_again, "mean of x is added again"),
    "median": Other(median_centred, "no known formula"),
    "compressed twice": Other(double_compressed, "no known formula"),
}
