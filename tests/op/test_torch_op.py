"""The operator in torch: accuracy, gradients, registration, compile, autocast, replacement in models."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

from ibnorm_export import Compression, IBNorm, IBNormSpec, NormConfig, ibnorm, replace_norms, skip_ibnorm
from ibnorm_export.errors import SpecError
from tests.support.accuracy import assert_half_exact, cases, relative_error

EVERY = pytest.mark.parametrize("kind", list(Compression))


def tensor(array: np.ndarray) -> torch.Tensor:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.astype(np.float32)).bfloat16()
    return torch.from_numpy(array)


@EVERY
def test_float32_accuracy(kind: Compression) -> None:
    for case in cases(kind, np.float32):
        y = ibnorm(tensor(case.x), tensor(case.scale), bias=tensor(case.bias), spec=case.spec)
        assert relative_error(y.numpy(), case.exact) <= (1e-5 if case.mean else 5e-7), str(case)


@EVERY
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_accuracy(kind: Compression, dtype: type) -> None:
    for case in cases(kind, dtype, (1, 7, 111, 1023, 4096)):
        if case.x.dtype == np.float16 and not np.isfinite(case.x.astype(np.float32)).all():
            continue
        y = ibnorm(tensor(case.x), tensor(case.scale), bias=tensor(case.bias), spec=case.spec)
        assert_half_exact(y.float().numpy(), case)


@EVERY
def test_edge_cases(kind: Compression) -> None:
    spec = IBNormSpec(kind, epsilon=1e-12)
    assert ibnorm(torch.empty(0, 5), None, bias=None, spec=spec).shape == (0, 5)
    y = ibnorm(torch.full((3, 768), 10.1), torch.ones(768), bias=torch.full((768,), 0.5), spec=spec)
    torch.testing.assert_close(y, torch.full((3, 768), 0.5), rtol=0, atol=1e-6)
    x = torch.randn(3, 8)
    clean = ibnorm(x, None, bias=None, spec=spec)
    x[1, 2] = torch.nan
    poisoned = ibnorm(x, None, bias=None, spec=spec)
    assert poisoned[1].isnan().all()
    assert torch.equal(poisoned[[0, 2]], clean[[0, 2]])


def inputs(*shape: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_()
        for s in (shape, shape, shape[-1:], shape[-1:])
    ]


@EVERY
def test_gradients(kind: Compression) -> None:
    spec = IBNormSpec(kind, 1.5, epsilon=1e-3)
    x, skip, weight, bias = inputs(3, 4, 7)
    assert torch.autograd.gradcheck(lambda x, w, b: ibnorm(x, w, bias=b, spec=spec), (x, weight, bias))
    assert torch.autograd.gradcheck(lambda x: ibnorm(x, None, bias=None, spec=spec), (x,))
    assert torch.autograd.gradcheck(
        lambda x, s, w, b: skip_ibnorm(x, s, weight=w, bias=b, spec=spec), (x, skip, weight, bias)
    )
    assert torch.autograd.gradgradcheck(lambda x, w, b: ibnorm(x, w, bias=b, spec=spec), (x, weight, bias))


@EVERY
def test_float32_gradients(kind: Compression) -> None:
    spec = IBNormSpec(kind)
    exact = inputs(64, 96)
    single = [t.detach().float().requires_grad_() for t in exact]
    for t in (exact, single):
        y, total = skip_ibnorm(t[0], t[1], weight=t[2], bias=t[3], spec=spec)
        ((y * y.detach().sin()).sum() + total.sum()).backward()  # type: ignore[no-untyped-call]
    for a, b in zip(single, exact, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert relative_error(a.grad.numpy(), b.grad.numpy()) < 1e-5


@EVERY
def test_registration(kind: Compression) -> None:
    x, skip, weight, bias = inputs(3, 5, 8)
    op, skip_op = (getattr(torch.ops.ibnorm, name).default for name in (kind.op_type, kind.skip_op_type))
    torch.library.opcheck(op, (x, weight, bias, 4.0, 1e-5))
    torch.library.opcheck(op, (x.detach().transpose(0, 2), None, None, 4.0, 1e-5))
    torch.library.opcheck(skip_op, (x, skip, weight, bias, 4.0, 1e-5))
    torch.library.opcheck(skip_op, (x.detach().transpose(0, 2), skip.detach().transpose(0, 2), None, None, 4.0, 1e-5))


@EVERY
def test_torch_compile_has_no_graph_break(kind: Compression) -> None:
    spec = IBNormSpec(kind)
    x, skip, weight, bias = (t.detach().float() for t in inputs(4, 33))
    compiled = torch.compile(
        lambda a, s: (ibnorm(a, weight, bias=bias, spec=spec), *skip_ibnorm(a, s, weight=weight, bias=bias, spec=spec)),
        fullgraph=True,
    )
    eager = (ibnorm(x, weight, bias=bias, spec=spec), *skip_ibnorm(x, skip, weight=weight, bias=bias, spec=spec))
    for a, b in zip(compiled(x, skip), eager, strict=True):
        # PyTorch's own bound for float32, and eight units in the last place of values to about 4: sums run in
        # another order when compiled
        torch.testing.assert_close(a, b, rtol=1.3e-6, atol=2e-6)


@EVERY
def test_autocast_changes_neither_arithmetic_nor_type(kind: Compression) -> None:
    x, skip, weight, bias = (t.detach().float() for t in inputs(5, 130))
    spec = IBNormSpec(kind)
    for dtype in (torch.float32, torch.bfloat16):
        x, skip = x.to(dtype), skip.to(dtype)
        affine = {"weight": weight, "bias": bias, "spec": spec}
        plain = skip_ibnorm(x, skip, **affine)
        with torch.autocast("cpu", torch.bfloat16):
            cast = skip_ibnorm(x, skip, **affine)
            compiled = torch.compile(skip_ibnorm, fullgraph=True)(x, skip, **affine)
        for a, b, c in zip(plain, cast, compiled, strict=True):
            assert a.dtype == b.dtype == c.dtype == dtype
            assert torch.equal(a, b)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_skip_form_is_bit_identical_to_addition_and_norm(kind: Compression, dtype: torch.dtype) -> None:
    x, skip, weight, bias = (t.detach().to(dtype) for t in inputs(9, 130))
    spec = IBNormSpec(kind)
    y, total = skip_ibnorm(x, skip, weight=weight, bias=bias, spec=spec)
    assert torch.equal(total, x + skip)
    assert torch.equal(y, ibnorm(x + skip, weight, bias=bias, spec=spec))


def test_mixed_types_and_layouts() -> None:
    spec = IBNormSpec("T")
    x = torch.randn(6, 4, 8).half()
    weight = torch.randn(8)
    assert ibnorm(x, weight, bias=None, spec=spec).dtype == torch.float16
    strided = ibnorm(x.transpose(0, 1), weight, bias=None, spec=spec)
    assert strided.is_contiguous()
    assert torch.equal(strided, ibnorm(x.transpose(0, 1).contiguous(), weight, bias=None, spec=spec))


def test_illegal_arguments() -> None:
    spec = IBNormSpec("L")
    with pytest.raises(SpecError, match=r"weight has shape \(3,\).*\(4,\)"):
        ibnorm(torch.ones(2, 4), torch.ones(3), bias=None, spec=spec)
    with pytest.raises(SpecError, match="int64"):
        ibnorm(torch.ones(2, 4, dtype=torch.int64), None, bias=None, spec=spec)
    with pytest.raises(SpecError, match="at least one axis"):
        ibnorm(torch.tensor(1.0), None, bias=None, spec=spec)
    with pytest.raises(SpecError, match="skip"):
        skip_ibnorm(torch.ones(2, 4), torch.ones(4), weight=None, bias=None, spec=spec)
    with pytest.raises(SpecError, match="batch"):
        IBNorm(4, IBNormSpec("L", grouping="batch"))  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="features"):
        IBNorm(0, spec)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LayerNorm(8)
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.RMSNorm(8))
        self.again = self.first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.again(self.inner(self.first(x)))
        return y


def test_a_replacement_copies_scale_and_bias_and_stays_shared() -> None:
    model = Block()
    nn.init.uniform_(model.first.weight)
    weight, bias = model.first.weight.detach().clone(), model.first.bias.detach().clone()
    replaced = replace_norms(model, IBNormSpec("S", 1.0, epsilon=1e-5))
    assert sorted(replaced) == ["again", "first", "inner.1"]
    assert model.first is model.again
    assert torch.equal(model.first.weight, weight)
    x = torch.randn(2, 8)
    torch.testing.assert_close(model.first(x), nn.functional.layer_norm(x, (8,), weight, bias))
    assert isinstance(model.inner[1], IBNorm)


def test_rules_apply_by_path() -> None:
    section = {"compression": "L", "lambda": 4, "epsilon": 1e-5, "convention": "divide"}
    model = Block()
    replace_norms(model, NormConfig.from_config({**section, "layers": [{"match": "inner.*", "norm": "rmsnorm"}]}))
    assert type(model.inner[1]) is nn.RMSNorm
    assert isinstance(model.first, IBNorm)
    with pytest.raises(SpecError, match="nowhere"):
        replace_norms(Block(), NormConfig.from_config({**section, "layers": [{"match": "nowhere", "lambda": 2}]}))


def test_a_norm_that_cannot_be_replaced_is_an_error() -> None:
    with pytest.raises(SpecError, match="no LayerNorm"):
        replace_norms(nn.Linear(2, 2), IBNormSpec("L"))
    activated = nn.BatchNorm2d(3)
    activated.act = nn.ReLU()
    with pytest.raises(SpecError, match="activation"):
        replace_norms(nn.Sequential(activated), IBNormSpec("L"))
    with pytest.raises(SpecError, match="only a norm over one axis can be replaced"):
        replace_norms(nn.Sequential(nn.LayerNorm((2, 3))), IBNormSpec("L"))


def test_replacement_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = Block()
    replace_norms(model, IBNormSpec("L"))
    assert all(p.is_meta for p in model.parameters())
