"""Bandwidth of the CUDA kernels, against a copy on the same GPU.

Needs a GPU, nvcc and a CUDA build of torch.

The kernels are compiled for this GPU into a library and called through ctypes with torch's pointers and stream. A CUDA
graph holds `--calls` launches. They rotate over enough buffers that no row is still in the L2 cache when its turn comes
again. CUDA events time whole replays. Kernel and copy take turns. The copy is `Tensor.copy_` over rotating buffers of
the same size: it reads and writes as many bytes as it is counted for.

Bytes for each element: x read and y written, 2 * size (plain); x and skip read, y and sum written, 4 * size (skip).
Scale and bias (2 * cols elements, which every row reads from the cache) are not counted.
"""

from __future__ import annotations

import argparse
import ctypes
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.report import Report
from benchmarks.rows import Figure, Row, Target, Unavailable
from benchmarks.suites.cuda_static import compile_library
from benchmarks.turns import take_turns
from ibnorm_export.op import reference
from ibnorm_export.op.spec import Compression, IBNormSpec

__all__ = [
    "DTYPES",
    "SHIM",
    "Timing",
    "add_options",
    "add_timing_options",
    "bandwidth",
    "bytes_per_element",
    "launch",
    "load_kernels",
    "measure",
    "missing",
    "open_kernels",
    "timing_of",
]

#: Bandwidth over a copy's, for half types from 16384 rows of 1024 to 8192 columns.
MIN_RATIO = 0.90
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_NUMBERS = list(DTYPES.values())
_COMPRESSIONS = list(Compression)
#: Relative error in norm above which a result is wrong.
_LARGEST_ERROR = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}

#: `Problem` and `run` have C++ linkage; this is the C face that ctypes can call.
SHIM = """
#include "ibnorm/kernels.h"
extern "C" __attribute__((visibility("default"))) int op_cuda_run(
    void** pointers, long long rows, long long cols, int type, int affine_type, int compression, float lambd,
    float epsilon, void* stream) {
  ibnorm::Problem problem;
  problem.x = pointers[0];
  problem.skip = pointers[1];
  problem.scale = pointers[2];
  problem.bias = pointers[3];
  problem.y = pointers[4];
  problem.sum = pointers[5];
  problem.rows = rows;
  problem.cols = cols;
  problem.type = static_cast<ibnorm::DType>(type);
  problem.affine_type = static_cast<ibnorm::DType>(affine_type);
  problem.compression = static_cast<ibnorm::Compression>(compression);
  problem.lambd = lambd;
  problem.epsilon = epsilon;
  return static_cast<int>(ibnorm::cuda::run(problem, stream));
}
"""


@dataclass(frozen=True, slots=True)
class Timing:
    """How kernel and copy are timed.

    Args:
        calls: launches in a CUDA graph.
        replays: replays between two events.
        rounds: turns of kernel and copy.
    """

    calls: int = 20
    replays: int = 5
    rounds: int = 15


def add_timing_options(parser: argparse.ArgumentParser) -> None:
    """Add an option for each field of `Timing`."""
    parser.add_argument("--calls", type=int, default=20, help="Launches in a CUDA graph (%(default)s).")
    parser.add_argument("--replays", type=int, default=5, help="Replays between two events (%(default)s).")
    parser.add_argument("--rounds", type=int, default=15, help="Turns of kernel and copy (%(default)s).")


def timing_of(options: argparse.Namespace) -> Timing:
    """What `add_timing_options` has read."""
    return Timing(options.calls, options.replays, options.rounds)


def bytes_per_element(dtype: str, *, skip: bool) -> int:
    """Bytes that one element moves; the module's docstring has the formula."""
    return DTYPES[dtype].itemsize * (4 if skip else 2)


def _graph(launch: Callable[[int], None], calls: int) -> torch.cuda.CUDAGraph:
    """`calls` launches, the i-th on buffers i; captured after one ordinary run."""
    launch(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            launch(i)
    graph.replay()
    torch.cuda.synchronize()
    return graph


def _replay_s(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    """Seconds of one replay, by CUDA events around several."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / replays


def launch(
    library: Any,
    inputs: Sequence[torch.Tensor],  # x, and skip if there is one, each (rows, cols)
    *,
    scale: torch.Tensor,  # (cols,)
    bias: torch.Tensor,  # (cols,)
    outputs: Sequence[torch.Tensor],  # y, and sum if there is a skip, each (rows, cols)
    spec: IBNormSpec,
    stream: int | None,
) -> None:
    """Enqueue one problem of contiguous rows.

    Raises:
        RuntimeError: the kernels refuse it.
    """
    rows, cols = inputs[0].shape
    x, skip, y, total = inputs[0], inputs[1:], outputs[0], outputs[1:]
    pointers = (ctypes.c_void_p * 6)(
        x.data_ptr(),
        skip[0].data_ptr() if skip else None,
        scale.data_ptr(),
        bias.data_ptr(),
        y.data_ptr(),
        total[0].data_ptr() if total else None,
    )
    status = library.op_cuda_run(
        pointers,
        rows,
        cols,
        _NUMBERS.index(x.dtype),
        _NUMBERS.index(scale.dtype),
        _COMPRESSIONS.index(spec.compression),
        spec.lambd,
        spec.epsilon,
        stream,
    )
    if status != 0:
        raise RuntimeError(f"the kernel returned status {status} for {x.dtype} ({rows}, {cols})")


class _Buffers:
    """Inputs and outputs that rotate: at least four times the L2 cache passes before a buffer is used again."""

    def __init__(self, shape: tuple[int, int], kind: torch.dtype, *, skip: bool) -> None:
        arrays = 2 if skip else 1
        set_bytes = 2 * arrays * shape[0] * shape[1] * kind.itemsize
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        self.sets = []
        for _ in range(max(2, -(-4 * cache // set_bytes) + 1)):
            inputs = [torch.randn(*shape, device="cuda", dtype=kind) for _ in range(arrays)]
            self.sets.append((inputs, [torch.empty_like(inputs[0]) for _ in range(arrays)]))

    def __getitem__(self, i: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        return self.sets[i % len(self.sets)]

    def copy(self, i: int) -> None:
        for source, target in zip(*self[i], strict=True):
            target.copy_(source)


def _error(
    inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor], *, scale: Any, bias: Any, spec: IBNormSpec
) -> float:
    """Relative error in norm of the first rows; infinity if the sum is not the exact one."""
    total = (outputs[1:] or inputs)[0][:64].double().cpu().numpy()
    expected = reference.ibnorm(total, scale.double().cpu().numpy(), bias=bias.double().cpu().numpy(), spec=spec)
    if outputs[1:] and not torch.equal(outputs[1], inputs[0] + inputs[1]):
        return float("inf")
    return float(np.linalg.norm(outputs[0][:64].double().cpu().numpy() - expected) / np.linalg.norm(expected))


def bandwidth(library: Any, dtype: str, *, spec: IBNormSpec, skip: bool, shape: tuple[int, int], timing: Timing) -> Row:
    """Bandwidth of one kernel over a copy's, and whether its result is right."""
    torch.manual_seed(0)
    (rows, cols), kind = shape, DTYPES[dtype]
    buffers = _Buffers(shape, kind, skip=skip)
    scale = torch.normal(1.0, 0.2, (cols,), device="cuda").to(kind)
    bias = torch.normal(0.0, 0.2, (cols,), device="cuda").to(kind)

    def kernel(i: int) -> None:
        inputs, outputs = buffers[i]
        stream = torch.cuda.current_stream().cuda_stream
        launch(library, inputs, scale=scale, bias=bias, outputs=outputs, spec=spec, stream=stream)

    graphs = {"kernel": _graph(kernel, timing.calls), "copy": _graph(buffers.copy, timing.calls)}
    candidates = {name: lambda g=graph: _replay_s(g, timing.replays) for name, graph in graphs.items()}
    times = take_turns(candidates, rounds=timing.rounds, rest_s=0.0)  # no thread of the host runs between turns
    kernel_s, copy_s = (float(np.median(times[name])) / timing.calls for name in ("kernel", "copy"))

    kernel(0)
    torch.cuda.synchronize()
    counted = rows * cols * bytes_per_element(dtype, skip=skip)
    figures = {
        "bandwidth over copy": Figure(round(copy_s / kernel_s, 4)),
        "kernel": Figure(round(kernel_s * 1e6, 2), "us"),
        "bandwidth": Figure(round(counted / kernel_s / 1e9, 1), "GB/s"),
        "copy": Figure(round(counted / copy_s / 1e9, 1), "GB/s"),
        "error": Figure(_error(*buffers[0], scale=scale, bias=bias, spec=spec)),
    }
    targets = [Target("error", _LARGEST_ERROR[dtype])]
    if dtype != "float32" and rows >= 16384 and 1024 <= cols <= 8192:
        targets.append(Target("bandwidth over copy", MIN_RATIO, at_least=True))
    form = "skip" if skip else "plain"
    return Row(f"{dtype} {spec.compression.value} {form} {rows} x {cols}", figures, targets=tuple(targets))


def missing() -> str | None:
    """Why this machine cannot run the suite; None if it can."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA; install a CUDA build of torch"
    if not torch.cuda.is_available():
        return "no GPU: torch.cuda.is_available() is false"
    return None


def load_kernels(architecture: str, folder: Path, *, kernels: tuple[Path, ...] = ()) -> Any:
    """The kernels, compiled for one architecture, with a function that ctypes can call.

    Args:
        architecture: sm_90 and the like.
        folder: receives the library.
        kernels: objects of the kernels that are there already.

    Raises:
        ToolMissingError: nvcc is not installed.
    """
    shim = folder / "shim.cu"
    shim.write_text(SHIM)
    compile_library((architecture,), folder, extra=(shim,), kernels=kernels)
    return open_kernels(folder / "libkernels.so")


def open_kernels(file: Path) -> Any:
    """Open a library that was compiled with `SHIM`."""
    library = ctypes.CDLL(str(file))
    wide, integer, real, pointer = ctypes.c_longlong, ctypes.c_int, ctypes.c_float, ctypes.c_void_p
    library.op_cuda_run.argtypes = [pointer, wide, wide, integer, integer, integer, real, real, pointer]
    return library


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, default=16384, help="Rows of each tensor (%(default)s).")
    parser.add_argument("--cols", type=int, nargs="+", default=[1024, 2048, 4096, 8192], help="Columns.")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["bfloat16", "float16", "float32"])
    add_timing_options(parser)


def measure(options: argparse.Namespace, report: Report) -> None:
    """Measure the table."""
    if why := missing():
        raise Unavailable(why)
    report.facts |= {
        "bytes": "for each element: 2 * size (plain), 4 * size (skip)",
        "device": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "options": {key: value for key, value in vars(options).items() if key not in ("json", "record")},
    }
    with tempfile.TemporaryDirectory() as name:
        library = load_kernels("sm_{}{}".format(*torch.cuda.get_device_capability()), Path(name))
    for dtype in options.dtype:
        for cols in options.cols:
            for kind in Compression:
                for skip in (False, True):
                    shape, timing = (options.rows, cols), timing_of(options)
                    report.add(bandwidth(library, dtype, spec=IBNormSpec(kind), skip=skip, shape=shape, timing=timing))
