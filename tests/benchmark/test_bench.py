"""`bench` on exported files: what it accepts, what it compares with, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer

import ibnorm_export
from ibnorm_export import ExportOptions, VerifyOptions, models
from ibnorm_export.artifacts.axes import BATCH
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.benchmark.baseline import REFERENCE_LOAD, baseline_of
from ibnorm_export.benchmark.bench import bench
from ibnorm_export.benchmark.generation import bench_generation
from ibnorm_export.benchmark.options import BenchOptions, GenerationOptions, Timing
from ibnorm_export.benchmark.report import BenchReport
from ibnorm_export.cli.bench import _sizes
from ibnorm_export.errors import ExportError, IBNormError, ModelFileError
from ibnorm_export.runtimes.runner import Kernels

QUICK = BenchOptions(threads=1, rounds=2, timing=Timing(repeats=1, warmup_ms=0.0, rest_ms=0.0))


def test_a_path_and_an_exported_model_give_the_same_measurement(exported_llama: ExportedModel) -> None:
    for given in (exported_llama, exported_llama.path, str(exported_llama.path)):
        report = bench(given, options=replace(QUICK, sizes={"sequence": 4}))
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


def test_a_size_of_an_axis_that_is_not_there_is_refused(
    exported_vit: ExportedModel, exported_llama: ExportedModel
) -> None:
    """It was left out, and the file was measured at another size."""
    with pytest.raises(
        IBNormError, match=r"have no axis 'sequence_length'; the sizes of these can be given: batch_size$"
    ):
        bench(exported_vit, options=replace(QUICK, sizes={"sequence": 4}))
    message = r"have no axis 'sequence_lenght'; .*: batch_size, .*; did you mean sequence_length\?"
    with pytest.raises(IBNormError, match=message):
        bench(exported_llama, options=replace(QUICK, sizes={"sequence_lenght": 4}))
    with pytest.raises(IBNormError, match="sizes has two sizes of batch_size, 2 and 8: give one"):
        replace(QUICK, sizes={"batch": 2, "batch_size": 8})
    with pytest.raises(ExportError, match="sizes has two sizes of batch_size, 2 and 8: give one"):
        ExportOptions(shape={"batch": 2, "batch_size": 8})
    with pytest.raises(
        IBNormError, match=r"--prompts and --batches .* do not apply to .*, which is measured by one pass"
    ):
        bench(exported_vit, options=replace(QUICK, generation=GenerationOptions((8,))))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (replace(QUICK, sizes={"batch": 2}), r"batch_size: sizes \(--batch, --seq, --shape\) do not apply to folder"),
        (replace(QUICK, loading=1), r"loading \(--loading\) does not apply to folder"),
    ],
)
def test_options_for_files_are_refused_where_a_folder_generates_text(options: BenchOptions, message: str) -> None:
    with pytest.raises(IBNormError, match=message):
        bench_generation(Path("folder"), model=None, against=[], options=options)


@pytest.mark.parametrize("config", ["{}", '{"model": 5}', '{"model": {"vocab_size": "65"}}'])
def test_a_folder_that_does_not_state_its_tokens(tmp_path: Path, config: str) -> None:
    (tmp_path / "genai_config.json").write_text(config)
    with pytest.raises(ModelFileError, match=r"genai_config\.json: vocab_size is .*; it must be the number of tokens"):
        bench(tmp_path, options=QUICK)


def test_an_axis_with_two_sizes_on_the_command_line_is_refused() -> None:
    assert _sizes({"time": 3}, batch=2, seq=None) == {"time": 3, BATCH: 2}
    with pytest.raises(typer.BadParameter, match="--batch and --shape both give batch_size: give it once"):
        _sizes({BATCH: 8}, batch=2, seq=None)


def test_what_cannot_be_measured_is_refused_before_the_checkpoint_is_read(
    exported_vit: ExportedModel, tmp_path: Path
) -> None:
    """The checkpoint is not there, and the errors are about what is asked for."""
    missing = tmp_path / "missing"
    with pytest.raises(IBNormError, match="cannot compare with 'abacus'"):
        ibnorm_export.bench(exported_vit, missing, against=["abacus"], options=QUICK)
    with pytest.raises(IBNormError, match="backend reference takes no execution provider"):
        ibnorm_export.bench(exported_vit, missing, options=replace(QUICK, backend="reference", provider="Some"))
    with pytest.raises(IBNormError, match="backend reference takes no execution provider"):
        ibnorm_export.verify(exported_vit, missing, options=VerifyOptions("reference", provider="Some"))


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
