"""Fused kernels in whole models: evidence that they ran, the fallback to functions, and the skip form."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ibnorm_export import IBNormSpec, models
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.tensors import DType
from ibnorm_export.benchmark.bench import bench_forward
from ibnorm_export.benchmark.options import BenchOptions
from ibnorm_export.errors import BackendUnavailable
from ibnorm_export.exporter.export import export
from ibnorm_export.models import CustomModel, InputSpec
from ibnorm_export.op import native
from ibnorm_export.op.spec import Compression
from ibnorm_export.op.torch_op import IBNorm, ibnorm
from ibnorm_export.runtimes.norm_executions import norm_executions
from ibnorm_export.runtimes.registry import open_runner
from ibnorm_export.runtimes.runner import Kernels
from ibnorm_export.verifier.verify import VerifyOptions, verify
from tests.support.shared_exports import SharedExports

needs_library = pytest.mark.skipif(
    not native.availability(), reason=f"fused kernels cannot be used here: {native.availability().problem}"
)


@pytest.fixture(scope="module", params=["llama", "vit"])
def family(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture(scope="module")
def pair(
    family: str, exports: SharedExports, llama_checkpoint: Path, vit_checkpoint: Path
) -> tuple[Path, ExportedModel]:
    """A checkpoint and its export with the residual additions fused."""
    return {"llama": llama_checkpoint, "vit": vit_checkpoint}[family], exports(family)


@pytest.fixture(scope="module")
def plain(family: str, exports: SharedExports) -> ExportedModel:
    """The export with the residual additions as nodes."""
    return exports(family, fuse_skip=False)


def test_residual_additions_become_skip_forms(pair: tuple[Path, ExportedModel], plain: ExportedModel) -> None:
    checkpoint, fused = pair
    skips = [n for n in fused.norms if n.op_type.startswith("Skip")]
    assert len(fused.norms) == len(plain.norms) == 5
    assert [n.module for n in fused.norms] == [n.module for n in plain.norms]
    # the first norm has no residual before it, and the last one's sum is used nowhere else
    assert [n.module for n in skips] == [n.module for n in plain.norms[1:-1]]
    assert fused.operators["Add"] == plain.operators["Add"] - len(skips) if "Add" in fused.operators else True
    assert {f.name for f in fused.proto.functions} == {n.op_type for n in fused.norms}
    assert verify(fused, models.load(checkpoint), options=VerifyOptions(kernels=Kernels.FUNCTION))
    assert verify(fused, models.load(checkpoint), options=VerifyOptions(backend="reference", samples=2))


@pytest.mark.parametrize("kernels", [Kernels.FUNCTION, pytest.param(Kernels.FUSED, marks=needs_library)])
def test_the_skip_form_is_bit_identical(
    pair: tuple[Path, ExportedModel], plain: ExportedModel, kernels: Kernels
) -> None:
    checkpoint, fused = pair
    model = models.load(checkpoint)
    for index in range(4):
        inputs = model.sample(np.random.default_rng(index), index)
        a = open_runner("ort-cpu", plain, kernels=kernels).run(inputs)["logits"]
        b = open_runner("ort-cpu", fused, kernels=kernels).run(inputs)["logits"]
        if kernels is Kernels.FUSED:
            np.testing.assert_array_equal(a, b)
        else:  # the runtime may fuse Add into LayerNormalization's neighbours differently
            assert np.linalg.norm(a - b) <= 1e-6 * np.linalg.norm(a)


class Scaled(IBNorm):
    """A norm whose scale is computed from its input, so that it is not known when the model is exported."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight is not None
        return ibnorm(x, self.weight + x[0], bias=self.bias, spec=self.spec)


class Residual(nn.Module):
    """Two residual additions, each followed by a norm; the scale of the first norm is computed."""

    def __init__(self) -> None:
        super().__init__()
        spec = IBNormSpec(Compression("L"), 4.0, epsilon=1e-5)
        self.computed, self.stored, self.last = Scaled(16, spec), IBNorm(16, spec), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        first = x + self.last(x)
        second = first + self.last(self.computed(first))
        third: Tensor = second + self.last(self.stored(second))
        return third


def residual() -> CustomModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return CustomModel(Residual(), (InputSpec("x", ("batch", 16), floating=True),), outputs=("y",))


def test_a_norm_with_a_computed_scale_keeps_its_addition(tmp_path: Path) -> None:
    """The skip form would take the addition's place, where the scale has not been computed yet."""
    torch.save(residual().module.state_dict(), tmp_path / "w.pt")
    model = models.load(tmp_path / "w.pt", model=f"{__name__}:residual")
    exported = export(model, tmp_path / "m.onnx")
    assert [(n.module, n.op_type) for n in exported.norms] == [("computed", "IBNormL"), ("stored", "SkipIBNormL")]
    report = verify(exported, model, options=VerifyOptions(static=False))
    assert report, report.findings


@needs_library
def test_every_norm_is_reported_as_fused(pair: tuple[Path, ExportedModel]) -> None:
    checkpoint, fused = pair
    report = verify(fused, models.load(checkpoint), options=VerifyOptions(kernels=Kernels.FUSED, require_fused=True))
    assert report, report.findings
    assert report.numeric is not None
    assert {(n.implementation, n.provider) for n in report.numeric.norms} == {("fused", "CPUExecutionProvider")}
    assert report.numeric.outputs[0].error <= 5e-7


def test_require_fused_fails_if_a_norm_runs_as_a_function(pair: tuple[Path, ExportedModel]) -> None:
    checkpoint, fused = pair
    report = verify(fused, models.load(checkpoint), options=VerifyOptions(kernels=Kernels.FUNCTION, require_fused=True))
    assert not report
    assert len([f for f in report.findings if "ran as a function" in f.what]) == 5
    assert report.numeric is not None
    assert {n.implementation for n in report.numeric.norms} == {"function"}


@needs_library
@pytest.mark.parametrize("dtype", [DType.FP16, DType.BF16])
def test_models_in_half_precision_run_fused(llama_checkpoint: Path, exports: SharedExports, dtype: DType) -> None:
    report = verify(
        exports("llama", dtype=dtype), models.load(llama_checkpoint), options=VerifyOptions(require_fused=True)
    )
    assert report, report.findings


@needs_library
def test_a_benchmark_reports_what_ran(exported_llama: ExportedModel) -> None:
    for kernels, fused in ((Kernels.FUSED, True), (Kernels.FUNCTION, False)):
        options = BenchOptions(kernels=kernels, sizes={"sequence": 8}, threads=1)
        report = bench_forward(exported_llama, options=options)
        assert report.all_fused == fused


def test_requiring_a_missing_library_is_an_error(
    exported_llama: ExportedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "_ORT_NAMES", ("no-such-library.so",))
    with pytest.raises(BackendUnavailable, match="make native"):
        open_runner("ort-cpu", exported_llama, kernels=Kernels.FUSED)
    assert open_runner("ort-cpu", exported_llama, kernels=Kernels.AUTO).name == "ort-cpu"


def test_executions_are_read_from_the_profile(exported_llama: ExportedModel) -> None:
    inputs = {"input_ids": np.ones((1, 3), np.int64), "attention_mask": np.ones((1, 3), np.int64)}
    found = norm_executions(exported_llama, inputs, library=None)
    assert [n.module for n in found] == [n.module for n in exported_llama.norms]
    assert {n.implementation for n in found} == {"function"}
