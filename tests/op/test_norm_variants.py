"""Norms over channels, over several axes and with running statistics, and which norms they replace."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from ibnorm_export import IBNorm, IBNormSpec, NormConfig, replace_norms
from ibnorm_export.artifacts.module_copy import cast_buffers
from ibnorm_export.errors import SpecError
from ibnorm_export.op import reference
from ibnorm_export.op.norm_variants import (
    AxesIBNorm,
    BatchIBNorm,
    ChannelIBNorm,
    ChannelLayerNorm,
    ChannelRMSNorm,
    FeatureBatchNorm,
)
from ibnorm_export.op.replace_norms import is_norm

KINDS = ("S", "L", "T")
GENERATOR = torch.Generator().manual_seed(0)


def section(**more: object) -> NormConfig:
    return NormConfig.from_config({"compression": "L", "lambda": 2.0, "epsilon": 1e-5, "convention": "divide", **more})


def images(mean: float = 0.0) -> torch.Tensor:
    return torch.randn((4, 6, 5, 3), generator=GENERATOR, dtype=torch.float64) * 3 + mean


def random_affine(norm: nn.Module) -> None:
    for parameter in norm.parameters():
        nn.init.normal_(parameter, 1.0, 0.3, GENERATOR)


@pytest.mark.parametrize("kind", KINDS)
def test_a_channel_norm_normalises_every_position(kind: str) -> None:
    spec = IBNormSpec(kind, 2.0)  # type: ignore[arg-type]
    norm = ChannelIBNorm(6, spec, dtype=torch.float64)
    random_affine(norm)
    x = images()
    assert norm.weight is not None
    assert norm.bias is not None
    weight, bias = norm.weight.detach().numpy(), norm.bias.detach().numpy()
    # float64 on both sides here and below: 1e-12 is thousands of units in the last place of values to about 4
    exact = reference.ibnorm(x.numpy().transpose(0, 2, 3, 1), weight, bias=bias, spec=spec).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(norm(x).detach().numpy(), exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("axis", [1, 2, -2])
def test_an_axes_norm_normalises_all_axes_from_the_given_one(axis: int) -> None:
    spec = IBNormSpec("L", 2.0, grouping="axes", axis=axis)  # type: ignore[arg-type]
    norm = AxesIBNorm(6, spec, channel_axis=1, dtype=torch.float64)
    random_affine(norm)
    x = images(mean=5.0)
    assert norm.weight is not None
    assert norm.bias is not None
    rows = x.flatten(axis).numpy()
    normed = reference.ibnorm(rows, None, bias=None, spec=IBNormSpec("L", 2.0)).reshape(x.shape)  # type: ignore[arg-type]
    weight, bias = (p.detach().numpy()[:, None, None] for p in (norm.weight, norm.bias))
    np.testing.assert_allclose(norm(x).detach().numpy(), normed * weight + bias, rtol=0, atol=1e-12)


def test_an_axes_norm_needs_grouping_axes_and_a_batch_axis() -> None:
    for spec in (IBNormSpec("L", grouping="axes", axis=0), IBNormSpec("L")):  # type: ignore[arg-type]
        with pytest.raises(SpecError, match="axes"):
            AxesIBNorm(6, spec, channel_axis=1)
    with pytest.raises(SpecError, match="batch"):
        BatchIBNorm(6, IBNormSpec("L"), channel_axis=1)  # type: ignore[arg-type]


def batch_norm(kind: str) -> BatchIBNorm:
    norm = BatchIBNorm(6, IBNormSpec(kind, 2.0, grouping="batch"), channel_axis=1, dtype=torch.float64)  # type: ignore[arg-type]
    random_affine(norm)
    for buffer, mean in ((norm.running_mean, 4.0), (norm.compressed_mean, 0.1), (norm.compressed_var, 2.0)):
        buffer.copy_(mean + 0.1 * torch.rand(6, generator=GENERATOR, dtype=torch.float64))
    return norm.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_inference_with_running_statistics_is_elementwise(kind: str) -> None:
    """Compared with the definition in NumPy, channel by channel."""
    norm, x = batch_norm(kind), images(mean=4.0)
    g = {"S": lambda t: t, "L": lambda t: np.sign(t) * np.log1p(np.abs(t)), "T": np.tanh}[kind]
    assert norm.weight is not None
    assert norm.bias is not None
    expected = np.empty(x.shape)
    for channel in range(6):
        mean, c_mean, c_var, weight, bias = (
            float(v.detach()[channel])
            for v in (norm.running_mean, norm.compressed_mean, norm.compressed_var, norm.weight, norm.bias)
        )
        c = g((x[:, channel].numpy() - mean) / 2.0)
        expected[:, channel] = weight * (c - c_mean) / np.sqrt(c_var + 1e-5) + bias
    np.testing.assert_allclose(norm(x).detach().numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_inference_equals_training_on_the_batch_of_the_statistics(kind: str) -> None:
    norm, x = batch_norm(kind), images(mean=4.0)
    norm.momentum = 1.0
    trained = norm.train()(x)
    np.testing.assert_allclose(norm.eval()(x).detach(), trained.detach(), rtol=0, atol=1e-12)
    assert abs(float(trained.detach().numpy()[:, 0].mean()) - float(norm.bias.detach()[0])) < 1e-12  # type: ignore[index]


def test_training_updates_statistics_by_a_tenth_and_has_gradients() -> None:
    norm, x = batch_norm("L"), images(mean=4.0)
    before = norm.running_mean.clone()
    norm.train()(x).square().sum().backward()
    torch.testing.assert_close(norm.running_mean, before + 0.1 * (x.mean((0, 2, 3)) - before))
    assert norm.weight is not None
    assert norm.weight.grad is not None
    assert bool((norm.weight.grad != 0).all())


def test_the_exported_logarithm_is_accurate_for_small_values(monkeypatch: pytest.MonkeyPatch) -> None:
    norm = BatchIBNorm(6, IBNormSpec("L", 4.0, epsilon=0.0, grouping="batch"), channel_axis=1).eval()  # type: ignore[arg-type]
    x = (torch.randn((4, 6, 50), generator=GENERATOR) * 1e-5).contiguous()
    norm.compressed_var.fill_(1e-12)
    exact = copy.deepcopy(norm).double()(x.double())
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    error = ((norm(x).double() - exact).norm() / exact.norm()).detach()
    assert float(error) < 1e-6


def test_running_statistics_of_features_on_the_last_axis() -> None:
    x = torch.randn((4, 7, 6), generator=GENERATOR)
    spec = IBNormSpec("T", grouping="batch")  # type: ignore[arg-type]
    last, first = BatchIBNorm(6, spec, channel_axis=-1), BatchIBNorm(6, spec, channel_axis=1)
    torch.testing.assert_close(last(x), first(x.movedim(-1, 1)).movedim(1, -1))
    assert bool((last.running_mean != 0).all())
    torch.testing.assert_close(FeatureBatchNorm(6)(x), nn.BatchNorm1d(6)(x.reshape(-1, 6)).reshape(x.shape))


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.first = nn.BatchNorm2d(6)
        self.deep = nn.BatchNorm2d(6)
        self.head = nn.LayerNorm(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.deep(self.first(self.conv(x))).mean((2, 3)))
        return result


@pytest.mark.parametrize(
    ("config", "first", "deep", "head"),
    [
        (section(), ChannelIBNorm, ChannelIBNorm, IBNorm),
        (section(grouping="batch"), BatchIBNorm, BatchIBNorm, BatchIBNorm),
        (section(layers=[{"match": "deep", "norm": "layernorm"}]), ChannelIBNorm, ChannelLayerNorm, IBNorm),
        (section(layers=[{"match": "*", "norm": "rmsnorm"}]), ChannelRMSNorm, ChannelRMSNorm, nn.RMSNorm),
        (section(layers=[{"match": "*", "norm": "batchnorm"}]), nn.BatchNorm2d, nn.BatchNorm2d, FeatureBatchNorm),
        (
            section(layers=[{"match": "first", "grouping": "axes", "axis": 1}]),
            AxesIBNorm,
            ChannelIBNorm,
            IBNorm,
        ),
    ],
)
def test_a_new_norm_has_its_features_on_the_axis_of_the_old_one(
    config: NormConfig, first: type[nn.Module], deep: type[nn.Module], head: type[nn.Module]
) -> None:
    model = Convolutional()
    replace_norms(model, config)
    assert (type(model.first), type(model.deep), type(model.head)) == (first, deep, head)
    assert all(is_norm(module) for module in (model.first, model.deep, model.head))
    assert model(torch.randn((2, 3, 8, 8), generator=GENERATOR)).shape == (2, 6)


def test_a_batchnorm_keeps_its_running_statistics() -> None:
    model = Convolutional()
    model.first.running_mean.fill_(3.0)  # type: ignore[union-attr]
    for config in (section(layers=[{"match": "*", "norm": "batchnorm"}]), section(grouping="batch")):
        replaced = replace_norms(copy.deepcopy(model), config)["first"]
        assert float(replaced.running_mean[0]) == 3.0  # type: ignore[index]


def test_without_affine_there_are_no_parameters() -> None:
    for grouping, axis in (("last", -1), ("axes", 1), ("batch", -1)):
        model = Convolutional()
        replace_norms(model, section(scale=False, bias=False, grouping=grouping, axis=axis))
        assert not [*model.first.parameters(), *model.deep.parameters()]


def test_a_buffer_that_is_a_view_becomes_a_new_tensor() -> None:
    """Weights that are read from a file are views; torch.export rejects a half tensor whose base is float."""
    norm = nn.BatchNorm2d(4)
    norm.running_mean = torch.zeros(8)[:4]
    cast_buffers(norm, torch.float16)
    assert norm.running_mean.dtype == torch.float16
    assert norm.running_mean._base is None
