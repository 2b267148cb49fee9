"""The float64 reference without a float64 copy of the weights, and sessions that are not open at the same time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ibnorm_export import models
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.float64_parameters import Widened, widened_copy
from ibnorm_export.artifacts.module_copy import copy_module
from ibnorm_export.op.spec import DOMAIN
from ibnorm_export.runtimes import ort as ort_runner
from ibnorm_export.runtimes import registry
from ibnorm_export.runtimes import runner as base
from ibnorm_export.runtimes.runner import Kernels
from ibnorm_export.runtimes.torch import TorchRunner
from ibnorm_export.verifier import comparison as comparison_module
from ibnorm_export.verifier.numeric import norms as norms_module
from ibnorm_export.verifier.verify import VerifyOptions, verify
from tests.support.shared_exports import SharedExports


def doubled(module: nn.Module) -> nn.Module:
    """An ordinary copy in float64."""
    return copy_module(module, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("index", range(4))
def test_results_are_bit_identical_to_those_of_a_float64_copy(checkpoint: Path, index: int, dtype: torch.dtype) -> None:
    model = models.load(checkpoint).converted(dtype)
    plain = doubled(model.module)
    assert model.exact is not None
    model.exact(plain)
    inputs = model.sample(np.random.default_rng(index), index)
    tensors = [torch.from_numpy(a).double() if a.dtype == np.float32 else torch.from_numpy(a) for a in inputs.values()]
    truth = model.in_float64()
    with torch.inference_mode():
        for got, expected in zip(model.entry(truth)(*tensors), model.entry(plain)(*tensors), strict=True):
            assert got.dtype == torch.float64
            assert torch.equal(got, expected)
    stored = dict(model.module.named_parameters())
    for name, parameter in truth.named_parameters():
        assert isinstance(parameter, Widened)
        assert isinstance(parameter, nn.Parameter)
        assert parameter.dtype == torch.float64
        assert parameter.cell[0].data_ptr() == stored[name].data_ptr(), "a copy of it is kept"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_is_bit_identical_too_and_float64_on_top_of_it(checkpoint: Path, dtype: torch.dtype) -> None:
    narrow = models.load(checkpoint).converted(dtype)
    wide, plain = narrow.widened(torch.float32), narrow.converted(torch.float32)
    inputs = narrow.sample(np.random.default_rng(1), 1)
    for mine, expected in ((wide.module, plain.module), (wide.in_float64(), plain.in_float64())):
        run = TorchRunner(narrow, mine).run(inputs)
        for name, array in TorchRunner(narrow, expected).run(inputs).items():
            np.testing.assert_array_equal(run[name], array)
    stored = dict(narrow.module.named_parameters())
    for name, parameter in wide.module.named_parameters():
        assert isinstance(parameter, Widened)
        assert parameter.dtype == torch.float32
        assert parameter.cell[0].data_ptr() == stored[name].data_ptr(), "a copy of it is kept"


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.LSTM(16, 16, 2, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layers(x)[0]
        return result


class Convolutional(nn.Sequential):
    def __init__(self) -> None:
        norms = (nn.BatchNorm1d(7), nn.GroupNorm(7, 7), nn.InstanceNorm1d(7, affine=True))
        super().__init__(nn.Conv1d(7, 7, 3, padding=1), *norms, nn.PReLU())


class Unruly(nn.Module):
    """Parameters that are tied, in a list, read by another module, sliced, and directly in the model."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.second.weight = self.first.weight
        self.kept = [self.first.weight]
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.rows = nn.ParameterList([torch.randn(16), torch.randn(16)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x.to(next(self.parameters()).dtype))) + self.token.expand(len(x), -1, -1)
        x = (x @ self.kept[0].t()) * self.rows[0] + self.rows[1].data
        return nn.functional.linear(x, self.first.weight[:8]) * self.first.weight.detach().sum().item()


class Writing(nn.Module):
    """A module that changes its parameters while it runs, in every way that PyTorch offers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        self.weight.mul_(0.9)
        self.weight.data.div_(3.0)
        self.weight.data = self.weight.data * 0.7
        return x @ self.weight


ZOO: dict[str, Callable[[], nn.Module]] = {
    "encoder": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(16, 16)),
    "recurrent": Recurrent,
    "convolutional": Convolutional,
    "unruly": Unruly,
    "writing": Writing,
}


@pytest.mark.parametrize("name", list(ZOO))
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_models_that_use_their_parameters_in_unusual_ways(name: str, mode: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    module = ZOO[name]().eval().requires_grad_(False)
    before = copy.deepcopy(module.state_dict())
    x = torch.randn(3, 7, 16, dtype=torch.float64)
    plain, wide = doubled(module), widened_copy(module)
    for path, buffer in list(wide.named_buffers()):
        if buffer.is_floating_point():
            owner, _, own = path.rpartition(".")
            wide.get_submodule(owner).register_buffer(own, buffer.double())
    with mode():
        for _ in range(2):  # the second pass reads what the first one has written
            assert torch.equal(wide(x), plain(x))
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())


@pytest.fixture
def most_open(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """The largest number of ONNX Runtime sessions that were open at once, fused and with functions."""
    counts = {"open": 0, "most": 0, "all": 0}

    class Counted(ort_runner.OrtRunner):
        def __init__(self, *args: Any, **more: Any) -> None:
            counts["open"] += 1
            counts["all"] += 1
            counts["most"] = max(counts["most"], counts["open"])
            super().__init__(*args, **more)

        def __del__(self) -> None:
            counts["open"] -= 1

    def opened(backend: str, file: ExportedModel, kernels: Kernels = Kernels.AUTO, **more: Any) -> base.Runner:
        return registry.open_runner(backend, file, kernels=Kernels.FUNCTION, **more)

    def library(backend: str, kernels: Kernels, **more: Any) -> Path | None:
        return None if kernels is Kernels.FUNCTION else Path("kernels.so")

    monkeypatch.setattr(ort_runner, "OrtRunner", Counted)
    monkeypatch.setattr(comparison_module, "open_runner", opened)
    monkeypatch.setattr(comparison_module, "fused_library", library)
    executions = norms_module.norm_executions
    monkeypatch.setattr(
        norms_module,
        "norm_executions",
        lambda file, inputs, **more: executions(file, inputs, **{**more, "library": None}),
    )

    def most() -> int:
        assert counts["all"] > 1
        assert counts["open"] == 0, "a session is still open"
        return counts["most"]

    return most


def wrong(exported: ExportedModel, path: Path) -> ExportedModel:
    """The file with a lambda changed by one percent, so that the levels of the optimiser are compared too."""
    node = next(n for n in exported.proto.graph.node if n.domain == DOMAIN)
    next(a for a in node.attribute if a.name == "lambd").f *= 1.01
    path.write_bytes(exported.proto.SerializeToString())
    return ExportedModel(path)


@pytest.mark.parametrize(("right", "small"), [(True, False), (False, False), (True, True)])
def test_only_one_session_of_a_large_file_is_open_at_a_time(
    llama_checkpoint: Path,
    exports: SharedExports,
    tmp_path: Path,
    most_open: Callable[[], int],
    monkeypatch: pytest.MonkeyPatch,
    right: bool,
    small: bool,
) -> None:
    if not small:
        monkeypatch.setattr(comparison_module, "SMALL_FILE", 0)

    exported = exports("llama", "text-generation")
    if not right:
        exported = wrong(exported, tmp_path / "m.onnx")
    model = models.load(llama_checkpoint, task="text-generation")
    report = verify(exported, model, options=VerifyOptions(samples=2, static=False, layers=True))
    assert bool(report) is right, report.findings
    assert report.numeric is not None
    assert {output.norms for output in report.numeric.outputs} == {"fused", "as functions"}
    assert most_open() == (4 if small else 1), (
        "of a small file: the file and its copy with layer outputs, in two ways each"
    )
