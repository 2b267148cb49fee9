"""Identify norms that strangers wrote; the classes here share no code with the package."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ibnorm_export.op.identify import identify


class NanoNorm(nn.Module):
    """As in a fork of nanoGPT: an optional bias, in float32."""

    def __init__(self, ndim: int, *, lam: float, eps: float, bias: bool = True) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(ndim))
        self.beta = nn.Parameter(torch.randn(ndim)) if bias else None
        self.lam, self.eps = lam, eps

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        h = h - h.mean(-1, keepdim=True)
        h = torch.sign(h) * torch.log(1 + h.abs() / self.lam)
        h = h - h.mean(dim=-1, keepdim=True)
        h = h / torch.sqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        h = self.gamma * h if self.beta is None else self.gamma * h + self.beta
        return h.type_as(x)


@pytest.mark.parametrize("bias", [True, False])
def test_a_member_over_the_last_axis(bias: bool) -> None:
    norm = NanoNorm(24, lam=4.0, eps=1e-5, bias=bias)
    found = identify(norm)
    assert found
    assert (found.kind, found.lambd, found.epsilon) == ("L", 4.0, 1e-5)
    assert found.residual < 1e-11
    assert found.weight is norm.gamma
    assert found.bias_parameter is norm.beta
    assert found.parameters["gamma"] == "scale"
    x = torch.randn(3, 5, 24)
    torch.testing.assert_close(found.replacement()(x), norm(x), rtol=1e-4, atol=1e-5)
