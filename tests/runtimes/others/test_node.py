"""Backends ort-web and ort-node: numbers, types, time, errors, and the end of the process."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import psutil
import pytest

from ibnorm_export import models
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.metadata import Task
from ibnorm_export.artifacts.random_inputs import draw_inputs
from ibnorm_export.artifacts.tensors import Arrays
from ibnorm_export.benchmark.bench import bench_forward
from ibnorm_export.benchmark.options import BenchOptions, Timing
from ibnorm_export.errors import BackendUnavailable, ModelFileError
from ibnorm_export.exporter.export import ExportOptions, export
from ibnorm_export.generation.sessions import open_sessions
from ibnorm_export.runtimes.node.runner import NodeRunner
from ibnorm_export.runtimes.registry import open_runner
from ibnorm_export.runtimes.runner import Backend, DeviceRunner, Kernels
from ibnorm_export.verifier.verify import VerifyOptions, verify

NPM = Path(__file__).resolve().parents[3] / "build" / "node"

pytestmark = [
    pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed"),
    pytest.mark.skipif(
        not (NPM / "node_modules").is_dir(), reason="the npm packages are not installed: make test-runtimes"
    ),
]
BACKENDS = (Backend.ORT_WEB, Backend.ORT_NODE)
SIZES = {"batch": 2, "batch_size": 2, "sequence": 5, "sequence_length": 5}


def inputs_of(exported: ExportedModel) -> Arrays:
    return draw_inputs(exported, SIZES, seed=0)


@pytest.fixture(scope="module")
def cached_llama(llama_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportedModel:
    model = models.load(llama_checkpoint, task=Task.TEXT_GENERATION)
    return export(model, tmp_path_factory.mktemp("cached") / "out")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_file_verifies(backend: Backend, exported_vit: ExportedModel, vit_checkpoint: Path) -> None:
    options = VerifyOptions(backend, samples=2, npm=NPM)
    report = verify(exported_vit, models.load(vit_checkpoint), options=options)
    assert report, str(report)
    assert report.numeric is not None and report.numeric.backend == backend


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cache_passes_through(backend: Backend, cached_llama: ExportedModel) -> None:
    """int64 tokens, masks and positions, and a tensor for the keys and values of each layer, also of no tokens."""
    runner = open_runner(backend, cached_llama, threads=1, npm=NPM)
    here = open_runner("ort-cpu", cached_llama, threads=1, kernels=Kernels.FUNCTION)
    for past in (0, 3):
        sizes = {"past": past, "total": past + 5, "past_sequence_length": past, "total_sequence_length": past + 5}
        inputs = draw_inputs(cached_llama, {**SIZES, **sizes}, seed=0)
        found, expected = runner.run(inputs), here.run(inputs)
        assert list(found) == list(expected)
        for name, array in expected.items():
            assert (found[name].shape, found[name].dtype) == (array.shape, array.dtype)
            # two sums of at most 64 products in float32, which may differ in every rounding
            np.testing.assert_allclose(found[name], array, rtol=0, atol=64 * 2**-23 * np.abs(array).max())


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_writes_the_same_text(backend: Backend, cached_llama: ExportedModel) -> None:
    prompt = np.arange(5, dtype=np.int64)[None]
    found = []
    for source in (
        open_sessions(cached_llama.path.parent, backend=backend, npm=NPM),
        open_sessions(cached_llama.path.parent, Kernels.FUNCTION),
    ):
        session = source.start(1, 16)
        session.feed(prompt)
        found.append([int(session.step()[0]) for _ in range(8)])
    assert found[0] == found[1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_and_external_data(backend: Backend, vit_checkpoint: Path, tmp_path: Path) -> None:
    exported = export(models.load(vit_checkpoint), tmp_path / "vit.onnx", options=ExportOptions("fp16"))
    inputs = inputs_of(exported)
    expected = open_runner("ort-cpu", exported, kernels=Kernels.FUNCTION).run(inputs)["logits"]
    # sizes of external data are at least 1024 bytes by default
    onnx.save(onnx.load(exported.path), tmp_path / "a.onnx", save_as_external_data=True, location="a.data")
    moved = ExportedModel(tmp_path / "a.onnx")
    assert moved.external_files
    found = open_runner(backend, moved, npm=NPM).run(inputs)["logits"]
    assert found.dtype == expected.dtype == np.float16
    # the same arithmetic in float32, rounded to float16 between nodes
    np.testing.assert_allclose(found, expected, rtol=0, atol=2**-8 * float(np.abs(expected).max()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_booleans_pass_through(backend: Backend, tmp_path: Path) -> None:
    graph = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 18]> g (bool[n] a, double[n] b) => (bool[n] c, double[n] d) '
        "{ c = Not(a) d = Add(b, b) }"
    )
    onnx.save(graph, tmp_path / "m.onnx")
    runner = open_runner(backend, ExportedModel(tmp_path / "m.onnx"), npm=NPM)
    found = runner.run({"a": np.array([True, False, True]), "b": np.array([1.0, 1e-300, -0.5])})
    assert found["c"].tolist() == [False, True, False]
    assert found["d"].tolist() == [2.0, 2e-300, -1.0]


def test_bench_measures_the_pass_alone(exported_vit: ExportedModel) -> None:
    runner = open_runner("ort-node", exported_vit, npm=NPM)
    assert isinstance(runner, DeviceRunner)
    options = BenchOptions("ort-node", rounds=2, threads=1, npm=NPM, timing=Timing(warmup_ms=1.0, rest_ms=0.0))
    report = bench_forward(exported_vit, against=["ort-web", "ort-cpu"], options=options)
    assert [latency.name for latency in report.latencies] == ["ort-node", "ort-web", "ort-cpu"]
    assert all(latency.p50_ms > 0.0 for latency in report.latencies)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_that_it_refuses_is_a_clear_error(backend: Backend, tmp_path: Path) -> None:
    graph = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 18, "x" : 1]> g (float[n] a) => (float[n] b) { b = x.Unheard(a) }'
    )
    onnx.save(graph, tmp_path / "m.onnx")
    with pytest.raises(ModelFileError, match=r"onnxruntime-\w+ [\d.]+ cannot load it: .*Unheard.*--for web"):
        open_runner(backend, ExportedModel(tmp_path / "m.onnx"), npm=NPM)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_failed_pass_leaves_the_runner_usable(backend: Backend, exported_vit: ExportedModel) -> None:
    runner = open_runner(backend, exported_vit, npm=NPM)
    with pytest.raises(ModelFileError, match="cannot run the model: "):
        runner.run({"pixel_values": np.zeros((1, 1, 9, 8), np.float32)})
    assert runner.run({"pixel_values": np.zeros((1, 1, 8, 8), np.float32)})["logits"].shape == (1, 10)


def test_the_process_ends_with_the_runner(exported_vit: ExportedModel) -> None:
    runner = NodeRunner(Backend.ORT_NODE, exported_vit, npm=NPM)
    process = runner._process
    assert process.poll() is None
    del runner
    assert process.poll() == 0


def test_a_process_that_dies_is_reported(exported_vit: ExportedModel) -> None:
    runner = NodeRunner(Backend.ORT_NODE, exported_vit, npm=NPM)
    runner._process.kill()
    with pytest.raises(BackendUnavailable, match="the process of Node ended with code -9"):
        runner.run(inputs_of(exported_vit))


def test_the_process_ends_where_its_parent_is_killed(exported_vit: ExportedModel, tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from ibnorm_export.artifacts.exported_model import ExportedModel\n"
        "from ibnorm_export.runtimes.registry import open_runner\n"
        f"runner = open_runner('ort-node', ExportedModel({str(exported_vit.path)!r}), npm=Path({str(NPM)!r}))\n"
        "print('open', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == b"open\n"
        children = psutil.Process(parent.pid).children()
        assert [child.name() for child in children] == ["node"]
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
    gone, alive = psutil.wait_procs(children, timeout=120)  # only one that hangs takes as long
    assert len(gone) == 1 and not alive


def test_a_damaged_package_is_a_clear_error(exported_vit: ExportedModel, tmp_path: Path) -> None:
    package = tmp_path / "node_modules" / "onnxruntime-node"
    package.mkdir(parents=True)
    (package / "package.json").write_text('{"version": "9.9.9", "main": "gone.js"}', encoding="utf-8")
    start = time.monotonic()
    with pytest.raises(ModelFileError, match=r"onnxruntime-node 9\.9\.9 cannot load it: Cannot find module"):
        open_runner("ort-node", exported_vit, npm=tmp_path)
    assert time.monotonic() - start < 120, "only one that hangs takes as long"
