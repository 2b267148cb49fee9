"""Identify every norm of a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ibnorm_export.errors import SpecError
from ibnorm_export.op.identification import fitting, formulas
from ibnorm_export.op.identification.norms import identify_norms
from tests.support.stranger_norms import OTHERS, Base, Over3Axes, Written, made


class IBNorm(Written):
    """Named like a norm."""

    def __init__(self, dim: int, lam: float = 4.0) -> None:
        super().__init__(dim, g="L", lam=lam, eps=1e-5)


class Squeeze(IBNorm):
    """Named like no norm."""


class IBN2d(Over3Axes):
    pass


class PreNorm(nn.Module):
    """A norm and the layer after it: named like a norm, and not one."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.fn = IBNorm(dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fn(self.norm(x))
        return result


class NormThenActivation(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = IBNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(self.norm(x))


class ChannelNorm(nn.Module):
    """Moves the channels to the end and back, around a norm."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = IBNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.norm(x.movedim(1, -1)).movedim(-1, 1)
        return result


class AddNorm(nn.Module):
    """Two inputs."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = IBNorm(dim)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        result: Tensor = self.norm(x + skip)
        return result


class Net(nn.Module):
    def __init__(self, dim: int = 12) -> None:
        super().__init__()
        self.first = PreNorm(dim)
        self.second = NormThenActivation(dim)
        self.third = AddNorm(dim)
        self.fourth = ChannelNorm(dim)
        self.fifth = Squeeze(dim)
        self.shared = self.fifth
        self.last = nn.LayerNorm(dim)
        self.unused = IBNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.third(self.second(self.first(x)), x)
        x = self.fourth(x.transpose(1, 2)).transpose(1, 2)
        result: Tensor = self.last(self.shared(self.fifth(x)))
        return result


def test_norms_are_found_by_name_and_containers_are_looked_through() -> None:
    net = Net()
    report = identify_norms(net, run=lambda: net(torch.randn(2, 5, 12)))
    assert report.passed, str(report)
    assert list(report.norms) == ["first.norm", "second.norm", "third.norm", "fourth", "fifth", "shared"]
    assert all((i.kind, i.lambd, i.epsilon) == ("L", 4.0, 1e-5) for i in report.norms.values())
    assert report.norms["fourth"].channel_axis == 1
    assert report.stock == {"last": "LayerNorm"}
    assert not any(module._forward_hooks for module in net.modules())


@pytest.mark.parametrize("norm_class", [Squeeze, "Squeeze", f"{__name__}:Squeeze", f"{__name__}.Squeeze", Written])
def test_norms_are_found_by_class(norm_class: type[nn.Module] | str) -> None:
    net = Net()
    report = identify_norms(net, run=lambda: net(torch.randn(2, 5, 12)), norm_class=norm_class)
    assert report.norms["fifth"] is report.norms["shared"]
    assert report.passed


class Swish(nn.Module):
    """Has no inner modules, as a norm may have none."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


def test_a_norm_is_found_whatever_it_is_called_and_no_activation_is_listed() -> None:
    net = nn.Sequential(nn.Linear(12, 12), Squeeze(12), Swish())
    report = identify_norms(net, run=lambda: net(torch.randn(2, 12)))
    assert list(report.norms) == ["1"]
    assert report.passed
    assert not report.refused


class Compressed(nn.LayerNorm):
    """Inherits from a norm of PyTorch, and its name does not say so."""

    def forward(self, x: Tensor) -> Tensor:
        d = x - x.mean(-1, keepdim=True)
        return super().forward(torch.tanh(d / 3))


def test_a_subclass_of_a_norm_of_pytorch_is_found_whatever_it_is_called() -> None:
    net = nn.Sequential(nn.Linear(12, 12), Compressed(12))
    report = identify_norms(net, run=lambda: net(torch.randn(2, 12)))
    assert {path: identity.kind for path, identity in report.norms.items()} == {"1": "T"}


class ScaledNorm(IBNorm):
    """May be called with a condition."""

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        y: Tensor = super().forward(x)
        return y if condition is None else y * condition


class FreeNorm(nn.Module):
    """Has no parameters, so it takes inputs of every width."""

    def forward(self, x: Tensor) -> Tensor:
        d = x - x.mean(-1, keepdim=True)
        return nn.functional.layer_norm(torch.tanh(d / 3), x.shape[-1:])


def test_a_norm_that_is_called_in_several_ways_is_refused() -> None:
    scaled, free = ScaledNorm(12), FreeNorm()
    net = nn.ModuleDict({"scaled": scaled, "free": free})
    x = torch.randn(2, 5, 12)
    report = identify_norms(net, run=lambda: (scaled(scaled(x), x), free(x), free(x[..., :6])))
    assert not report.norms
    assert "with one tensor, and elsewhere with more arguments" in report.refused["scaled"]
    assert report.refused["free"] == "FreeNorm is called with inputs of 6, 12 features"
    report = identify_norms(net, run=lambda: (scaled(scaled(x)), free(x), free(x[:, 0])))
    assert list(report.members) == ["scaled", "free"], "sequences and pooled values have the same features"


def test_a_class_that_the_model_has_not() -> None:
    net = Net()
    with pytest.raises(SpecError, match="no module of the model is a Missing; its classes are "):
        identify_norms(net, run=lambda: net(torch.randn(2, 5, 12)), norm_class="Missing")


def test_norms_with_different_settings() -> None:
    net = nn.Sequential(IBNorm(12), IBNorm(12, 2.0), nn.Conv1d(5, 8, 1), IBNorm(12), nn.Flatten())
    report = identify_norms(net, run=lambda: net(torch.randn(2, 5, 12)))
    assert [i.lambd for i in report.norms.values()] == [4.0, 2.0, 4.0]
    assert [i.weight for i in report.norms.values()] == [net[0].w, net[1].w, net[3].w]


def test_images() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), IBN2d(8))
    report = identify_norms(net, run=lambda: net(torch.randn(2, 3, 30, 20)))
    assert report.norms["2"].spec is not None
    assert report.norms["2"].spec.axis == 1
    assert report.stock == {"1": "BatchNorm2d"}


def test_what_is_no_member_is_named_and_what_cannot_run_is_refused() -> None:
    class DropNorm(Base):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(self.affine(x))

    net = nn.Sequential(made(OTHERS["RMSNorm"].forward)(), IBNorm(16), DropNorm())
    report = identify_norms(net, run=lambda: net(torch.randn(2, 16)))
    assert not report.passed
    assert list(report.members) == ["1"]
    assert report.norms["0"].kind == "RMSNorm"
    assert "two results for the same input" in report.refused["2"]
    text = str(report)
    assert "0: no mean is subtracted" in text
    assert text.splitlines()[0].split() == ["path", "class", "kind", "lambda", "epsilon", "grouping", "residual"]
    assert report.to_dict()["norms"]["1"]["lambda"] == 4.0
    assert report._repr_html_().startswith("<pre>path")


def test_a_model_without_norms() -> None:
    net = nn.Linear(3, 3)
    report = identify_norms(net, run=lambda: net(torch.randn(2, 3)))
    assert not report
    assert str(report) == "The model has no norm."


def test_equal_norms_are_confirmed_and_not_searched_again(monkeypatch: pytest.MonkeyPatch) -> None:
    searches = []

    def counted(form: fitting.Form, compression: str, **more: Any) -> fitting.Fit:
        searches.append(compression)
        return fitting.fit(form, compression, **more)

    monkeypatch.setattr(formulas, "fit", counted)
    net = nn.Sequential(*[IBNorm(16) for _ in range(4)])
    assert identify_norms(net, run=lambda: net(torch.randn(2, 16))).passed
    assert searches == ["S", "L"]


def test_equal_norms_that_are_no_members_are_confirmed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    searches = []

    def counted(form: fitting.Form, compression: str, **more: Any) -> fitting.Fit:
        searches.append(form.name)
        return fitting.fit(form, compression, **more)

    monkeypatch.setattr(formulas, "fit", counted)
    kind = type(made(OTHERS["RMSNorm"].forward)())
    nets = [nn.Sequential(*[kind() for _ in range(count)]) for count in (1, 4)]
    counts = []
    for net in nets:
        searches.clear()
        report = identify_norms(net, run=lambda net=net: net(torch.randn(2, 16)))  # type: ignore[misc]  # bound early
        assert {i.kind for i in report.norms.values()} == {"RMSNorm"}
        counts.append(len(searches))
    assert counts[0] == counts[1]
