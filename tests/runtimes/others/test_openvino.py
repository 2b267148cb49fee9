"""Backend openvino: numbers, precision, functions, external data, and files that it cannot take."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx.helper
import onnx.inliner
import openvino
import pytest

from ibnorm_export import models
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.random_inputs import draw_inputs
from ibnorm_export.benchmark.bench import bench_forward
from ibnorm_export.benchmark.options import BenchOptions, Timing
from ibnorm_export.errors import ModelFileError
from ibnorm_export.exporter.export import ExportOptions, export
from ibnorm_export.runtimes.openvino import OpenVinoRunner, settings
from ibnorm_export.runtimes.registry import open_runner
from ibnorm_export.verifier.verify import VerifyOptions, verify


@pytest.fixture(scope="module")
def half_llama(llama_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportedModel:
    target = tmp_path_factory.mktemp("half") / "llama.onnx"
    return export(models.load(llama_checkpoint), target, options=ExportOptions("fp16"))


@pytest.mark.parametrize("family", ["llama", "vit"])
def test_a_file_with_functions_verifies(family: str, request: pytest.FixtureRequest) -> None:
    exported = request.getfixturevalue(f"exported_{family}")
    assert exported.proto.functions
    model = models.load(request.getfixturevalue(f"{family}_checkpoint"))
    report = verify(exported, model, options=VerifyOptions("openvino", samples=2))
    assert report, str(report)
    assert report.numeric is not None and report.numeric.backend == "openvino"


def test_a_half_precision_file_verifies_in_every_form(half_llama: ExportedModel, llama_checkpoint: Path) -> None:
    """Rounded after every node, and without rounding; OpenVINO also opens the file itself."""
    report = verify(half_llama, models.load(llama_checkpoint), options=VerifyOptions("openvino", samples=2))
    assert report, str(report)
    assert report.numeric is not None and report.numeric.exact is not None
    assert report.numeric.exact.outputs


def test_the_precision_does_not_depend_on_the_processor(half_llama: ExportedModel) -> None:
    """With AMX or AVX-512, OpenVINO's own default is bfloat16."""
    inlined = onnx.inliner.inline_local_functions(onnx.load(half_llama.path))
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(inlined.SerializeToString()), "CPU", settings(2))
    assert compiled.get_property("INFERENCE_PRECISION_HINT") == openvino.Type.f32
    assert compiled.get_property("INFERENCE_NUM_THREADS") == 2
    assert compiled.get_property("NUM_STREAMS") == 1


def test_bfloat16_outputs_are_float32(vit_checkpoint: Path, tmp_path: Path) -> None:
    exported = export(models.load(vit_checkpoint), tmp_path / "vit.onnx", options=ExportOptions("bf16"))
    inputs = draw_inputs(exported, {"batch": 2, "batch_size": 2}, seed=0)
    logits = open_runner("openvino", exported).run(inputs)["logits"]
    expected = open_runner("reference", exported).run(inputs)["logits"].astype(np.float32)
    assert logits.dtype == np.float32
    # bfloat16 has 8 bits: each of a few tens of nodes rounds by up to 2**-9 of its values
    assert np.abs(logits - expected).max() <= 0.1 * np.abs(expected).max()


def test_external_data_is_read(exported_llama: ExportedModel, tmp_path: Path) -> None:
    onnx.save(onnx.load(exported_llama.path), tmp_path / "a.onnx", save_as_external_data=True, location="a.data")
    onnx.load(tmp_path / "a.onnx")
    exported = ExportedModel(tmp_path / "a.onnx")
    assert exported.external_files and exported.proto.functions
    inputs = draw_inputs(exported, {"batch": 2, "sequence": 5, "batch_size": 2, "sequence_length": 5}, seed=0)
    runner = OpenVinoRunner(exported, 1)
    shutil.rmtree(tmp_path)
    expected = OpenVinoRunner(exported_llama, 1).run(inputs)["logits"]
    np.testing.assert_array_equal(runner.run(inputs)["logits"], expected)


def test_bench_measures_it_beside_torch(exported_vit: ExportedModel, vit_checkpoint: Path) -> None:
    options = BenchOptions("openvino", rounds=2, threads=1, timing=Timing(warmup_ms=1.0, rest_ms=0.0))
    report = bench_forward(exported_vit, model=models.load(vit_checkpoint), against=["torch"], options=options)
    assert [latency.name for latency in report.latencies] == ["openvino", "torch"]
    assert all(latency.p50_ms > 0.0 for latency in report.latencies)


def test_an_operator_that_it_lacks_is_named(exported_vit: ExportedModel, tmp_path: Path) -> None:
    proto = onnx.load(exported_vit.path)
    node = onnx.helper.make_node("Unheard", ["logits"], ["louder"], domain="elsewhere")
    proto.graph.node.append(node)
    proto.opset_import.append(onnx.helper.make_opsetid("elsewhere", 1))
    proto.graph.output[0].name = "louder"
    onnx.save(proto, tmp_path / "m.onnx")
    with pytest.raises(ModelFileError, match=r"OpenVINO .* cannot load it: .*elsewhere\.Unheard.*--for openvino"):
        open_runner("openvino", ExportedModel(tmp_path / "m.onnx"))


def test_inputs_of_another_shape_are_refused(exported_vit: ExportedModel) -> None:
    with pytest.raises(ModelFileError, match="OpenVINO cannot run the model: "):
        OpenVinoRunner(exported_vit, 1).run({"pixel_values": np.zeros((1, 1, 9, 8), np.float32)})
