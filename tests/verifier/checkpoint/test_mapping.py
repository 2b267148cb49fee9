"""The user's own norm class is the truth: a wrong reading of it fails, whatever the file does."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ibnorm_export import DType, ExportOptions, IBNormSpec, LoadedModel, export, models, verify
from ibnorm_export.artifacts.module_copy import copy_module
from ibnorm_export.op.torch_op import IBNorm
from ibnorm_export.progress import silent
from ibnorm_export.verifier.checkpoint.reference import Reference
from ibnorm_export.verifier.html import sections
from ibnorm_export.verifier.report import MappingReport, ParityReport

#: A stranger's code: norms written from the paper, in their own way.
CODE = """
import torch
from torch import nn

from ibnorm_export.models import CustomModel, InputSpec


class Divide(nn.Module):
    def __init__(self, size, lam=4.0, eps=1e-3):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))
        self.lam, self.eps = lam, eps

    def squash(self, r):
        return torch.log1p(r / self.lam)

    def forward(self, x):
        d = x - x.mean(-1, keepdim=True)
        c = d.sign() * self.squash(d.abs())
        c = c - c.mean(-1, keepdim=True)
        return self.weight * c / torch.sqrt((c * c).mean(-1, keepdim=True) + self.eps) + self.bias


class UnitSlope(Divide):
    def squash(self, r):
        return self.lam * torch.log1p(r / self.lam)


class Multiply(Divide):
    def squash(self, r):
        return torch.log1p(r * self.lam) / self.lam


class Outer(Divide):
    def squash(self, r):
        return torch.log1p(r) / self.lam


class InPlace(Divide):
    def forward(self, x):
        x = x.sub_(x.mean(-1, keepdim=True))
        c = x.sign() * self.squash(x.abs())
        return nn.functional.layer_norm(c, c.shape[-1:], self.weight, self.bias, self.eps)


class ByMatmul(Divide):
    def forward(self, x):
        d = x - (x @ torch.ones_like(x[0])[:, None]) / x.shape[-1]
        c = d.sign() * self.squash(d.abs())
        return nn.functional.layer_norm(c, c.shape[-1:], self.weight, self.bias, self.eps)


class Autocast(Divide):  # computes in float32 whatever its input is, as many training codes do
    def forward(self, x):
        return super().forward(x.float()).to(x.dtype)


class Net(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.first, self.norm = nn.Linear(6, 16), norm(16)
        self.second, self.last = nn.Linear(16, 16), norm(16)

    def forward(self, x):
        return self.last(self.second(self.norm(self.first(x))))


def of(norm):
    def build():
        torch.manual_seed(0)
        net = Net(norm)
        for parameter in net.parameters():
            nn.init.normal_(parameter)
        return CustomModel(net, inputs=(InputSpec("x", ("batch", 6), True),), outputs=("y",))
    return build


divide, unit_slope, multiply, outer = of(Divide), of(UnitSlope), of(Multiply), of(Outer)
in_place, by_matmul, autocast = of(InPlace), of(ByMatmul), of(Autocast)
"""

#: The stranger's class of each factory.
CLASSES = {
    "divide": "Divide",
    "unit_slope": "UnitSlope",
    "multiply": "Multiply",
    "outer": "Outer",
    "in_place": "InPlace",
    "by_matmul": "ByMatmul",
    "autocast": "Autocast",
}


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., LoadedModel]]:
    """Load the stranger's model, and read its norms as `spec`, right or wrong, past the check of adapters."""
    (tmp_path / "strange.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    importlib.invalidate_caches()

    def load(factory: str, spec: IBNormSpec) -> LoadedModel:
        code = importlib.import_module("strange")
        original = getattr(code, factory)().module
        torch.save(original.state_dict(), "w.pt")
        model = models.load("w.pt", model=f"strange:{factory}")
        module = copy_module(model.module)
        for path in ("norm", "last"):
            own = module.get_submodule(path)
            new = IBNorm(16, spec)
            new.weight, new.bias = own.weight, own.bias
            module.set_submodule(path, new.requires_grad_(False))
        return replace(model, module=module)

    yield load
    sys.modules.pop("strange", None)


def reading(convention: str, lambd: float = 4.0, epsilon: float = 1e-3) -> IBNormSpec:
    return IBNormSpec.from_convention("L", lambd, epsilon=epsilon, convention=convention)


def verified(model: LoadedModel, **options: str) -> ParityReport:
    return verify(export(model, "m.onnx", options=ExportOptions(**options)), model)  # type: ignore[arg-type]


def measured(model: LoadedModel) -> MappingReport:
    """The mapping on two samples; nothing is exported."""
    inputs = tuple(model.sample(np.random.default_rng(0), index) for index in range(2))
    mapping = Reference(model, DType.FP32, inputs=inputs, progress=silent).mapping
    assert mapping is not None
    return mapping


@pytest.mark.parametrize("code", ["divide", "unit_slope", "multiply", "outer", "autocast"])
def test_the_right_reading_agrees_to_rounding(stranger: Callable[..., LoadedModel], code: str) -> None:
    mapping = measured(stranger(code, reading("divide" if code == "autocast" else code)))
    assert mapping, mapping.findings
    assert [norm.module for norm in mapping.norms] == ["norm", "last"]
    assert max(norm.error for norm in mapping.norms) < 1e-14
    assert mapping.error < 1e-13


@pytest.mark.parametrize(
    ("code", "read"),
    [
        ("divide", reading("divide", 2.0)),
        ("divide", reading("divide", 4.0000004)),
        ("divide", reading("divide", epsilon=1e-1)),
        *[(a, reading(b)) for a in list(CLASSES)[:4] for b in list(CLASSES)[:4] if a != b],
    ],
)
def test_a_wrong_reading_fails_and_names_the_norm(
    stranger: Callable[..., LoadedModel], code: str, read: IBNormSpec
) -> None:
    first, last = measured(stranger(code, read)).findings
    assert (first.where, last.where) == ("mapping of norm norm", "mapping of norm last")
    assert CLASSES[code] in first.what
    assert f"lambda {read.lambd:.6g}" in first.what


def test_a_report_fails_with_the_mapping(stranger: Callable[..., LoadedModel]) -> None:
    """The file computes exactly what its checkpoint's module does, and that is not the user's norm."""
    report = verified(stranger("divide", reading("divide", 2.0)))
    assert not report
    assert report.static
    assert report.numeric is not None
    attribution = report.numeric.attribution
    assert attribution is not None
    assert [source.name for source in attribution.sources if source.responsible] == ["mapping"]
    assert [finding.where for finding in report.findings][:3] == [
        "mapping of norm norm",
        "mapping of norm last",
        "output y",
    ]
    # The baseline has the same wrong norms, and must not widen the tolerance of the outputs.
    assert all(output.tolerance < 1e-5 for output in report.numeric.outputs)
    assert "mapping: 2 norms of your own classes" in str(report)
    (section,) = [section for section in sections(report) if section.title == "Your own norms"]
    assert [row[0] for row in section.rows] == ["norm", "last"]


def test_half_precision_is_held_to_the_users_class_too(stranger: Callable[..., LoadedModel]) -> None:
    report = verified(stranger("divide", reading("divide")), dtype="fp16")
    assert report, report.findings
    assert report.numeric is not None
    assert report.numeric.attribution is not None
    assert report.numeric.attribution.sources[0].name == "mapping"


def test_a_norm_that_writes_to_its_input_is_measured_on_what_reached_it(stranger: Callable[..., LoadedModel]) -> None:
    mapping = measured(stranger("in_place", reading("divide")))
    assert mapping, mapping.findings


@pytest.mark.parametrize(("lambd", "right"), [(4.0 / 3, True), (4.0, False)])
def test_hooks_of_the_users_code_belong_to_the_norm(
    stranger: Callable[..., LoadedModel], lambd: float, right: bool
) -> None:
    """A hook that multiplies what reaches a norm changes its lambda, and one that multiplies its output its scale."""
    model = stranger("divide", reading("divide", lambd))
    assert model.original is not None
    for path in ("norm", "last"):
        norm = model.original.get_submodule(path)
        norm.register_forward_pre_hook(lambda _norm, inputs: (3 * inputs[0],))
        norm.register_forward_hook(lambda _norm, _inputs, output: 2 * output)
        replacement = model.module.get_submodule(path)
        replacement.weight, replacement.bias = (
            torch.nn.Parameter(2 * tensor, requires_grad=False) for tensor in (replacement.weight, replacement.bias)
        )
    mapping = measured(model)
    assert bool(mapping) is right, mapping.findings
    assert [norm.passed for norm in mapping.norms] == [right, right]
    assert max(norm.tolerance for norm in mapping.norms) < 1e-10


def test_the_original_shares_the_weights_and_keeps_its_classes(stranger: Callable[..., LoadedModel]) -> None:
    model = stranger("divide", reading("divide"))
    assert model.original is not None
    assert type(model.original.norm).__name__ == "Divide"
    assert type(model.module.norm).__name__ == "IBNorm"
    original, module = dict(model.original.named_parameters()), dict(model.module.named_parameters())
    assert {name: p.data_ptr() for name, p in original.items()} == {name: p.data_ptr() for name, p in module.items()}


@pytest.mark.parametrize(("lambd", "right"), [(4.0, True), (3.9, False)])
def test_nearly_constant_rows_are_judged_by_their_rounding(
    stranger: Callable[..., LoadedModel], lambd: float, right: bool
) -> None:
    """Rows of 1e6 with a standard deviation of 1e-2, and another order of summation: the error is above 1e-12."""
    model = stranger("by_matmul", reading("divide", lambd, epsilon=1e-9))
    assert model.original is not None
    for norm in (model.original.norm, model.original.last):
        norm.eps = 1e-9
    with torch.no_grad():
        model.module.first.weight.mul_(1e-2)
        model.module.first.bias.fill_(1e6 / 3)
    mapping = measured(model)
    assert mapping.norms[0].error > 1e-12
    assert bool(mapping) is right, mapping.findings
