"""The fused operator in ONNX Runtime on the CPU, against LayerNormalization and a memory copy.

All candidates share one global pool of two threads, and their inputs and outputs are bound to fixed buffers, aligned
to 64 bytes. The whole table is measured five times. Each row is the pass with the median ratio, and records the ratios
of all five. The baseline runs on the same shape in float32: LayerNormalization, or SkipLayerNormalization for the skip
form (the time over Add and LayerNormalization is recorded too). `--instruction-set` measures the kernels of another
processor, where this one has its instructions; the baseline keeps those of this processor, unless they are hidden from
the whole process. `--processor` then names the processor that it sees.

Bytes: the fewest that any implementation moves, each tensor once: x and y (8 bytes for each float32 element), and for
the skip form x, skip, sum and y (16 bytes).

Physical limit: a row cannot take less time than its bytes over the bandwidth of a two-thread streaming copy, which the
same run measures; "floor" is that time. Tensors that fit into the last-level cache can beat it. The 537 MB of
8 x 4096 x 2048 cannot. The small rows are bound by the runtime's cost of a node, which is the same on both sides.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort

from benchmarks.report import Report
from benchmarks.rows import Figure, Row, Target, Unavailable
from benchmarks.turns import Times, compare, ms, share_threads, take_turns, timed
from ibnorm_export.op import native
from ibnorm_export.op import onnx_functions as onnx_op
from ibnorm_export.op.spec import Compression, IBNormSpec

THREADS = 2
PASSES = 5  # spread over time, because other work on the machine lasts for seconds
ROUNDS = 35
BASELINE = "baseline"
OPSET = 20
BUILD = Path(__file__).resolve().parents[2] / "build" / "native"
TYPES = {
    "float32": (onnx.TensorProto.FLOAT, np.dtype(np.float32)),
    "float16": (onnx.TensorProto.FLOAT16, np.dtype(np.float16)),
    "bfloat16": (onnx.TensorProto.BFLOAT16, np.dtype(ml_dtypes.bfloat16)),
}
Array = np.ndarray[Any, Any]


def aligned(shape: tuple[int, ...], dtype: np.dtype[Any], alignment: int = 64) -> Array:
    size = int(np.prod(shape)) * dtype.itemsize
    room = np.zeros(size + alignment, np.uint8)
    start = -room.ctypes.data % alignment
    return room[start : start + size].view(dtype).reshape(shape)


class Bound:
    """A session on one graph whose inputs and outputs stay in place."""

    def __init__(self, model: onnx.ModelProto, library: Path | None, x: dict[str, Array], *, instructions: str) -> None:
        options = ort.SessionOptions()
        options.use_per_session_threads = False
        if library is not None:
            options.add_session_config_entry("ibnorm.instruction_set", instructions)
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
    nodes: list[onnx.NodeProto], shape: tuple[int, ...], *, dtype: str, inputs: list[str], outputs: list[str]
) -> onnx.ModelProto:
    code, numpy_type = TYPES[dtype]
    rng = np.random.default_rng(1)
    affine = {"scale": 1 + 0.1 * rng.standard_normal(shape[-1]), "bias": 0.1 * rng.standard_normal(shape[-1])}
    constants = [
        onnx.helper.make_tensor(name, code, [shape[-1]], values.astype(numpy_type).tobytes(), raw=True)
        for name, values in affine.items()
    ]
    info = onnx.helper.make_tensor_value_info
    built = onnx.helper.make_graph(
        nodes, "op", [info(i, code, shape) for i in inputs], [info(o, code, shape) for o in outputs], constants
    )
    return onnx.helper.make_model(
        built,
        opset_imports=[*onnx_op.opset_imports(OPSET), onnx.helper.make_opsetid("com.microsoft", 1)],
        ir_version=10,
    )


def layer_norm(x: str, y: str) -> onnx.NodeProto:
    return onnx.helper.make_node("LayerNormalization", [x, "scale", "bias"], [y], axis=-1, epsilon=1e-5)


def plain(spec: IBNormSpec | None, shape: tuple[int, ...], dtype: str, *, chain: int) -> onnx.ModelProto:
    """`chain` norms one after another: IBNorm with a spec, LayerNormalization without."""
    names = ["x", *(f"v{i}" for i in range(1, chain)), "y"]
    nodes = [
        layer_norm(a, b) if spec is None else onnx_op.node(a, "scale", bias="bias", y=b, spec=spec, name=f"norm_{b}")
        for a, b in itertools.pairwise(names)
    ]
    return graph(nodes, shape, dtype=dtype, inputs=["x"], outputs=["y"])


def skip(spec: IBNormSpec | None, shape: tuple[int, ...], *, microsoft: bool = False) -> onnx.ModelProto:
    """The residual form: SkipIBNorm with a spec, else Add and LayerNormalization, or Microsoft's fused node."""
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
    return graph(nodes, shape, dtype="float32", inputs=["x", "skip"], outputs=["y", "sum"])


class Bench:
    """Measures the rows of the table.

    Args:
        library: the fused kernels for ONNX Runtime.
        copy: the library with the streaming copy.
        instructions: the instruction set of the fused kernels: "generic", "avx2" or "avx512".
        quick: a fifth of the rounds.
    """

    def __init__(self, library: Path, copy: ctypes.CDLL, *, instructions: str, quick: bool) -> None:
        self._library = library
        self._instructions = instructions
        self._scale = 0.2 if quick else 1.0
        self._copy = copy
        self._copy.ibnorm_test_copy.restype = ctypes.c_double
        count = 1 << 26
        source, target = (aligned((count,), np.dtype(np.float32)) for _ in range(2))
        source[:] = 1
        times = take_turns({"copy": lambda: self._copy_once(source, target)}, rounds=7)
        self._copy_gb = float(8 * count / np.median(times["copy"]) / 1e9)

    def _copy_once(self, source: Array, target: Array) -> float:
        """Seconds of one streaming copy."""
        pointers = ctypes.c_void_p(target.ctypes.data), ctypes.c_void_p(source.ctypes.data)
        return float(self._copy.ibnorm_test_copy(*pointers, ctypes.c_int64(source.size), THREADS))

    def _times(self, models: Mapping[str, tuple[onnx.ModelProto, bool, str]], shape: tuple[int, ...]) -> Times:
        """Times of models by name; each is (model, with the fused kernels, type of its inputs)."""
        rng = np.random.default_rng(3)
        candidates = {}
        for name, (model, fused, dtype) in models.items():
            inputs = {}
            for value in model.graph.input:
                inputs[value.name] = aligned(shape, TYPES[dtype][1])
                inputs[value.name][...] = rng.standard_normal(shape, dtype=np.float32)
            candidates[name] = timed(self._bound(model, inputs, fused=fused))
        repeats = max(3, min(25, (1 << 24) // int(np.prod(shape))))
        return take_turns(candidates, rounds=self._rounds(), repeats=repeats)

    def _bound(self, model: onnx.ModelProto, inputs: dict[str, Array], *, fused: bool) -> Bound:
        return Bound(model, self._library if fused else None, inputs, instructions=self._instructions)

    def _rounds(self) -> int:
        return max(7, int(ROUNDS * self._scale))

    def _row(self, case: str, times: Times, name: str, *, max_ratio: float, size: float, note: str = "") -> Row:
        seconds = float(np.median(times[name]))
        figures = {
            **compare(times, name, over=BASELINE),
            "fused": ms(times, name),
            "baseline": ms(times, BASELINE),
            "bandwidth": Figure(round(size / seconds / 1e9, 2), "GB/s"),
            "copy": Figure(round(self._copy_gb, 2), "GB/s"),
            "floor": Figure(round(size / self._copy_gb / 1e6, 4), "ms"),
        }
        return Row(case, figures, targets=(Target("time over baseline", max_ratio),), note=note)

    def plain_rows(self, shape: tuple[int, ...], dtype: str, *, max_ratio: float, chain: int = 1) -> list[Row]:
        """The plain form of every compression; `max_ratio` is the target."""
        models = {str(kind): (plain(IBNormSpec(kind), shape, dtype, chain=chain), True, dtype) for kind in Compression}
        models[BASELINE] = (plain(None, shape, "float32", chain=chain), False, "float32")
        times = self._times(models, shape)
        size = 2 * float(np.prod(shape)) * TYPES[dtype][1].itemsize * chain
        nodes = f" x {chain} nodes" if chain > 1 else ""
        return [
            self._row(f"IBNorm{kind} {dtype} {shape}{nodes}", times, str(kind), max_ratio=max_ratio, size=size)
            for kind in Compression
        ]

    def skip_rows(self, shape: tuple[int, ...], *, max_ratio: float) -> list[Row]:
        """The skip form of every compression; `max_ratio` is the target."""
        models = {str(kind): (skip(IBNormSpec(kind), shape), True, "float32") for kind in Compression}
        models[BASELINE] = (skip(None, shape, microsoft=True), False, "float32")
        models["Add, LayerNormalization"] = (skip(None, shape), False, "float32")
        times = self._times(models, shape)
        rows = []
        for kind in Compression:
            ratio = compare(times, str(kind), over="Add, LayerNormalization")["time over baseline"]
            note = f"time over Add and LayerNormalization {ratio}"
            size = 16 * float(np.prod(shape))
            rows.append(
                self._row(
                    f"SkipIBNorm{kind} float32 {shape}", times, str(kind), max_ratio=max_ratio, size=size, note=note
                )
            )
        return rows

    def bandwidth_row(self, shape: tuple[int, ...], *, min_ratio: float) -> Row:
        """A copy, the fused norm and LayerNormalization over the same buffers."""
        f32 = np.dtype(np.float32)
        x, target = aligned(shape, f32), aligned(shape, f32)
        x[...] = np.random.default_rng(4).standard_normal(shape, dtype=np.float32)
        norm = plain(IBNormSpec(Compression.LOGARITHMIC), shape, "float32", chain=1)
        fused = self._bound(norm, {"x": x}, fused=True)
        baseline = self._bound(plain(None, shape, "float32", chain=1), {"x": x}, fused=False)
        candidates = {
            "fused": timed(fused),
            BASELINE: timed(baseline),
            "copy": lambda: self._copy_once(x, target),
        }
        times = take_turns(candidates, rounds=self._rounds())
        size, copy_s, fused_s = 8.0 * x.size, np.median(times["copy"]), np.median(times["fused"])
        figures = {
            "bandwidth over copy": Figure(round(float(copy_s / fused_s), 3)),
            "fused": ms(times, "fused"),
            "baseline": ms(times, BASELINE),
            "bandwidth": Figure(round(size / float(fused_s) / 1e9, 2), "GB/s"),
            "copy": Figure(round(size / float(copy_s) / 1e9, 2), "GB/s"),
            "floor": ms(times, "copy"),
        }
        targets = (Target("bandwidth over copy", min_ratio, at_least=True),)
        return Row(f"IBNormL float32 {shape}, bandwidth", figures, targets=targets)

    def rows(self) -> list[Row]:
        """One pass over the whole table."""
        rows = []
        for shape in ((8, 512, 768), (1, 2048, 2048)):
            rows += self.plain_rows(shape, "float32", max_ratio=0.65 if self._instructions == "avx512" else 0.75)
        for shape in ((1, 1, 768), (1, 1, 4096)):
            rows += self.plain_rows(shape, "float32", max_ratio=0.90, chain=64)
        rows += self.skip_rows((8, 512, 768), max_ratio=0.60)
        for dtype in ("float16", "bfloat16"):
            rows += self.plain_rows((8, 512, 768), dtype, max_ratio=0.75)
        rows.append(self.bandwidth_row((8, 4096, 2048), min_ratio=0.70))
        return rows


def median_rows(passes: list[list[Row]]) -> list[Row]:
    """The pass with the median ratio, for each case; its details hold the ratios of all passes."""
    found = []
    for rows in zip(*passes, strict=True):
        figure = rows[0].targets[0].figure
        ordered = sorted(rows, key=lambda row: row.figures[figure].value)
        ratios = [row.figures[figure].value for row in rows]
        found.append(replace(ordered[len(rows) // 2], details={"passes": ratios}))
    return found


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="A fifth of the rounds.")
    parser.add_argument(
        "--instruction-set", choices=["generic", "avx2", "avx512"], help="Kernels to measure (the widest)."
    )
    parser.add_argument("--processor", help="Name for the record of a processor whose instructions are hidden in part.")


def measure(options: argparse.Namespace, report: Report) -> None:
    """Measure the table."""
    copier, library = BUILD / "libibnorm_kernels_test.so", BUILD / "libibnorm_ort.so"
    if not copier.is_file():
        raise Unavailable(f"{copier} is missing; run `make native`")
    path = library if library.is_file() else native.ort_library()
    if path is None:
        raise Unavailable("the library of fused kernels is missing; run `make native`")
    share_threads(THREADS)
    instructions = options.instruction_set or native.inspect(path).instruction_set
    bench = Bench(path, ctypes.CDLL(str(copier)), instructions=instructions, quick=options.quick)
    report.facts |= {
        "threads": THREADS,
        "instruction_set": instructions,
        "bytes": "each tensor once: x + y (plain), x + skip + sum + y (skip)",
        "limit": "time >= bytes / two-thread streaming copy bandwidth, unless the tensors stay in the cache",
    }
    if options.processor is not None:
        report.facts["processor"] = options.processor
    for row in median_rows([bench.rows() for _ in range(PASSES)]):
        report.add(row)
