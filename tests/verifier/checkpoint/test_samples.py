"""Inputs that fit the file, and differences that are explained by the inputs or the runtime."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from ibnorm_export.artifacts.covering_inputs import draw_covering_inputs
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.model_limits import ModelLimits, find_limits
from ibnorm_export.artifacts.random_inputs import draw_inputs
from ibnorm_export.artifacts.tensors import Arrays, InputSpec
from ibnorm_export.models.custom import _draw
from ibnorm_export.runtimes.ort import OrtRunner
from ibnorm_export.verifier.numeric.verdict import check_numeric
from ibnorm_export.verifier.outputs import runtime_faults
from ibnorm_export.verifier.verify import VerifyOptions, verify
from tests.support.comparisons import compare_runners
from tests.support.planting import Change, plant


def fix(sizes: dict[str, int]) -> Change:
    def change(proto: onnx.ModelProto) -> None:
        for value in [*proto.graph.input, *proto.graph.output]:
            for dim in value.type.tensor_type.shape.dim:
                if dim.dim_param in sizes:
                    dim.dim_value = sizes[dim.dim_param]

    return change


@pytest.mark.parametrize(
    "sizes", [{"batch_size": 2}, {"sequence_length": 16}, {"batch_size": 1, "sequence_length": 16}], ids=str
)
def test_a_file_of_fixed_sizes_is_run_at_them(
    sizes: dict[str, int], exported_llama: ExportedModel, llama: LoadedModel, tmp_path: Path
) -> None:
    fixed = plant(exported_llama, tmp_path, fix(sizes))
    report = verify(fixed, llama, options=VerifyOptions(static=False, samples=2))
    assert report, report.findings
    assert report.numeric is not None
    ran = "; ".join(report.numeric.ran)
    if "batch_size" in sizes:
        assert f"batch {sizes['batch_size']};" in ran
    if "sequence_length" in sizes:
        assert "sequences of 16 tokens" in ran
    assert any("takes one size only" in note for note in report.notes)


def name_axes_as_earlier(proto: onnx.ModelProto) -> None:
    for value in [*proto.graph.input, *proto.graph.output]:
        for dim in value.type.tensor_type.shape.dim:
            earlier = {"batch_size": "batch", "sequence_length": "sequence"}
            dim.dim_param = earlier.get(dim.dim_param, dim.dim_param)


def test_a_file_with_the_axis_names_of_earlier_versions(
    exported_llama: ExportedModel, llama: LoadedModel, tmp_path: Path
) -> None:
    earlier = plant(exported_llama, tmp_path, name_axes_as_earlier)
    assert earlier.inputs[0].shape == ("batch", "sequence")
    for sizes in ({"batch_size": 2, "sequence_length": 3}, {"batch": 2, "sequence": 3}):
        for file in (earlier, exported_llama):
            assert draw_inputs(file, sizes)["input_ids"].shape == (2, 3)
    report = verify(earlier, llama, options=VerifyOptions(samples=2))
    assert report, report.findings


def test_images_of_a_fixed_batch(exported_vit: ExportedModel, vit: LoadedModel, tmp_path: Path) -> None:
    report = verify(
        plant(exported_vit, tmp_path, fix({"batch_size": 4})), vit, options=VerifyOptions(static=False, samples=2)
    )
    assert report, report.findings
    assert report.numeric is not None
    assert report.numeric.ran[0] == "batch 4"


class Changed:
    """A runner whose results are changed."""

    name = "ort-cpu"

    def __init__(self, runner: OrtRunner, rows: int, value: float) -> None:
        self._runner, self._row, self._value = runner, rows, value

    def run(self, inputs: Arrays) -> Arrays:
        outputs = {name: array.copy() for name, array in self._runner.run(inputs).items()}
        outputs["logits"][self._row] *= np.float32(self._value)
        return outputs


def padded(llama: LoadedModel, zeros: int) -> Arrays:
    """Two rows of 8 tokens, the second with `zeros` masked tokens on the left."""
    ids = np.random.default_rng(0).integers(0, 256, (2, 8), dtype=np.int64)
    mask = np.ones_like(ids)
    mask[1, :zeros] = 0
    return {"input_ids": ids, "attention_mask": mask}


def test_a_difference_in_rows_masked_throughout_is_named(exported_llama: ExportedModel, llama: LoadedModel) -> None:
    everywhere = replace(llama, valid=lambda arrays: {})
    inputs = padded(llama, 8)
    for row, confined in ((1, True), (0, False)):
        runner = Changed(OrtRunner(exported_llama.path), row, 1.5)
        comparison = compare_runners(exported_llama, everywhere, runners={"as functions": runner}, inputs=[inputs])
        report = check_numeric(comparison)
        assert not report
        places = [finding.where for finding in report.findings]
        assert ("masked rows of output logits" in places) == confined
        assert ("error source exporter" in places) != confined


@pytest.mark.parametrize(("version", "known"), [("1.23.2", True), ("1.24.0", False)])
def test_nan_of_a_known_runtime_is_named(
    version: str,
    known: bool,
    exported_llama: ExportedModel,
    llama: LoadedModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runtime_faults, "_version", lambda: version)
    runner = Changed(OrtRunner(exported_llama.path), 1, np.nan)
    comparison = compare_runners(
        exported_llama, llama, runners={"as functions": runner}, inputs=[padded(llama, 3), padded(llama, 0)]
    )
    comparison = replace(comparison, reference=replace(comparison.reference, inputs=comparison.reference.inputs[:1]))
    report = check_numeric(comparison)
    assert not report
    named = [f for f in report.findings if f.where == f"runtime ONNX Runtime {version}"]
    assert bool(named) == known
    assert all("onnxruntime>=1.24" in finding.what for finding in named)
    assert any(f.where.startswith("error source") for f in report.findings) != known


def test_random_masks_mask_no_row_throughout() -> None:
    specs = (InputSpec("ids", ("b", "s"), floating=False), InputSpec("attention_mask", ("b", "s"), floating=False))
    for index in range(4):
        mask = _draw(specs, np.random.default_rng(index), index=index)["attention_mask"]
        assert mask.any(1).all()


def test_covering_inputs_hold_every_id_and_stay_within_memory(llama: LoadedModel) -> None:
    drawn = [llama.sample(np.random.default_rng(0), 0)]
    limits = find_limits(llama, inputs=drawn[0])
    assert limits == ModelLimits({"input_ids": 256}, 64)
    rng = np.random.default_rng(0)
    covering = draw_covering_inputs(llama, rng, limits=limits, fixed={}, drawn=drawn)
    seen = [a["input_ids"][a["attention_mask"] != 0] for a in covering.samples.values()]
    assert set(np.concatenate(seen).tolist()) == set(range(256))
    assert covering.left_out == ()
    for arrays in covering.samples.values():
        assert (arrays["attention_mask"] != 0).any(1).all()
    long = draw_covering_inputs(llama, rng, limits=ModelLimits({"input_ids": 9}, 10**6), fixed={}, drawn=drawn)
    assert long.samples["the longest sequence"]["input_ids"].shape == (1, 4096)
    assert long.left_out == ("lengths above 4096 of 1000000 tokens: they take too much memory",)
