"""`bench` on exported files: what it accepts, what it compares with, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ibnorm_export import models
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.benchmark.baseline import REFERENCE_LOAD, baseline_of
from ibnorm_export.benchmark.bench import bench
from ibnorm_export.benchmark.options import BenchOptions, Timing
from ibnorm_export.benchmark.report import BenchReport
from ibnorm_export.errors import IBNormError
from ibnorm_export.runtimes.runner import Kernels

QUICK = BenchOptions(sizes={"sequence": 4}, threads=1, rounds=2, timing=Timing(repeats=1, warmup_ms=0.0, rest_ms=0.0))


def test_a_path_and_an_exported_model_give_the_same_measurement(exported_llama: ExportedModel) -> None:
    for given in (exported_llama, exported_llama.path, str(exported_llama.path)):
        report = bench(given, options=QUICK)
        assert isinstance(report, BenchReport)
        assert report.passed
        assert report.model == str(exported_llama.path)
        assert report.inputs["input_ids"] == (1, 4)
        assert [latency.name for latency in report.latencies] == ["ort-cpu"]
        assert report.norms


def test_every_kind_of_candidate_is_measured(exported_vit: ExportedModel, vit_checkpoint: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.onnx"
    other.write_bytes(exported_vit.path.read_bytes())
    before = torch.get_num_threads()
    model = models.load(vit_checkpoint)
    report = bench(exported_vit, model=model, against=["torch", "reference", REFERENCE_LOAD, other], options=QUICK)
    assert isinstance(report, BenchReport)
    assert [latency.name for latency in report.latencies] == [
        "ort-cpu",
        "torch",
        "reference",
        REFERENCE_LOAD,
        str(other),
    ]
    assert [ratio.against for ratio in report.ratios] == ["torch", "reference", REFERENCE_LOAD, str(other)]
    assert torch.get_num_threads() == before
    baseline = baseline_of(report)
    assert len(baseline.times_ms) == len(baseline.reference_ms) == 2


def test_an_unknown_candidate_is_named(exported_vit: ExportedModel) -> None:
    with pytest.raises(
        IBNormError, match=r"'abacus': it is neither one of torch, torch\.compile, .* nor an exported file"
    ):
        bench(exported_vit, against=["abacus"], options=QUICK)
    with pytest.raises(IBNormError, match="cannot compare backend ort-cpu with itself"):
        bench(exported_vit, against=["ort-cpu"], options=QUICK)


def test_pytorch_needs_the_checkpoint(exported_vit: ExportedModel) -> None:
    with pytest.raises(IBNormError, match="needs the checkpoint"):
        bench(exported_vit, against=["torch"], options=QUICK)


@pytest.mark.parametrize("values", [{"rounds": 0}, {"threads": 0}])
def test_options_are_checked_before_any_work(values: dict[str, int]) -> None:
    with pytest.raises(IBNormError, match=f"{next(iter(values))} is 0; it must be at least 1"):
        BenchOptions(**values)  # type: ignore[arg-type]  # keywords of one type


def test_a_backend_without_fused_kernels_does_not_ignore_the_option(exported_vit: ExportedModel) -> None:
    with pytest.raises(IBNormError, match="backend reference cannot run the fused kernels"):
        bench(exported_vit, options=BenchOptions("reference", Kernels.FUSED, rounds=1))


def test_loading_is_measured_in_fresh_processes(exported_vit: ExportedModel, tmp_path: Path) -> None:
    report = bench(exported_vit, options=replace(QUICK, loading=1))
    assert isinstance(report, BenchReport)
    assert [(loading.name, loading.prepacked) for loading in report.loading] == [
        ("ort-cpu", True),
        ("ort-cpu, not prepacked", False),
    ]
    for loading in report.loading:
        assert 0.0 < loading.session_ms < 60_000.0
        assert 0.0 < loading.first_pass_ms < 60_000.0
        assert loading.held_mb is None or 0.0 < loading.held_mb <= (loading.peak_mb or 0.0)
        assert loading.name in str(report)
    assert report.to_dict()["loading"][1]["prepacked"] is False
    assert bench(exported_vit, options=QUICK).loading == ()  # type: ignore[union-attr]  # a file has a BenchReport
    with pytest.raises(IBNormError, match="loading can only be measured with backend ort-cpu"):
        bench(exported_vit, options=replace(QUICK, backend="reference", loading=1))
