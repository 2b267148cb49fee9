"""The part `onnxruntime` of gpu_check: one norm in ONNX Runtime, and the latency of each way to run it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch

from benchmarks.suites.gpu_machine import Machine
from benchmarks.suites.gpu_parts import Part, skip_of, tensor, variants
from ibnorm_export.artifacts.tensors import Arrays
from ibnorm_export.benchmark.measure import measure
from ibnorm_export.benchmark.options import Timing
from ibnorm_export.op import native
from ibnorm_export.op.spec import IBNormSpec
from ibnorm_export.runtimes.ort import OrtRunner
from ibnorm_export.runtimes.ort_cuda import OrtCudaRunner, missing_for_cuda
from tests.support import trt_plugin
from tests.support.accuracy import Case, cases
from tests.support.cuda_emulator import DTYPES, judge
from tests.support.one_norm import one_norm

__all__ = ["PluginRunner", "check_onnxruntime"]

_NAMES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_WIDTH = 768
#: Rows and columns: a ViT's batch, a token of a LLaMA, a prompt.
SHAPES = ((8 * 197, 768), (1, 4096), (2048, 4096))


class PluginRunner:
    """The plugin's `enqueue` in a CUDA graph, timed as `OrtCudaRunner` times a session.

    Args:
        machine: a GPU with a plugin library.
        spec, dtype: of the plain norm; scale is one and bias zero.
    """

    name = "plugin"

    def __init__(self, machine: Machine, spec: IBNormSpec, dtype: str) -> None:
        if machine.plugin is None or machine.harness is None:
            raise ValueError(machine.missing)
        self._machine, self._dtype = machine, DTYPES[dtype]
        self._plugin = trt_plugin.Plugin(
            machine.harness, machine.plugin, f"IBNorm{spec.compression.value}", trt_plugin.fields_of(spec)
        )

    def _tensors(self, inputs: Arrays) -> tuple[list[torch.Tensor], torch.Tensor]:
        x = inputs["X"].astype(self._dtype)
        ones = np.ones(x.shape[-1], self._dtype)
        return [self._machine.place(a) for a in (x, ones, 0 * ones)], self._machine.place(np.zeros_like(x))

    def _enqueue(self, inputs: list[torch.Tensor], y: torch.Tensor) -> None:
        if code := self._plugin.enqueue([tensor(t) for t in inputs], [tensor(y)], self._machine.stream):
            raise RuntimeError(f"enqueue returned {code}")

    def run(self, inputs: Arrays) -> Arrays:
        placed, y = self._tensors(inputs)
        self._enqueue(placed, y)
        return {"Y": self._machine.fetch(y)}

    def timed(self, inputs: Arrays) -> Callable[[], float]:
        """See `DeviceRunner`: from an idle device to an idle device, by the host's clock."""
        placed, y = self._tensors(inputs)
        self._enqueue(placed, y)  # a kernel cannot be loaded while a graph is captured
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._enqueue(placed, y)

        def once() -> float:
            torch.cuda.synchronize()
            start = time.perf_counter_ns()
            graph.replay()
            torch.cuda.synchronize()
            return (time.perf_counter_ns() - start) / 1e6

        # The graph reads and writes these: they live as long as it does.
        once.tensors = (*placed, y, graph)  # type: ignore[attr-defined]  # kept alive with the function that uses them
        return once


def _accuracy(part: Part, runner: Any, *, how: str, case: Case, skip: bool) -> None:
    inputs = {"X": case.x[None].astype(np.float32)}
    if skip:
        inputs["skip"] = skip_of(case.x)[0][None].astype(np.float32)
    outputs = {name: value[0].astype(case.x.dtype) for name, value in runner.run(inputs).items()}
    if skip:
        if outputs["sum"].tobytes() != skip_of(case.x)[1].tobytes():
            part.failures.append(f"{how} {case} skip: the sum is not the rounded sum")
        return
    accuracy = judge(outputs["Y"], case.exact, case.scale, case.bias, case.mean)
    part.worst([accuracy], how=how, case=str(case))
    if not accuracy:
        part.failures.append(f"{how} {case}: {accuracy.problem}")


def check_onnxruntime(machine: Machine, library: Path | None) -> Part:
    """One norm as function and fused, within the tolerances; on a GPU, their latency and the plugin's.

    With the emulator, ONNX Runtime's CPU provider takes the GPU's place, and nothing is timed.

    Args:
        machine: what the rest was checked on.
        library: of fused kernels, with those of CUDA if the machine is a GPU.
    """
    if machine.is_gpu and (why := missing_for_cuda(ort.get_available_providers(), torch.version.cuda, devices=1)):
        return Part("onnxruntime", why)
    found = native.inspect(library) if library is not None else native.availability()
    if not found:
        return Part("onnxruntime", str(found))
    if machine.is_gpu and "cuda" not in found.providers:
        return Part("onnxruntime", f"{found.path} holds no CUDA kernels: run `make native-cuda`")
    make = OrtCudaRunner if machine.is_gpu else OrtRunner
    part = Part("onnxruntime")
    with tempfile.TemporaryDirectory() as folder:
        for dtype, kind in variants():
            if not machine.is_gpu and dtype == "bfloat16":
                continue  # ONNX Runtime's Python sessions take no bfloat16 array
            at_rest = [case for case in cases(kind, DTYPES[dtype], (_WIDTH,)) if not case.mean]
            for case in at_rest if machine.is_gpu else at_rest[:1]:
                for skip in (False, True):
                    file = Path(folder) / "norm.onnx"
                    one_norm(file, case.spec, _NAMES[dtype], skip, case.scale, case.bias)
                    for how, kernels in (("function", None), ("fused", found.path)):
                        _accuracy(part, make(file, 1, library=kernels), how=how, case=case, skip=skip)
            if machine.is_gpu and machine.plugin is not None:
                _latency(part, machine, library=found.path, folder=Path(folder), dtype=dtype, spec=IBNormSpec(kind))
    return part


def _latency(part: Part, machine: Machine, *, library: Path | None, folder: Path, dtype: str, spec: IBNormSpec) -> None:
    """Medians of interleaved rounds, each way in a CUDA graph."""
    for rows, cols in SHAPES:
        ones = np.ones(cols)
        model = one_norm(folder / "timed.onnx", spec, _NAMES[dtype], False, ones, 0.0 * ones)
        candidates = {
            "plugin": PluginRunner(machine, spec, dtype),
            "ONNX Runtime, fused": OrtCudaRunner(model.path, 1, library=library),
            "ONNX Runtime, function": OrtCudaRunner(model.path, 1, library=None),
        }
        x = np.random.default_rng(0).standard_normal((1, rows, cols)).astype(np.float32)
        report = measure(candidates, {"X": x}, threads=1, timing=Timing(warmup_ms=200.0))
        part.figures.append(
            {
                "dtype": dtype,
                "compression": spec.compression.value,
                "shape": [rows, cols],
                "p50_ms": {latency.name: latency.p50_ms for latency in report.latencies},
                "p99_ms": {latency.name: latency.p99_ms for latency in report.latencies},
                "plugin_over": {ratio.against: round(ratio.median, 3) for ratio in report.ratios},
            }
        )
