"""Bandwidth of the CUDA kernels beside what a copy reaches on the same GPU.

    python -m benchmarks.suites.op_cuda                                    # 16384 rows, the table of the bar
    python -m benchmarks.suites.op_cuda --json benchmarks/results/op_cuda.json

Needs a GPU, nvcc and a CUDA build of torch; exits 3 with one line where one is missing.

Protocol: the kernels are compiled for this GPU into a library and called through ctypes with torch's
pointers and stream. A CUDA graph holds `--calls` launches, which rotate over enough buffers that no
row is still in the L2 cache when its turn comes again; CUDA events time whole replays. Kernel and copy
take turns, and the medians of the rounds are compared. The copy is `Tensor.copy_` over rotating buffers
of the same size: it reads and writes as many bytes as it is counted for.

Bytes per element: x read and y written, 2 * size (plain); x and skip read, y and sum written, 4 * size
(skip). Scale and bias (2 * cols elements, read by every row from cache) are not counted.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.suites.cuda_static import ToolMissingError, compile_library
from ibnorm_export.op import reference
from ibnorm_export.op.spec import Compression, IBNormSpec

__all__ = [
    "DTYPES",
    "SHIM",
    "Row",
    "bytes_per_element",
    "launch",
    "load_kernels",
    "main",
    "measure",
    "missing",
    "open_kernels",
]

BAR = 0.90
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_NUMBERS = list(DTYPES.values())
_COMPRESSIONS = list(Compression)
#: Relative error in norm past which a result is wrong, not slow.
_SANE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}

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
class Row:
    """One line of the table."""

    dtype: str
    compression: str
    skip: bool
    rows: int
    cols: int
    microseconds: float
    gigabytes_per_s: float
    copy_gigabytes_per_s: float
    error: float
    bar: float | None

    @property
    def ratio(self) -> float:
        return self.gigabytes_per_s / self.copy_gigabytes_per_s

    @property
    def verdict(self) -> str:
        if self.error > _SANE[self.dtype]:
            return "wrong result"
        if self.bar is None:
            return "no bar"
        return "met" if self.ratio >= self.bar else "missed"


def bytes_per_element(dtype: str, skip: bool) -> int:
    """The byte formula of the module's text."""
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


def _replay_ms(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / replays


def launch(
    library: Any,
    inputs: Sequence[torch.Tensor],  # x, and skip where there is one, each (rows, cols)
    scale: torch.Tensor,  # (cols,)
    bias: torch.Tensor,  # (cols,)
    outputs: Sequence[torch.Tensor],  # y, and sum where there is a skip, each (rows, cols)
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


def measure(library: Any, dtype: str, spec: IBNormSpec, skip: bool, rows: int, cols: int, options: Any) -> Row:
    """One line: `options` has calls, replays and rounds as the command line does."""
    torch.manual_seed(0)
    kind = DTYPES[dtype]
    array_bytes = rows * cols * kind.itemsize
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    arrays = 4 if skip else 2
    # At least four times the L2 cache passes before a buffer comes round again.
    buffers = max(2, -(-4 * cache // (arrays * array_bytes)) + 1)
    scale = torch.normal(1.0, 0.2, (cols,), device="cuda").to(kind)
    bias = torch.normal(0.0, 0.2, (cols,), device="cuda").to(kind)
    sets = []
    for _ in range(buffers):
        inputs = [torch.randn(rows, cols, device="cuda", dtype=kind) for _ in range(arrays // 2)]
        sets.append((inputs, [torch.empty_like(inputs[0]) for _ in range(arrays // 2)]))

    def kernel(i: int) -> None:
        inputs, outputs = sets[i % buffers]
        launch(library, inputs, scale, bias, outputs, spec, torch.cuda.current_stream().cuda_stream)

    def copy(i: int) -> None:
        inputs, outputs = sets[i % buffers]
        for source, target in zip(inputs, outputs, strict=True):
            target.copy_(source)

    kernel_graph, copy_graph = _graph(kernel, options.calls), _graph(copy, options.calls)
    for _ in range(3):  # the clocks settle
        _replay_ms(kernel_graph, options.replays)
    times = [
        (_replay_ms(kernel_graph, options.replays), _replay_ms(copy_graph, options.replays))
        for _ in range(options.rounds)
    ]
    kernel_ms, copy_ms = (statistics.median(t) / options.calls for t in zip(*times, strict=True))

    kernel(0)
    torch.cuda.synchronize()
    inputs, outputs = sets[0]
    rows_checked = 64
    x = [i[:rows_checked].double().cpu().numpy() for i in inputs]
    total = outputs[1][:rows_checked].double().cpu().numpy() if skip else x[0]
    expected = reference.ibnorm(total, scale.double().cpu().numpy(), bias=bias.double().cpu().numpy(), spec=spec)
    got = outputs[0][:rows_checked].double().cpu().numpy()
    error = float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
    if skip and not torch.equal(outputs[1], inputs[0] + inputs[1]):
        error = float("inf")
    counted = rows * cols * bytes_per_element(dtype, skip)
    return Row(
        dtype,
        spec.compression.value,
        skip,
        rows,
        cols,
        round(kernel_ms * 1e3, 2),
        round(counted / kernel_ms / 1e6, 1),
        round(counted / copy_ms / 1e6, 1),
        error,
        BAR if dtype != "float32" and rows >= 16384 and 1024 <= cols <= 8192 else None,
    )


def missing() -> str | None:
    """Why this machine cannot run the benchmark."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA; install a CUDA build of torch"
    if not torch.cuda.is_available():
        return "no GPU: torch.cuda.is_available() is false"
    return None


def load_kernels(architecture: str, folder: Path) -> Any:
    """The kernels, compiled for one architecture, with a function that ctypes can call.

    Raises:
        ToolMissingError: nvcc is not installed.
    """
    shim = folder / "shim.cu"
    shim.write_text(SHIM)
    compile_library((architecture,), folder, extra=(shim,))
    return open_kernels(folder / "libkernels.so")


def open_kernels(file: Path) -> Any:
    """A library that `SHIM` went into."""
    library = ctypes.CDLL(str(file))
    wide, integer, real, pointer = ctypes.c_longlong, ctypes.c_int, ctypes.c_float, ctypes.c_void_p
    library.op_cuda_run.argtypes = [pointer, wide, wide, integer, integer, integer, real, real, pointer]
    return library


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, nargs="?", const=Path("-"), help="write the report here, or to the screen")
    parser.add_argument("--rows", type=int, default=16384)
    parser.add_argument("--cols", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["bfloat16", "float16", "float32"])
    parser.add_argument("--calls", type=int, default=20, help="launches in a graph")
    parser.add_argument("--replays", type=int, default=5, help="replays between two events")
    parser.add_argument("--rounds", type=int, default=15, help="turns of kernel and copy")
    options = parser.parse_args()
    if why := missing():
        print(f"op_cuda: {why}", file=sys.stderr)
        return 3
    try:
        with tempfile.TemporaryDirectory() as name:
            library = load_kernels("sm_{}{}".format(*torch.cuda.get_device_capability()), Path(name))
    except ToolMissingError as tool:
        print(f"op_cuda: {tool}", file=sys.stderr)
        return 3
    rows = []
    for dtype in options.dtype:
        for cols in options.cols:
            for compression in Compression:
                for skip in (False, True):
                    row = measure(library, dtype, IBNormSpec(compression), skip, options.rows, cols, options)
                    rows.append(row)
                    print(
                        f"{row.dtype:9} {row.compression} {'skip' if skip else 'plain':5} {row.cols:6} "
                        f"{row.gigabytes_per_s:8.1f} GB/s, copy {row.copy_gigabytes_per_s:8.1f}, "
                        f"ratio {row.ratio:.3f} {row.verdict}",
                        file=sys.stderr,
                        flush=True,
                    )
    properties = torch.cuda.get_device_properties(0)
    report = {
        "what": "bandwidth of the CUDA kernels; bytes per element: 2 * size (plain), 4 * size (skip)",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": properties.name,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "options": {k: v for k, v in vars(options).items() if k != "json"},
        "rows": [{**asdict(r), "ratio": round(r.ratio, 4), "verdict": r.verdict} for r in rows],
    }
    text = json.dumps(report, indent=1) + "\n"
    if options.json == Path("-"):
        print(text, end="")
    elif options.json:
        new = options.json.with_suffix(".new")
        new.write_text(text)
        new.rename(options.json)
    return 1 if any(r.verdict in ("missed", "wrong result") for r in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
