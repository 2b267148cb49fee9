"""Backend ort-cuda: its messages without a GPU, what counts as fused, and, on a GPU, parity and timing."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper

from ibnorm_export import models
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.tensors import DType
from ibnorm_export.benchmark.bench import bench
from ibnorm_export.benchmark.measure import measure
from ibnorm_export.benchmark.options import BenchOptions, Timing
from ibnorm_export.cli import main
from ibnorm_export.exporter.export import ExportOptions, export
from ibnorm_export.runtimes.norm_executions import NormExecution, _executions, copies_next_to
from ibnorm_export.runtimes.ort_cuda import missing_for_cuda, ort
from ibnorm_export.runtimes.runner import NormImplementation
from ibnorm_export.verifier.verify import VerifyOptions, verify

FUSED, FUNCTION = NormImplementation.FUSED, NormImplementation.FUNCTION
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
MISSING = missing_for_cuda(
    ort.get_available_providers(),
    torch.version.cuda,
    devices=torch.cuda.device_count(),
)
needs_gpu = pytest.mark.skipif(bool(MISSING), reason=MISSING)
needs_none = pytest.mark.skipif(not MISSING, reason="this machine has a GPU")


def graph(*nodes: onnx.NodeProto) -> onnx.GraphProto:
    return helper.make_graph(list(nodes), "g", [], [])


NORM = helper.make_node("IBNormL", ["a", "s", "b"], ["y"], name="norm", domain="ai.ibnorm")
KEY = ("norm", "IBNormL")


@pytest.mark.parametrize(
    ("nodes", "count"),
    [
        ([], 0),
        ([helper.make_node("MemcpyToHost", ["x"], ["a"])], 1),
        ([helper.make_node("MemcpyFromHost", ["y"], ["z"])], 1),
        ([helper.make_node("MemcpyFromHost", ["h"], ["s"]), helper.make_node("MemcpyToHost", ["y"], ["z"])], 2),
        ([helper.make_node("MemcpyFromHost", ["x"], ["w"]), helper.make_node("Add", ["w", "w"], ["a"])], 0),
        ([helper.make_node("Add", ["x", "x"], ["a"]), helper.make_node("Relu", ["y"], ["z"])], 0),
    ],
)
def test_copies_next_to_a_norm_are_counted(nodes: list[onnx.NodeProto], count: int) -> None:
    assert copies_next_to(graph(*nodes, NORM), frozenset({KEY})).get(KEY, 0) == count
    other = frozenset({("another", "IBNormL")})
    assert not copies_next_to(graph(*nodes, NORM), other)


def test_a_copy_counts_once_if_several_edges_join_it() -> None:
    copy = helper.make_node("MemcpyFromHost", ["p"], ["s"])
    norm = helper.make_node("IBNormL", ["a", "s", "s"], ["y"], name="norm", domain="ai.ibnorm")
    assert copies_next_to(graph(copy, norm), frozenset({KEY}))[KEY] == 1


@pytest.mark.parametrize(
    ("execution", "words"),
    [
        (NormExecution("m", "IBNormL", implementation=FUSED, provider=CUDA, expected=CUDA), ""),
        (NormExecution("m", "IBNormL", implementation=FUSED, provider=CPU), ""),
        (NormExecution("m", "IBNormL", implementation=FUNCTION, provider="", expected=CUDA), "as a function"),
        (NormExecution("m", "IBNormL", implementation=FUSED, provider=CPU, expected=CUDA), "not on CUDA"),
        (
            NormExecution("m", "IBNormL", implementation=FUSED, provider=CUDA, expected=CUDA, copies=2),
            "2 memory copies",
        ),
    ],
)
def test_what_counts_as_fused(execution: NormExecution, words: str) -> None:
    assert (words in execution.problem) if words else execution.problem == ""


def test_a_profile_of_a_gpu_session(exported_llama: ExportedModel) -> None:
    """A synthetic profile: one norm is fused on the GPU, one on the CPU, one next to a copy; others are expanded."""
    first, second, third, *rest = exported_llama.norms
    events = [
        {"cat": "Node", "name": f"{n.name}_kernel_time", "args": {"op_name": n.op_type, "provider": provider}}
        for n, provider in ((first, CUDA), (second, CPU), (third, CUDA))
    ]
    found = _executions(exported_llama, events, expected=CUDA, copies={(third.name, third.op_type): 1})
    assert [bool(e.problem) for e in found] == [False, True, True] + [True] * len(rest)


@pytest.mark.parametrize(
    ("providers", "torch_cuda", "devices", "words"),
    [
        ([CPU], "13.0", 1, "onnxruntime-gpu"),
        ([CPU], None, 0, r"ibnorm-export[gpu]"),
        ([CUDA, CPU], None, 1, "CPU build"),
        ([CUDA, CPU], "13.0", 0, "nvidia-smi"),
        ([CUDA, CPU], "13.0", 1, ""),
    ],
)
def test_missing_parts_are_named(providers: list[str], torch_cuda: str | None, devices: int, words: str) -> None:
    reason = missing_for_cuda(providers, torch_cuda, devices=devices)
    assert (words in reason and "\n" not in reason) if words else reason == ""


@needs_none
@pytest.mark.parametrize("command", ["verify", "bench"])
def test_without_a_gpu_the_exit_code_is_3(
    command: str,
    exported_llama: ExportedModel,
    llama_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    extra = [str(llama_checkpoint)] if command == "verify" else []
    words = ["ibnorm-export", command, str(exported_llama.path), *extra, "--backend", "ort-cuda"]
    monkeypatch.setattr(sys, "argv", words)
    assert main.main() == 3
    lines = [line for line in capfd.readouterr().err.splitlines() if " s  " not in line]  # steps, on a slow machine
    assert len(lines) == 1
    assert "ort-cuda needs" in lines[0]


def test_a_device_measures_its_own_time() -> None:
    class Device:
        name = "device"

        def run(self, inputs: object) -> object:
            raise AssertionError("run also copies to the host, which must not be timed")

        def timed(self, inputs: object) -> object:
            return lambda: 4.0

    timing = Timing(warmup_ms=0.0)
    report = measure({"device": Device()}, {"x": np.zeros((1, 1), np.float32)}, threads=1, rounds=2, timing=timing)  # type: ignore[dict-item]
    assert report.latencies[0].p50_ms == 4.0


@needs_gpu
@pytest.mark.parametrize("dtype", list(DType))
def test_parity_and_timing_on_a_gpu(llama_checkpoint: Path, tmp_path: Path, dtype: DType) -> None:
    model = models.load(llama_checkpoint)
    exported = export(model, tmp_path / "m.onnx", options=ExportOptions(dtype=dtype))
    report = verify(exported, model, options=VerifyOptions(backend="ort-cuda", require_fused=True))
    assert report, report.findings
    options = BenchOptions("ort-cuda", sizes={"sequence": 8}, threads=1, require_fused=True)
    assert bench(exported, model=model, against=["torch"], options=options)
