"""The fused operator in ONNX Runtime on the CPU, beside LayerNormalization and the memory's bandwidth.

    python -m benchmarks.suites.op_cpu --json

Every ratio is of medians of interleaved runs (ours, theirs, ours, ...) on one global pool of two
threads, inputs and outputs bound to fixed 64-byte-aligned buffers, and of five passes over the table
the median one; all five stand beside it. The baseline runs on the same
shape in float32: LayerNormalization, or Add + LayerNormalization for the skip form
(SkipLayerNormalization is recorded beside it).

Bytes: the fewest that any implementation moves, each tensor once: x and y (8 bytes per float32
element), and for the skip form x, skip, sum and y (16 bytes).

Physical limit: a row cannot take less than its bytes over the bandwidth of a two-thread streaming
copy, which is measured in the same run; `floor_ms` is that time. Tensors within the last-level
cache (25 MB at 8 x 512 x 768) can beat it, the 537 MB of 8 x 4096 x 2048 cannot. The small rows
are bound by the runtime's cost per node, the same on both sides.
"""

from __future__ import annotations

import ctypes
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort

from benchmarks import publish
from ibnorm_export.op import native
from ibnorm_export.op import onnx_functions as onnx_op
from ibnorm_export.op.spec import Compression, IBNormSpec

THREADS = 2
PASSES = 5  # apart in time: a neighbour on the machine stays for seconds
OPSET = 20
BUILD = Path(__file__).resolve().parents[2] / "build" / "native"
TYPES = {
    "float32": (onnx.TensorProto.FLOAT, np.dtype(np.float32)),
    "float16": (onnx.TensorProto.FLOAT16, np.dtype(np.float16)),
    "bfloat16": (onnx.TensorProto.BFLOAT16, np.dtype(ml_dtypes.bfloat16)),
}
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Row:
    """One comparison: true when it meets its bar."""

    case: str
    measure: str
    value: float
    bar: float
    at_most: bool
    ours_ms: float
    theirs_ms: float | None
    gigabytes_per_s: float
    copy_gigabytes_per_s: float
    floor_ms: float
    note: str = ""
    passes: tuple[float, ...] = ()

    def __bool__(self) -> bool:
        return self.value <= self.bar if self.at_most else self.value >= self.bar

    def __str__(self) -> str:
        sign = "<=" if self.at_most else ">="
        return (
            f"{'met   ' if self else 'MISSED'} {self.case:44} {self.measure} {self.value:.3f} ({sign} {self.bar:.2f})  "
            f"[{min(self.passes):.3f} to {max(self.passes):.3f}]  {self.ours_ms:.3f} ms, floor {self.floor_ms:.3f}; "
            f"{self.gigabytes_per_s:.1f} GB/s, copy {self.copy_gigabytes_per_s:.1f}  {self.note}"
        )

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": "met" if self else "missed"}


def aligned(shape: tuple[int, ...], dtype: np.dtype[Any], alignment: int = 64) -> Array:
    size = int(np.prod(shape)) * dtype.itemsize
    room = np.zeros(size + alignment, np.uint8)
    start = -room.ctypes.data % alignment
    return room[start : start + size].view(dtype).reshape(shape)


class Bound:
    """A session on one graph whose inputs and outputs stay in place."""

    def __init__(self, model: onnx.ModelProto, library: Path | None, x: dict[str, Array]) -> None:
        options = ort.SessionOptions()
        options.use_per_session_threads = False
        if library is not None:
            options.register_custom_ops_library(str(library))
        self._session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        self._binding = self._session.io_binding()
        self._keep = dict(x)
        for value in model.graph.input:
            code, array = value.type.tensor_type.elem_type, x[value.name]
            self._binding.bind_input(value.name, "cpu", 0, code, array.shape, array.ctypes.data)
        for value in model.graph.output:
            code = value.type.tensor_type.elem_type
            dtype = next(d for c, d in TYPES.values() if c == code)
            array = self._keep[value.name] = aligned(next(iter(x.values())).shape, dtype)
            self._binding.bind_output(value.name, "cpu", 0, code, array.shape, array.ctypes.data)

    def __call__(self) -> None:
        self._session.run_with_iobinding(self._binding)


def graph(
    nodes: list[onnx.NodeProto], shape: tuple[int, ...], dtype: str, inputs: list[str], outputs: list[str]
) -> onnx.ModelProto:
    code, numpy_type = TYPES[dtype]
    rng = np.random.default_rng(1)
    affine = {"scale": 1 + 0.1 * rng.standard_normal(shape[-1]), "bias": 0.1 * rng.standard_normal(shape[-1])}
    constants = [
        onnx.helper.make_tensor(name, code, [shape[-1]], values.astype(numpy_type).tobytes(), raw=True)
        for name, values in affine.items()
    ]
    info = onnx.helper.make_tensor_value_info
    made = onnx.helper.make_graph(
        nodes, "op", [info(i, code, shape) for i in inputs], [info(o, code, shape) for o in outputs], constants
    )
    return onnx.helper.make_model(
        made,
        opset_imports=[*onnx_op.opset_imports(OPSET), onnx.helper.make_opsetid("com.microsoft", 1)],
        ir_version=10,
    )


def layer_norm(x: str, y: str) -> onnx.NodeProto:
    return onnx.helper.make_node("LayerNormalization", [x, "scale", "bias"], [y], axis=-1, epsilon=1e-5)


def plain(spec: IBNormSpec | None, shape: tuple[int, ...], dtype: str, chain: int) -> onnx.ModelProto:
    """`chain` norms one after another: IBNorm with a spec, LayerNormalization without."""
    names = ["x", *(f"v{i}" for i in range(1, chain)), "y"]
    nodes = [
        layer_norm(a, b) if spec is None else onnx_op.node(a, "scale", bias="bias", y=b, spec=spec, name=f"norm_{b}")
        for a, b in itertools.pairwise(names)
    ]
    return graph(nodes, shape, dtype, ["x"], ["y"])


def skip(spec: IBNormSpec | None, shape: tuple[int, ...], microsoft: bool = False) -> onnx.ModelProto:
    """Residual form: ours with a spec, else Add + LayerNormalization or Microsoft's fused node."""
    if spec is not None:
        nodes = [onnx_op.skip_node("x", "skip", scale="scale", bias="bias", y="y", total="sum", spec=spec, name="norm")]
    elif microsoft:
        nodes = [
            onnx.helper.make_node(
                "SkipLayerNormalization",
                ["x", "skip", "scale", "bias"],
                ["y", "", "", "sum"],
                domain="com.microsoft",
                epsilon=1e-5,
            )
        ]
    else:
        nodes = [onnx.helper.make_node("Add", ["x", "skip"], ["sum"]), layer_norm("sum", "y")]
    return graph(nodes, shape, "float32", ["x", "skip"], ["y", "sum"])


def interleaved(runs: list[Callable[[], None]], repeats: int) -> list[float]:
    """Median seconds of each, measured in turns so that a slow second hits all alike."""
    for run in runs:
        for _ in range(3):
            run()
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for run, taken in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            taken.append(time.perf_counter() - start)
    return [statistics.median(t) for t in times]


class Bench:
    def __init__(self, library: Path, copy: ctypes.CDLL, quick: bool) -> None:
        self._library = library
        self._scale = 0.2 if quick else 1.0
        self._copy = copy
        self._copy.ibnorm_test_copy.restype = ctypes.c_double
        self._copy_gb = self.copy_bandwidth(1 << 26)

    def copy_bandwidth(self, count: int, source: Array | None = None, target: Array | None = None) -> float:
        a = aligned((count,), np.dtype(np.float32)) if source is None else source
        b = aligned((count,), np.dtype(np.float32)) if target is None else target
        if source is None:
            a[:] = 1
        times = [
            self._copy.ibnorm_test_copy(
                ctypes.c_void_p(b.ctypes.data), ctypes.c_void_p(a.ctypes.data), ctypes.c_int64(count), THREADS
            )
            for _ in range(7)
        ]
        return float(8 * count / statistics.median(times[1:]) / 1e9)

    def _times(
        self, models: list[tuple[onnx.ModelProto, bool, str]], shape: tuple[int, ...], repeats: int
    ) -> list[float]:
        rng = np.random.default_rng(3)
        bound = []
        for model, ours, dtype in models:
            inputs = {}
            for value in model.graph.input:
                inputs[value.name] = aligned(shape, TYPES[dtype][1])
                inputs[value.name][...] = rng.standard_normal(shape, dtype=np.float32)
            bound.append(Bound(model, self._library if ours else None, inputs))
        return interleaved([*bound], max(7, int(repeats * self._scale)))

    def _row(self, case: str, bar: float, ours: float, theirs: float, size: float, note: str = "") -> Row:
        return Row(
            case=case,
            measure="time over baseline",
            value=round(ours / theirs, 3),
            bar=bar,
            at_most=True,
            ours_ms=round(ours * 1e3, 4),
            theirs_ms=round(theirs * 1e3, 4),
            gigabytes_per_s=round(size / ours / 1e9, 2),
            copy_gigabytes_per_s=round(self._copy_gb, 2),
            floor_ms=round(size / self._copy_gb / 1e6, 4),
            note=note,
        )

    def plain_rows(self, shape: tuple[int, ...], dtype: str, bar: float, repeats: int, chain: int = 1) -> list[Row]:
        models = [(plain(IBNormSpec(kind), shape, dtype, chain), True, dtype) for kind in Compression]
        models.append((plain(None, shape, "float32", chain), False, "float32"))
        *ours, theirs = self._times(models, shape, repeats)
        size = 2 * float(np.prod(shape)) * TYPES[dtype][1].itemsize * chain
        times = f" x {chain} nodes" if chain > 1 else ""
        return [
            self._row(f"IBNorm{kind} {dtype} {shape}{times}", bar, t, theirs, size)
            for kind, t in zip(Compression, ours, strict=True)
        ]

    def skip_rows(self, shape: tuple[int, ...], bar: float, repeats: int) -> list[Row]:
        models = [(skip(IBNormSpec(kind), shape), True, "float32") for kind in Compression]
        models += [(skip(None, shape), False, "float32"), (skip(None, shape, True), False, "float32")]
        *ours, pair, fused = self._times(models, shape, repeats)
        size = 16 * float(np.prod(shape))
        return [
            self._row(
                f"SkipIBNorm{kind} float32 {shape}",
                bar,
                t,
                pair,
                size,
                f"over SkipLayerNormalization: {t / fused:.3f} ({fused * 1e3:.3f} ms)",
            )
            for kind, t in zip(Compression, ours, strict=True)
        ]

    def bandwidth_row(self, shape: tuple[int, ...], bar: float, repeats: int) -> Row:
        """Copy, ours and LayerNormalization in turns over the same buffers."""
        f32 = np.dtype(np.float32)
        x = aligned(shape, f32)
        x[...] = np.random.default_rng(4).standard_normal(shape, dtype=np.float32)
        ours = Bound(plain(IBNormSpec(Compression.LOGARITHMIC), shape, "float32", 1), self._library, {"x": x})
        theirs = Bound(plain(None, shape, "float32", 1), None, {"x": x})
        target = aligned(shape, f32)
        count = x.size
        size = 8.0 * count
        copies: list[float] = []

        def copy() -> None:
            copies.append(
                self._copy.ibnorm_test_copy(
                    ctypes.c_void_p(target.ctypes.data), ctypes.c_void_p(x.ctypes.data), ctypes.c_int64(count), THREADS
                )
            )

        ours_s, theirs_s, _ = interleaved([ours, theirs, copy], max(7, int(repeats * self._scale)))
        copy_s = statistics.median(copies[3:])
        return Row(
            case=f"IBNormL float32 {shape}",
            measure="bandwidth over copy",
            value=round(copy_s / ours_s, 3),
            bar=bar,
            at_most=False,
            ours_ms=round(ours_s * 1e3, 3),
            theirs_ms=round(theirs_s * 1e3, 3),
            gigabytes_per_s=round(size / ours_s / 1e9, 2),
            copy_gigabytes_per_s=round(size / copy_s / 1e9, 2),
            floor_ms=round(copy_s * 1e3, 3),
            note=f"LayerNormalization: {copy_s / theirs_s:.2f} of copy",
        )

    def rows(self) -> list[Row]:
        rows = []
        for shape in ((8, 512, 768), (1, 2048, 2048)):
            rows += self.plain_rows(shape, "float32", 0.80, 151)
        for shape in ((1, 1, 768), (1, 1, 4096)):
            rows += self.plain_rows(shape, "float32", 1.10, 1001, chain=64)
        rows += self.skip_rows((8, 512, 768), 0.80, 101)
        for dtype in ("float16", "bfloat16"):
            rows += self.plain_rows((8, 512, 768), dtype, 0.80, 151)
        rows.append(self.bandwidth_row((8, 4096, 2048), 0.70, 21))
        return rows


def middle(passes: list[list[Row]]) -> list[Row]:
    """Of every case the pass with the median value."""
    found = []
    for rows in zip(*passes, strict=True):
        ordered = sorted(rows, key=lambda row: row.value)
        found.append(replace(ordered[len(rows) // 2], passes=tuple(row.value for row in rows)))
    return found


def main() -> int:
    parser = publish.parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="one pass of a fifth of the repeats")
    options = parser.parse_args()
    copier = BUILD / "libibnorm_kernels_test.so"
    library = BUILD / "libibnorm_ort.so"
    if not copier.is_file():
        print(f"op_cpu: {copier} is missing; run `make native`", file=sys.stderr)
        return 3
    ort.set_global_thread_pool_sizes(THREADS, 1)
    path = library if library.is_file() else native.ort_library()
    bench = Bench(path, ctypes.CDLL(str(copier)), options.quick)
    rows = middle([bench.rows() for _ in range(1 if options.quick else PASSES)])
    content = {
        "threads": THREADS,
        "instruction_set": native.inspect(path).instruction_set,
        "bytes": "each tensor once: x + y (plain), x + skip + sum + y (skip)",
        "limit": "time >= bytes / two-thread streaming copy bandwidth, unless the tensors stay in the cache",
        "rows": [row.to_json() for row in rows],
    }
    return publish.publish("op_cpu", content, all(rows), rows, options)


if __name__ == "__main__":
    sys.exit(main())
