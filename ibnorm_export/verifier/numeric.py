"""The numeric verdict: what the file computes, against PyTorch in float64, by PyTorch's own error."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import nn

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.loaded_model import LoadedModel, torch_dtype
from ibnorm_export.artifacts.metadata import Task
from ibnorm_export.artifacts.tensors import Arrays, DType
from ibnorm_export.errors import ModelFileError
from ibnorm_export.progress import Progress
from ibnorm_export.runtimes.lazy_runners import LazyRunners
from ibnorm_export.runtimes.norm_executions import NormExecution
from ibnorm_export.runtimes.registry import fused_library, open_runner
from ibnorm_export.runtimes.runner import Endpoint, Kernels, Runner
from ibnorm_export.runtimes.torch import TorchRunner
from ibnorm_export.verifier.attribution import split
from ibnorm_export.verifier.decoding import check_decoding
from ibnorm_export.verifier.error_accumulator import ErrorSums
from ibnorm_export.verifier.layers import check_layers
from ibnorm_export.verifier.quality import check_quality, own_text
from ibnorm_export.verifier.quantized import exact_file, with_matrices_of
from ibnorm_export.verifier.report import Finding, Level, NumericReport, Quality
from ibnorm_export.verifier.tolerances import BOUNDS

__all__ = ["Runtime", "check_numeric", "round_inputs"]

#: Relative error of PyTorch in the file's type, at most: nothing can be held to a larger one. Zeros have an error of 1.
_MOST: Final = 0.2

#: A sample, where its outputs have a value, and what PyTorch gives in the file's type and in float64.
_Known = tuple[Arrays, dict[str, NDArray[np.bool_]], Arrays, Arrays]


@dataclass(frozen=True, slots=True)
class Runtime:
    """What runs the file: backend, how its norms run, whether a norm that is not fused is a finding, and where.

    `layers` asks for the error behind every norm and block too.
    """

    backend: str
    kernels: Kernels
    _: KW_ONLY
    require_fused: bool
    layers: bool = False
    endpoint: Endpoint | None = None
    engine: Path | None = None


def _select(arrays: Arrays, name: str, *, valid: dict[str, NDArray[np.bool_]]) -> NDArray[Any]:
    return arrays[name][valid[name]] if name in valid else arrays[name]


def round_inputs(inputs: Arrays, dtype: torch.dtype) -> Arrays:
    """Floating inputs as the model will see them, in float32, so that nobody is blamed for rounding them."""
    return {
        name: torch.from_numpy(a).to(dtype).float().numpy() if np.issubdtype(a.dtype, np.floating) else a
        for name, a in inputs.items()
    }


def _rounding_file(exported: ExportedModel, folder: Path) -> ExportedModel:
    from ibnorm_export.graph.dtype_rounding import rounding_copy

    ir.save(rounding_copy(exported), folder / "rounding.onnx", external_data="rounding.onnx.data")
    return ExportedModel(folder / "rounding.onnx")


def check_numeric(
    exported: ExportedModel,
    model: LoadedModel,
    *,
    truth: nn.Module,
    runtime: Runtime,
    samples: Sequence[Arrays],
    narrow: frozenset[str],
    progress: Progress,
    text: NDArray[np.int64] | None = None,
) -> NumericReport:
    """Run `exported`, `truth` (float64) and PyTorch in the file's own type on every sample, and compare."""
    dtype = DType(exported.dtype)
    if exported.metadata.quantization is not None:
        return _judge_quantized(
            exported, model, runtime=runtime, samples=samples, narrow=narrow, text=text, progress=progress
        )
    if not _needs_rounding(runtime, dtype):
        as_is = "the file as it is"
        report = _compare(
            exported,
            as_is,
            dtype=dtype,
            model=model,
            truth=truth,
            runtime=runtime,
            samples=samples,
            narrow=narrow,
            progress=progress,
            text=text,
        )
        return _with_layers(
            report, exported, model=model, truth=truth, runtime=runtime, samples=samples, progress=progress
        )
    method = (
        f"a copy that rounds every node's output to {dtype.value} by explicit Casts and does arithmetic in float32: "
        f"on a CPU, ONNX Runtime computes {dtype.value} graphs in float32 without that rounding, or not at all"
    )
    with tempfile.TemporaryDirectory() as folder:
        copy = _rounding_file(exported, Path(folder))
        report = _compare(
            copy,
            method,
            dtype=dtype,
            model=model,
            truth=truth,
            runtime=runtime,
            samples=samples,
            narrow=narrow,
            progress=progress,
            text=text,
        )
    return _with_layers(report, exported, model=model, truth=truth, runtime=runtime, samples=samples, progress=progress)


def _needs_rounding(runtime: Runtime, dtype: DType) -> bool:
    return runtime.backend == "ort-cpu" and dtype is not DType.FP32


def _with_layers(
    report: NumericReport,
    exported: ExportedModel,
    *,
    model: LoadedModel,
    truth: nn.Module,
    runtime: Runtime,
    samples: Sequence[Arrays],
    progress: Progress,
) -> NumericReport:
    """The report with the error behind every layer where that is asked for; the first one is a finding if it failed."""
    if not runtime.layers:
        return report

    def prepare(file: ExportedModel, folder: Path) -> ExportedModel:
        return _rounding_file(file, folder) if _needs_rounding(runtime, DType(exported.dtype)) else file

    layers = check_layers(
        exported,
        model,
        truth=truth,
        samples=samples,
        prepare=prepare,
        runners=lambda file: _runners(file, runtime),
        progress=progress,
    )
    findings, notes = report.findings, report.notes
    if layers.first and not report:
        findings += (Finding("layer", layers.first),)
    elif layers.first:
        notes += (f"{layers.first}; every output keeps its bound",)
    return replace(report, layers=layers, findings=findings, notes=notes)


def _judge_quantized(
    exported: ExportedModel,
    model: LoadedModel,
    *,
    runtime: Runtime,
    samples: Sequence[Arrays],
    narrow: frozenset[str],
    text: NDArray[np.int64] | None,
    progress: Progress,
) -> NumericReport:
    """Of a quantised file: its predictions beside the checkpoint's, its numbers beside those of its own matrices."""
    stored = exported.metadata.quantization
    assert stored is not None
    own = TorchRunner(model, model.in_dtype(torch.float32))
    notes: tuple[str, ...] = ()
    if text is None:
        text = own_text(model, own)
        notes = ("judged on text that PyTorch samples from the model itself; give --text for a text of your own",)
    taken = tuple(spec for spec in model.inputs if spec.name in {tensor.name for tensor in exported.inputs})
    kind = f"int{stored.bits}"
    runners = _runners(exported, runtime)
    quality = check_quality(model, own, runners=runners, inputs=taken, kind=kind, tokens=text, progress=progress)
    runners.close()
    findings = tuple(Finding("quality", str(q)) for q in quality if not q.passed)
    method = "predictions of the file as it is, beside PyTorch in fp32"
    report = NumericReport(runtime.backend, kind, method=method, samples=len(samples), outputs=(), findings=())
    if runtime.backend == "ort-cpu":
        method += "; numbers of a copy that rounds no activations, beside PyTorch with the file's own matrices"
        with tempfile.TemporaryDirectory() as folder:
            file, as_stored = exact_file(exported, Path(folder)), with_matrices_of(exported, model)
            truth, exact = as_stored.in_float64(), replace(runtime, require_fused=False)
            report = _compare(
                file,
                method,
                dtype=DType.FP32,
                model=as_stored,
                truth=truth,
                runtime=exact,
                samples=samples,
                narrow=narrow,
                progress=progress,
                text=None,
            )
            report = _with_layers(
                report, file, model=as_stored, truth=truth, runtime=runtime, samples=samples, progress=progress
            )
    else:
        notes += (f"backend {runtime.backend} judges predictions alone; ort-cpu holds a quantised file's numbers too",)
    executions = _executions(exported, runtime, inputs={spec.name: samples[0][spec.name] for spec in taken})
    findings += (*report.findings, *_unfused(exported, runtime, executions=executions))
    return replace(
        report,
        dtype=kind,
        method=method,
        findings=findings,
        notes=notes + report.notes,
        norms=executions,
        quality=quality,
    )


def _unfused(file: ExportedModel, runtime: Runtime, *, executions: Sequence[NormExecution]) -> list[Finding]:
    """Every norm that did not run as a fused kernel, where that is demanded."""
    if not runtime.require_fused:
        return []
    if file.metadata.inlined:
        return [Finding("norms", "are inlined in this file, so no kernel can take them: export without --inline")]
    if not executions:
        return [Finding("norms", f"backend {runtime.backend} cannot show that a fused kernel ran")]
    return [Finding(f"norm {norm.module}", norm.problem) for norm in executions if norm.problem]


def _compare(
    file: ExportedModel,
    method: str,
    *,
    dtype: DType,
    model: LoadedModel,
    truth: nn.Module,
    runtime: Runtime,
    samples: Sequence[Arrays],
    narrow: frozenset[str],
    progress: Progress,
    text: NDArray[np.int64] | None,
) -> NumericReport:
    runners = _runners(file, runtime)
    own = TorchRunner(model, model.in_dtype(torch_dtype(dtype)))
    exact = TorchRunner(model, truth)
    sums = {(norms, name): ErrorSums() for norms in runners for name in model.outputs}
    taken = [tensor.name for tensor in file.inputs]
    findings: list[Finding] = []
    notes: list[str] = []
    if narrow:
        notes.append(
            f"the float64 truth is not float64 throughout ({', '.join(sorted(narrow)[:3])}): give CustomModel an "
            "`exact` function"
        )
    known = []
    for index, inputs in enumerate(samples):
        progress("running PyTorch", index, len(samples))
        known.append((inputs, model.valid(inputs), own.run(inputs), exact.run(inputs)))
    for norms, runner in runners.items():  # one session after the other
        for index, (inputs, valid, torchs, true) in enumerate(known):
            progress(f"comparing, norms {norms}", index, len(samples))
            try:
                actual = runner.run({name: inputs[name] for name in taken})
            except ModelFileError as error:
                findings.append(Finding(f"sample {index}", str(error)))
                continue
            for name in model.outputs:
                if name not in actual or actual[name].shape != true[name].shape:
                    got = actual[name].shape if name in actual else "missing"
                    what = f"sample {index}: is {got}; it must be {true[name].shape}"
                    findings.append(Finding(f"output {name}", what))
                    continue
                a, o, t = (_select(arrays, name, valid=valid) for arrays in (actual, torchs, true))
                if problem := _not_finite(a, o, truth=t, dtype=dtype):
                    findings.append(Finding(f"output {name}", f"sample {index}: {problem}"))
                sums[norms, name].add(a, o, truth=t)
    progress("comparing", len(samples), len(samples))
    outputs = tuple(s.judge(name, norms, bound=BOUNDS[dtype]) for (norms, name), s in sums.items() if s.per_sample)
    if model.task is Task.TEXT_GENERATION:
        decoded, more = check_decoding(model, exact, own=own, runners=runners, file=file, progress=progress)
        outputs += decoded
        findings += more
    quality: tuple[Quality, ...] = ()
    if model.task is Task.TEXT_GENERATION and text is not None:
        torch_fp32 = TorchRunner(model, model.in_dtype(torch.float32))
        inputs_taken = tuple(spec for spec in model.inputs if spec.name in taken)
        quality = check_quality(
            model, torch_fp32, runners=runners, inputs=inputs_taken, kind=dtype.value, tokens=text, progress=progress
        )
        findings += [Finding("quality", str(q)) for q in quality if not q.passed]
    for output in outputs:
        if not output.passed:
            what = (
                f"relative error {output.error:.3g} against float64 (worst sample {output.worst_sample_error:.3g}); "
                f"PyTorch in {dtype.value} has {output.torch_error:.3g}, allowed is {output.allowed:.3g}"
            )
            findings.append(Finding(f"output {output.name}", f"{what}; norms ran {output.norms}"))
        if output.torch_error > _MOST:
            what = (
                f"PyTorch in {dtype.value} is itself {output.torch_error:.0%} off float64, so its error is no "
                "yardstick: the model does not fit this type; export another"
            )
            findings.append(Finding(f"{dtype.value} of output {output.name}", f"{what}; norms ran {output.norms}"))
    levels: tuple[Level, ...] = ()
    bare = [o for o in outputs if o.norms == "as functions"] or outputs
    if runtime.backend == "ort-cpu" and not all(o.passed for o in bare):
        runners.close()
        levels = _levels(file, dtype, model=model, runtime=runtime, known=known)
    blame = split(outputs, dtype.value, levels=levels)
    if blame is not None and blame.guilty:
        findings.append(Finding(f"link {blame.guilty}", blame.words))
    runners.close()
    executions = _executions(file, runtime, inputs={name: samples[0][name] for name in taken})
    findings += _unfused(file, runtime, executions=executions)
    return NumericReport(
        runtime.backend,
        dtype.value,
        method=method,
        samples=len(samples),
        outputs=outputs,
        findings=tuple(findings),
        notes=tuple(notes),
        norms=executions,
        quality=quality,
        blame=blame,
    )


def _levels(
    file: ExportedModel, dtype: DType, *, model: LoadedModel, runtime: Runtime, known: Sequence[_Known]
) -> tuple[Level, ...]:
    """The worst output at every optimisation level, norms as functions unless fused ones were demanded."""
    from ibnorm_export.runtimes.ort import LEVELS, OrtRunner

    kernels = Kernels.FUSED if runtime.kernels is Kernels.FUSED else Kernels.FUNCTION
    library = fused_library(runtime.backend, kernels)
    taken = [tensor.name for tensor in file.inputs]
    levels = []
    runners = LazyRunners(
        {level: functools.partial(OrtRunner, file.path, library=library, level=level) for level in LEVELS}
    )
    for level, runner in runners.items():
        sums = {name: ErrorSums() for name in model.outputs}
        for inputs, valid, torchs, true in known:
            actual = runner.run({name: inputs[name] for name in taken})
            for name in model.outputs:
                if name in actual and actual[name].shape == true[name].shape:
                    a, o, t = (_select(arrays, name, valid=valid) for arrays in (actual, torchs, true))
                    sums[name].add(a, o, truth=t)
        judged = [s.judge(name, level, bound=BOUNDS[dtype]) for name, s in sums.items() if s.per_sample]
        if judged:
            worst = max(judged, key=lambda o: (not o.passed, np.nan_to_num(o.error, nan=np.inf)))
            levels.append(Level(level, worst.error, worst.allowed, worst.passed))
    return tuple(levels)


def _runners(file: ExportedModel, runtime: Runtime) -> LazyRunners:
    """Fused kernels where they are installed, and the functions beside them: a kernel hides a wrong body."""
    opened = functools.partial(open_runner, runtime.backend, file)
    if runtime.backend == "triton":  # the server has decided how they run
        return LazyRunners({"as served": functools.partial(opened, endpoint=runtime.endpoint)})
    runners: dict[str, Callable[[], Runner]] = {}
    if fused_library(runtime.backend, runtime.kernels) is not None:
        runners["fused"] = functools.partial(opened, kernels=Kernels.FUSED)
    if runtime.kernels is not Kernels.FUSED:
        runners["as functions"] = functools.partial(opened, kernels=Kernels.FUNCTION, engine=runtime.engine)
    return LazyRunners(runners)


def _not_finite(actual: NDArray[Any], own: NDArray[Any], *, truth: NDArray[Any], dtype: DType) -> str:
    """What is wrong where a value is NaN or infinity; empty where none is."""
    if not np.isfinite(truth).all():
        return "the checkpoint itself gives NaN or Inf"
    if not np.isfinite(own).all():
        return f"PyTorch itself overflows in {dtype.value}: the model does not fit this type"
    if not np.isfinite(actual).all():
        count = int((~np.isfinite(actual)).sum())
        return (
            f"{count} of {actual.size} values are NaN or infinity where PyTorch's are finite: an overflow in "
            f"{dtype.value}"
        )
    return ""


def _executions(file: ExportedModel, runtime: Runtime, *, inputs: Arrays) -> tuple[NormExecution, ...]:
    if not runtime.backend.startswith("ort-"):
        return ()
    from ibnorm_export.runtimes.norm_executions import norm_executions

    return norm_executions(
        file, inputs, library=fused_library(runtime.backend, runtime.kernels), backend=runtime.backend
    )
