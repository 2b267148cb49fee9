"""Identify norms that strangers wrote; the classes share no code with the package."""

from __future__ import annotations

import copy
import functools
import itertools
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ibnorm_export.errors import SpecError
from ibnorm_export.op.identification import probe
from ibnorm_export.op.identification.norms import NormIdentity, identify
from tests.support.stranger_norms import MEMBERS, OTHERS, Base, Over3Axes, Written, canonical, made, standard

#: Each pair of g, convention, lambda and epsilon occurs; benchmarks/suites/identify.py has the whole table.
CASES = [
    (g, convention, (0.5, 2.0, 4.0, 16.0)[(i + j) % 4], (0.0, 1e-6, 1e-5, 1e-3)[(i + 2 * j) % 4])
    for (i, g), (j, convention) in itertools.product(
        enumerate("SLT"), enumerate(("divide", "unit_slope", "multiply", "outer"))
    )
]


@pytest.mark.parametrize(("g", "convention", "lambd", "epsilon"), CASES)
def test_every_convention(g: str, convention: str, lambd: float, epsilon: float) -> None:
    for dim, dtype in ((8, torch.float32), (65, torch.float64)):
        norm = Written(dim, g=g, lam=lambd, eps=epsilon, convention=convention).to(dtype)
        found = identify(norm)
        assert found, found.difference
        assert found.kind == g
        assert (found.lambd, found.epsilon) == pytest.approx(canonical(g, lambd, epsilon, convention), rel=1e-12)
        if convention == "divide" and g != "S":
            assert (found.lambd, found.epsilon) == (lambd, epsilon)  # as they were written, to the last bit
        assert found.residual < 1e-11
        assert (found.weight, found.bias_parameter) == (norm.w, norm.b)


def difference(norm: nn.Module, replacement: nn.Module, x: Tensor) -> float:
    """Relative, in float64; the norms here cast to no narrower type, or are run without."""
    with torch.no_grad():
        expected, got = copy.deepcopy(norm).double()(x), copy.deepcopy(replacement).double()(x)
    return float((got - expected).norm() / expected.norm())


@functools.cache
def member(name: str) -> NormIdentity:
    return identify(MEMBERS[name].build(), shape=MEMBERS[name].shape)


@pytest.mark.parametrize("name", list(MEMBERS))
def test_members_in_another_form(name: str) -> None:
    case = MEMBERS[name]
    found = member(name)
    norm = found.module
    assert found, found.difference
    assert (found.kind, found.lambd, found.epsilon) == (
        case.kind,
        pytest.approx(case.lambd, rel=1e-7),
        pytest.approx(case.epsilon, rel=1e-9),
    )
    assert found.residual < 1e-11
    assert set(found.parameters) == {n for n, _ in (*norm.named_parameters(), *norm.named_buffers())}
    if name != "LLaMA-like":  # casts to float32
        x = torch.randn(case.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
        assert difference(norm, found.replacement(), x) < 1e-12


def test_what_parameters_become() -> None:
    roles = {name: member(name).parameters for name in MEMBERS}
    assert roles["1 + weight, unbiased"]["weight"] == f"scale is {(15 / 16) ** 0.5:.6g} * (1 + it)"
    assert roles["1 + weight, unbiased"]["bias"] == "has no effect"
    assert roles["divided by sqrt(2)"] == {"weight": "scale is 0.707107 * (it)", "bias": "bias is 0.707107 * (it)"}
    assert roles["a learned lambda"]["log_lam"] == "lambda"
    assert roles["around nn.LayerNorm"] == {"inner.weight": "scale", "inner.bias": "bias"}
    assert set(roles["unused parameters"].values()) == {"has no effect"}


def test_the_replacement_has_the_parameters_of_the_norm() -> None:
    norm = Written(8, g="L", lam=4.0, eps=1e-5)
    replacement = identify(norm).replacement()
    assert (replacement.weight, replacement.bias) == (norm.w, norm.b)
    assert replacement.training
    derived = member("1 + weight, unbiased").replacement()
    assert derived.weight.dtype == torch.float64


def test_a_scale_for_each_element_of_an_image() -> None:
    found = member("elements of an image")
    assert (found.elements, found.features) == ((6, 5, 4), 120)
    assert found.grouping == "axes [1, 2, 3], scale and bias for each element"
    assert found.parameters == {"gamma": "scale", "beta": "bias"}
    assert (found.weight, found.bias_parameter) == (found.module.gamma, found.module.beta)
    assert member("elements, 1 + weight").parameters["gamma"] == "scale is 1 + it"


@pytest.mark.parametrize("name", list(OTHERS))
def test_other_norms_are_named(name: str) -> None:
    case = OTHERS[name]
    found = identify(made(case.forward)(), shape=case.shape)
    assert not found
    assert case.words in found.difference
    with pytest.raises(SpecError, match="has no replacement"):
        found.replacement()


def test_the_difference_has_the_numbers_of_the_norm_and_of_the_nearest_member() -> None:
    found = identify(made(OTHERS["epsilon outside, L"].forward)())
    assert (found.kind, found.lambd, found.epsilon) == ("L, epsilon outside the root", 4.0, 1e-3)
    assert "The nearest member, IBNorm-L with lambda" in found.difference
    assert found.residual < 1e-11


class Locked(Base):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


class Raises(Base):
    def forward(self, x: Tensor) -> Tensor:
        raise KeyboardError("no keyboard" * 100)


class KeyboardError(Exception):
    pass


class Gated(Base):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.affine(standard(self, self.compressed(x))) + self.gate * x


class Counting(Base):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.affine(standard(self, self.compressed(x))) + 1e-6 * self.calls


def over_the_batch(m: Base, x: Tensor) -> Tensor:
    return m.affine((x - x.mean(0)) / (x.var(0, unbiased=False) + m.eps).sqrt())


def in_place(m: Base, x: Tensor) -> Tensor:
    x -= x.mean(-1, keepdim=True)
    return m.affine(standard(m, m.compressed(x)))


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "batch statistics": (made(over_the_batch), "depends on other rows"),
    "dropout": (made(lambda m, x: nn.functional.dropout(m.affine(x))), "two results for the same input"),
    "noise": (made(lambda m, x: standard(m, x) + 1e-3 * torch.randn_like(x)), "two results for the same input"),
    "a counter": (Counting, "two results for the same input"),
    "another shape": (made(lambda m, x: x.mean(-1)), "a norm returns the shape and dtype of its input"),
    "another dtype": (made(lambda m, x: standard(m, x).double()), "a norm returns the shape and dtype of its input"),
    "several outputs": (made(lambda m, x: (x, x)), "returns tuple; a norm returns one tensor"),  # type: ignore[arg-type, return-value]  # as it must not be
    "NaN": (made(lambda m, x: standard(m, x).log()), "returns NaN or infinity"),
    "a lock": (Locked, "cannot be copied"),
    "an exception": (Raises, "raised KeyboardError: no keyboard"),
    "a gate": (Gated, "gate of Gated has an effect that is not that of"),
    "in place": (made(in_place), "changes its input in place"),
    "a constant": (made(lambda m, x: torch.ones_like(x)), "does not depend on its input"),
    "too few features": (lambda: Written(2, g="L", lam=4.0, eps=1e-5), "too few to identify"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_cannot_be_run_as_a_norm_is_refused(name: str) -> None:
    build, message = REFUSED[name]
    with pytest.raises(SpecError, match=message) as caught:
        identify(build())
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


class StoredInHalf(nn.Module):
    """A norm in float32 whose scale is stored in float16."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.linspace(0.5, 1.5, 16).half())

    def forward(self, x: Tensor) -> Tensor:
        d = x - x.mean(-1, keepdim=True)
        return nn.functional.layer_norm(torch.tanh(d / 3), (16,)) * self.gamma.float()


def test_a_norm_may_store_its_scale_in_half_precision() -> None:
    found = identify(StoredInHalf())
    assert (found.kind, found.features) == ("T", 16)
    assert found.residual <= 1e-11


def test_nothing_of_the_caller_changes() -> None:
    norm = MEMBERS["a learned lambda"].build().train()
    before, state = copy.deepcopy(norm.state_dict()), torch.get_rng_state()
    identify(norm)
    assert norm.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())
    assert norm.log_lam.dtype == torch.float32


class Unbiased(nn.Module):
    """No parameter, and an unbiased variance: it depends on the number of features."""

    def forward(self, x: Tensor) -> Tensor:
        c = torch.tanh((x - x.mean(-1, keepdim=True)) / 2)
        return 3 * (c - c.mean(-1, keepdim=True)) / torch.sqrt(c.var(-1, keepdim=True) + 1e-3)


class UnbiasedImages(nn.Module):
    """The same over long groups, which are identified at a smaller size first."""

    def forward(self, x: Tensor) -> Tensor:
        c = torch.tanh((x - x.mean((1, 2, 3), keepdim=True)) / 2)
        return 3 * (c - c.mean((1, 2, 3), keepdim=True)) / torch.sqrt(c.var((1, 2, 3), keepdim=True) + 1e-3)


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (Unbiased(), (2, 7, 150)),
        (MEMBERS["one gain"].build(), (2, 70, 150)),
        (UnbiasedImages(), (1, 66, 4, 4)),
        (Over3Axes(), (2, 16, 40, 40)),
    ],
)
def test_a_replacement_has_the_size_of_the_input(
    norm: nn.Module, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "_LONGEST_GROUP", 1000)
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    found = identify(norm, shape=shape)
    assert found, found.difference
    assert difference(norm, found.replacement(), x) < 1e-12


def test_the_text_of_an_identity() -> None:
    text = str(identify(Written(8, g="L", lam=4.0, eps=1e-5)))
    assert text.startswith("Written is IBNorm-L: lambda 4, epsilon 1e-05\n")
    assert "last axis, 8 features" in text
    assert str(identify(made(OTHERS["RMSNorm"].forward)())).startswith("Norm is not IBNorm: no mean is subtracted")
