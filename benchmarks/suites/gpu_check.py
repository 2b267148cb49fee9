"""What only a GPU can show about the kernels and the plugin, in one call.

kernels      Every type, compression and form is within the tolerances of the operator's definition. The sum of the skip
             form is exact, and both forms are equal to the bit.
plugin       Each of the six plugins is created from fields, serialised, created again for the runtime phase and
             attached. It enqueues on device pointers in shapes that change, with the kernels' own bits. A CUDA graph
             replays it. Wrong shapes are refused.
bandwidth    The table of op_cuda, against what a copy reaches.
onnxruntime  One norm in ONNX Runtime, as function and fused, is within the tolerances; latency of both and of the
             plugin's `enqueue`.

Needs a GPU, a CUDA build of torch and nvcc. `plugin` needs TensorRT's headers, but no library of TensorRT.
`onnxruntime` needs onnxruntime-gpu and the library of `make native-cuda` (--ort-library). A part that lacks something
is "not run" and its note gives the reason. `--emulate` tries the suite on a CPU emulator (for example with
`--width 7 768`) and measures nothing.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.report import Report
from benchmarks.rows import Unavailable
from benchmarks.suites import gpu_machine, op_cuda
from benchmarks.suites.gpu_machine import Array, Machine
from benchmarks.suites.gpu_parts import Part, skip_of, tensor, variants
from ibnorm_export.op.spec import OP_TYPES, SKIP_OP_TYPES, Compression, IBNormSpec
from tests.support import trt_plugin
from tests.support.accuracy import WIDTHS, Case, cases
from tests.support.cuda_emulator import DTYPES, Accuracy, judge

__all__ = ["PARTS", "add_options", "check_bandwidth", "check_kernels", "check_plugin", "measure"]


def draw_cases(kind: Compression, dtype: str, widths: Sequence[int]) -> Iterator[Case]:
    """The cases of tests/support/accuracy.py, except one beyond the kernels (docs/development/cuda-kernels.md).

    A mean of 1000 in float32 moves an element near it by more than an ulp of float16 (deviation 100).
    """
    for case in cases(kind, DTYPES[dtype], tuple(widths)):
        if dtype == "float16" and case.mean and float(np.std(case.x.astype(np.float64))) > 20.0:
            continue
        yield case


def _kernel(machine: Machine, inputs: Sequence[Array], *, scale: Array, bias: Array, spec: IBNormSpec) -> list[Array]:
    """Call the kernels directly; return y, and the sum if there is a skip."""
    outputs = [machine.place(np.full_like(inputs[0], np.nan)) for _ in inputs]
    placed = [machine.place(a) for a in inputs]
    affine = {"scale": machine.place(scale), "bias": machine.place(bias)}
    op_cuda.launch(machine.kernels, placed, **affine, outputs=outputs, spec=spec, stream=machine.stream)
    return [machine.fetch(output) for output in outputs]


def check_kernels(machine: Machine, widths: Sequence[int]) -> Part:
    """The kernels against the float64 reference, over `widths` and the regimes of tests/support/accuracy.py."""
    part = Part("kernels")
    for dtype, kind in variants():
        found: dict[str, list[Accuracy]] = defaultdict(list)
        for case in draw_cases(kind, dtype, widths):
            for affine in dict.fromkeys((DTYPES[dtype], DTYPES["float32"])):
                scale, bias = case.scale.astype(affine), case.bias.astype(affine)
                (y,) = _kernel(machine, [case.x], scale=scale, bias=bias, spec=case.spec)
                accuracy = judge(y, case.exact, scale, bias, case.mean)
                found[f"parameters {affine}"].append(accuracy)
                if not accuracy:
                    part.failures.append(f"{case}, parameters {affine}: {accuracy.problem}")
            skip, total = skip_of(case.x)
            fused, got = _kernel(machine, [case.x, skip], scale=case.scale, bias=case.bias, spec=case.spec)
            if got.tobytes() != total.tobytes():
                part.failures.append(f"{case}: the sum is not the rounded sum")
            (plain,) = _kernel(machine, [total], scale=case.scale, bias=case.bias, spec=case.spec)
            if fused.tobytes() != plain.tobytes():
                part.failures.append(f"{case}: the skip form is not the plain form of the sum, to the bit")
        for what, accuracies in found.items():
            part.worst(accuracies, dtype=dtype, compression=kind.value, what=what)
    return part


def _enqueue(machine: Machine, plugin: trt_plugin.Plugin, *, case: Case, turn: int) -> tuple[int, list[Array]]:
    """Return code and outputs of one call; `turn` chooses the rank of the shape."""
    inputs = [case.x, skip_of(case.x)[0]][: plugin.outputs]
    placed = [machine.place(a) for a in inputs]
    parameters = [machine.place(case.scale), machine.place(case.bias)]
    outputs = [machine.place(np.full_like(case.x, np.nan)) for _ in inputs]
    rows, cols = case.x.shape
    shape = ((rows, cols), (1, rows, cols), (rows, 1, 1, cols))[turn % 3]
    described = [*(tensor(t, shape) for t in placed), *map(tensor, parameters)]
    code = plugin.enqueue(described, [tensor(t, shape) for t in outputs], machine.stream)
    return code, [machine.fetch(output) for output in outputs]


def _replays(machine: Machine, plugin: trt_plugin.Plugin, *, case: Case) -> bool:
    """Whether a CUDA graph of one `enqueue` gives, for other values, what a plain call gives."""
    x, y = machine.place(np.zeros_like(case.x)), machine.place(case.x)
    parameters = [machine.place(case.scale), machine.place(case.bias)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        code = plugin.enqueue([tensor(t) for t in (x, *parameters)], [tensor(y)], machine.stream)
    x.copy_(machine.place(case.x))
    graph.replay()
    torch.cuda.synchronize()
    return code == 0 and machine.fetch(y).tobytes() == _enqueue(machine, plugin, case=case, turn=0)[1][0].tobytes()


def _refuses(machine: Machine, plugin: trt_plugin.Plugin) -> bool:
    """Whether onShapeChange refuses a bias that is longer than the rows."""
    x, scale, bias = (machine.place(np.zeros(shape, np.float32)) for shape in ((2, 8), 8, 9))
    inputs = [tensor(t) for t in (*[x] * plugin.outputs, scale, bias)]
    return plugin.enqueue(inputs, [tensor(x)] * plugin.outputs, machine.stream) >= 1000


def check_plugin(machine: Machine, widths: Sequence[int]) -> Part:
    """The plugins, driven through the interfaces of TensorRT by the mock of tests/custom_ops/tensorrt."""
    if machine.plugin is None or machine.harness is None:
        return Part("plugin", machine.missing)
    part = Part("plugin")
    for op_type in (*OP_TYPES, *SKIP_OP_TYPES):
        for dtype in DTYPES:
            by_spec: dict[IBNormSpec, list[Case]] = defaultdict(list)
            for case in draw_cases(Compression(op_type[-1]), dtype, widths):
                by_spec[case.spec].append(case)
            found = []
            for spec, group in by_spec.items():
                try:
                    plugin = trt_plugin.Plugin(machine.harness, machine.plugin, op_type, trt_plugin.fields_of(spec))
                except trt_plugin.Refused as refused:
                    part.failures.append(f"{op_type} {spec}: {refused}")
                    continue
                for turn, case in enumerate(group):
                    label = f"{op_type} {case}"
                    code, outputs = _enqueue(machine, plugin, case=case, turn=turn)
                    if code != 0:
                        part.failures.append(f"{label}: enqueue returned {code}")
                        continue
                    inputs = [case.x, skip_of(case.x)[0]][: len(outputs)]
                    direct = _kernel(machine, inputs, scale=case.scale, bias=case.bias, spec=spec)
                    if any(a.tobytes() != b.tobytes() for a, b in zip(outputs, direct, strict=True)):
                        part.failures.append(f"{label}: not the bits of the kernel called directly")
                    if len(outputs) == 1:
                        found.append(judge(outputs[0], case.exact, case.scale, case.bias, case.mean))
                        if not found[-1]:
                            part.failures.append(f"{label}: {found[-1].problem}")
                if machine.is_gpu and plugin.outputs == 1 and not _replays(machine, plugin, case=group[0]):
                    part.failures.append(f"{op_type} {group[0]}: a CUDA graph does not replay it")
                if dtype == "float32" and spec is next(iter(by_spec)) and not _refuses(machine, plugin):
                    part.failures.append(f"{op_type}: a bias that is too long is not refused")
                plugin.close()
            if found:
                part.worst(found, op_type=op_type, dtype=dtype)
            elif op_type in SKIP_OP_TYPES:  # judged through the kernels, whose bits it has
                part.figures.append({"op_type": op_type, "dtype": dtype, "tensors": sum(map(len, by_spec.values()))})
    return part


def check_bandwidth(machine: Machine, options: argparse.Namespace) -> Part:
    """The table of op_cuda; fails if a target is missed."""
    if not machine.is_gpu:
        return Part("bandwidth", "no GPU")
    part, timing = Part("bandwidth"), op_cuda.timing_of(options)
    for dtype, kind in variants():
        for cols in options.bandwidth_width:
            for skip in (False, True):
                spec, shape = IBNormSpec(kind), (16384, cols)
                row = op_cuda.bandwidth(machine.kernels, dtype, spec=spec, skip=skip, shape=shape, timing=timing)
                part.figures.append(row.to_dict())
                if row.met is False:
                    part.failures.append(str(row))
    return part


def _onnxruntime(machine: Machine, options: argparse.Namespace) -> Part:
    try:
        from benchmarks.suites.gpu_check_ort import check_onnxruntime
    except ModuleNotFoundError as error:
        return Part("onnxruntime", f"{error.name} is not installed")
    return check_onnxruntime(machine, options.ort_library)


PARTS: dict[str, Callable[[Machine, argparse.Namespace], Part]] = {
    "kernels": lambda machine, options: check_kernels(machine, options.width),
    "plugin": lambda machine, options: check_plugin(machine, options.width),
    "bandwidth": check_bandwidth,
    "onnxruntime": _onnxruntime,
}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--part", choices=PARTS, nargs="+", default=list(PARTS), help="Parts to run.")
    parser.add_argument("--width", type=int, nargs="+", default=[*WIDTHS, 2048, 8192, 32768], help="Columns.")
    parser.add_argument("--bandwidth-width", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--plugin", type=Path, help="Plugin library to check; one is compiled by default.")
    built = gpu_machine.ROOT / "build" / "native-cuda" / "libibnorm_ort.so"
    parser.add_argument("--ort-library", type=Path, default=built, help="Library of fused kernels (%(default)s).")
    parser.add_argument("--emulate", action="store_true", help="Run the kernels on the CPU emulator.")
    op_cuda.add_timing_options(parser)


def measure(options: argparse.Namespace, report: Report) -> None:
    """Run the chosen parts."""
    if not options.emulate and (why := op_cuda.missing()):
        raise Unavailable(why)
    with tempfile.TemporaryDirectory() as folder:
        machine = (gpu_machine.emulator if options.emulate else gpu_machine.gpu)(Path(folder), options.plugin)
        report.facts |= {"device": machine.name, "torch": torch.__version__, "cuda": torch.version.cuda}
        for name in options.part:
            start = time.monotonic()
            part = PARTS[name](machine, options)
            part.seconds = time.monotonic() - start
            report.add(part.row())
    if all(row.met is None for row in report.rows):
        raise Unavailable("no part could be run")
