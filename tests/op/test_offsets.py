"""Norms that multiply by `offset + weight`, and the sum that replaces their weight when a checkpoint is loaded."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ibnorm_export import IBNormSpec, NormConfig, replace_norms
from ibnorm_export.op.replace_norms import absorb_offsets

SECTION = {"compression": "T", "lambda": 2.0, "epsilon": 1e-5, "convention": "divide", "bias": False, "offset": 1}


def by_hand(x: torch.Tensor, scale: torch.Tensor, *, ibnorm: bool) -> torch.Tensor:
    c = torch.tanh((x - x.mean(-1, keepdim=True)) / 2.0) if ibnorm else x
    c = c - c.mean(-1, keepdim=True) if ibnorm else c
    return c / torch.sqrt(c.square().mean(-1, keepdim=True) + 1e-5) * scale


@pytest.mark.parametrize("ibnorm", [True, False])
def test_the_sum_is_exact_and_changes_nothing(ibnorm: bool) -> None:
    section = SECTION if ibnorm else {**SECTION, "layers": [{"match": "*", "norm": "rmsnorm"}]}
    model = nn.Sequential(nn.RMSNorm(8))
    replace_norms(model, NormConfig.from_config(section))
    weight = torch.full((8,), 3e-5, dtype=torch.bfloat16)  # 1 + weight is 1 in bfloat16
    model[0].weight = nn.Parameter(weight, requires_grad=False)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = by_hand(x, 1.0 + weight.double(), ibnorm=ibnorm)

    before = model.double()(x)
    model[0].weight = nn.Parameter(weight, requires_grad=False)
    absorb_offsets(model)
    absorb_offsets(model)  # there is nothing left to add
    assert model[0].weight.dtype == torch.float64
    assert torch.equal(model[0].weight, 1.0 + weight.double())
    for y in (before, model(x)):
        torch.testing.assert_close(y, expected, rtol=1e-13, atol=1e-13)


def test_no_offset_leaves_parameters_alone() -> None:
    model = nn.Sequential(nn.LayerNorm(8))
    replace_norms(model, IBNormSpec("L"))
    weight = model[0].weight
    absorb_offsets(model)
    assert model[0].weight is weight
