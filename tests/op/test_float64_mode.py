"""Code that casts to narrower types computes in float64 inside `compute_in_float64()`."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ibnorm_export.artifacts.float64_parameters import widened_copy
from ibnorm_export.op.float64_mode import compute_in_float64

X = torch.linspace(-3, 3, 21, dtype=torch.float64).reshape(3, 7) ** 3 / 7
WEIGHT = torch.linspace(0.3, 1.7, 7, dtype=torch.float64)
STORED = torch.linspace(0.3, 1.7, 7, dtype=torch.float32)  # as a buffer that no one converts


def standardised(x: Tensor, epsilon: float = 1e-5) -> Tensor:
    d = x - x.mean(-1, keepdim=True)
    return d * torch.rsqrt(d.pow(2).mean(-1, keepdim=True) + epsilon)


def filled(x: Tensor) -> Tensor:
    result = torch.empty(3, 7, dtype=torch.float32)
    result[:, ::2] = x.float()[:, ::2]
    result[:, 1::2] = x[:, 1::2].half().to(x.dtype)
    return result


def autocast(x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return x @ torch.outer(WEIGHT, WEIGHT)


def root_mean_square(x: Tensor) -> Tensor:
    x = x.to(torch.float32)
    return x / x.pow(2).mean(-1, keepdim=True).sqrt()


def scripted(x: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit.script itself, which older models use
        result: Tensor = torch.jit.script(root_mean_square)(x)
    return result


class Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]  # torch's own signature
        return x.float() ** 2


#: What code with casts computes -> the same without them, in float64.
CASES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "float()": (lambda x: standardised(x.float()).type_as(x), standardised),
    "half()": (lambda x: standardised(x.half()), standardised),
    "to(torch.bfloat16)": (lambda x: standardised(x.to(torch.bfloat16)), standardised),
    "to(dtype=, device=)": (lambda x: standardised(x.to("cpu", torch.float32, copy=True)), standardised),
    "type()": (lambda x: standardised(x.type(torch.float32)), standardised),
    "type by name": (lambda x: standardised(x.type("torch.FloatTensor")), standardised),
    "zeros with a dtype": (lambda x: torch.zeros(7, dtype=torch.float32) + x.float(), lambda x: x),
    "an empty tensor that is filled": (filled, lambda x: x),
    "ones in the default dtype": (lambda x: torch.ones(7).div(3) * x, lambda x: x / 3),
    "linspace": (
        lambda x: torch.linspace(0, 1, 7, dtype=torch.float32) * x,
        lambda x: x * torch.arange(7).double() / 6,
    ),
    "a tensor of numbers": (lambda x: x * torch.tensor(0.1, dtype=torch.float32), lambda x: x * 0.1),
    "numbers in the default dtype": (lambda x: x * torch.tensor([0.1]), lambda x: x * 0.1),
    "new_tensor": (lambda x: x * x.new_tensor([0.1], dtype=torch.float32), lambda x: x * 0.1),
    "integers divided": (lambda x: x * (torch.arange(7) / 7), lambda x: x * torch.arange(7).double() / 7),
    "a reduction with a dtype": (lambda x: x.sum(-1, dtype=torch.float32), lambda x: x.sum(-1)),
    "softmax with a dtype": (lambda x: F.softmax(x, -1, dtype=torch.float32), lambda x: F.softmax(x, -1)),
    "a narrow constant": (lambda x: (STORED + 1) / 3 * x, lambda x: (STORED.double() + 1) / 3 * x),
    "autocast": (autocast, lambda x: x @ torch.outer(WEIGHT, WEIGHT)),
    "TorchScript": (scripted, lambda x: x / x.pow(2).mean(-1, keepdim=True).sqrt()),
    "an autograd function": (lambda x: Squared.apply(x), lambda x: x**2),
    "complex numbers": (lambda x: torch.fft.fft(x.float()).to(torch.complex64).abs(), lambda x: torch.fft.fft(x).abs()),
    "torch.compile": (torch.compile(lambda x: standardised(x.float())), standardised),
}


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_casts_and_factories_give_float64(name: str, mode: Callable[[], torch.no_grad]) -> None:
    narrow, wide = CASES[name]
    expected = wide(X)
    with mode(), compute_in_float64():
        got = narrow(X)
    assert got.dtype == torch.float64
    # An order of operations may differ by a few units in the last place, and float32 by 1e-8 at the least.
    torch.testing.assert_close(got, expected, rtol=1e-14, atol=1e-15)


def test_the_same_code_is_not_exact_without_it() -> None:
    """Otherwise the test above would show nothing."""
    with torch.no_grad():
        differing = [
            name for name, (narrow, wide) in CASES.items() if name != "torch.compile" and differs(narrow, wide)
        ]
    assert set(CASES) - set(differing) <= {"torch.compile", "autocast"}


def differs(narrow: Callable[[Tensor], Tensor], wide: Callable[[Tensor], Tensor]) -> bool:
    got, expected = narrow(X), wide(X)
    return got.dtype != torch.float64 or not torch.allclose(got, expected, rtol=1e-14, atol=1e-15)


class Cast(nn.Module):
    """A model that computes in float32 throughout."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(7, 7), nn.LayerNorm(7)
        self.register_buffer("table", torch.arange(7) / 7, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.float()) + self.table.cos()
        result: Tensor = F.layer_norm(x.float(), (7,), self.norm.weight.float(), self.norm.bias)
        return result


@pytest.mark.parametrize("copied", [True, False])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_parameters_may_be_widened_or_as_they_are(copied: bool, mode: Callable[[], torch.no_grad]) -> None:
    torch.manual_seed(0)
    module = Cast().eval()
    run = widened_copy(module) if copied else module
    with mode(), compute_in_float64():
        got = run(X)
    state = {name: value.double() for name, value in module.state_dict().items()}
    x = F.linear(X, state["first.weight"], state["first.bias"]) + (torch.arange(7) / 7).double().cos()
    expected = standardised(x) * state["norm.weight"] + state["norm.bias"]
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-14)
    assert module.first.weight.dtype == torch.float32


def test_bits_are_read_as_they_are() -> None:
    with compute_in_float64():
        bits = torch.tensor([1.0], dtype=torch.float64).view(torch.int64)
        assert torch.equal(bits.view(torch.float64), torch.ones(1, dtype=torch.float64))
        assert bits.view(torch.float32).dtype == torch.float32


def test_everything_is_as_before_afterwards() -> None:
    with pytest.raises(ZeroDivisionError), compute_in_float64():
        raise ZeroDivisionError
    assert torch.get_default_dtype() == torch.float32
    assert torch.zeros(1).dtype == X.float().dtype == torch.float32


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_convolutions_take_float64_beside_parameters_of_another_type(axes: int) -> None:
    """PyTorch compares the types of a convolution's input and bias before any operator sees them."""
    first, second = ((nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1](2, 2, 1) for _ in range(2))
    x = torch.linspace(-1, 1, 2 * 3**axes).reshape(1, 2, *(3,) * axes)
    with compute_in_float64(), torch.no_grad():
        actual = second(first(x))
    assert torch.equal(actual, second.double()(first.double()(x.double())))
