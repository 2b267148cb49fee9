"""`bench`: set up an exported file and what it is compared with, and measure them on the same inputs and threads."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from ibnorm_export.artifacts.axes import BATCH, CAPACITY, PAST, SEQUENCE, TOTAL, axis_name, axis_sizes
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.loaded_model import LoadedModel, torch_dtype
from ibnorm_export.artifacts.random_inputs import draw_inputs
from ibnorm_export.artifacts.tensors import DType, default_length
from ibnorm_export.benchmark.generation import bench_generation, generates_text
from ibnorm_export.benchmark.loading import measure_loading
from ibnorm_export.benchmark.measure import measure
from ibnorm_export.benchmark.options import BACKEND_CANDIDATES, TORCH_CANDIDATES, BenchOptions, GenerationOptions
from ibnorm_export.benchmark.reference_load import REFERENCE_LOAD, ReferenceLoad
from ibnorm_export.benchmark.report import BenchReport, GenerationReport
from ibnorm_export.errors import BackendUnavailable, IBNormError, listed, quoted
from ibnorm_export.progress import Progress, silent
from ibnorm_export.runtimes.registry import BACKENDS, check_backend, fused_library, open_runner
from ibnorm_export.runtimes.runner import Backend, Kernels, Runner

__all__ = ["bench", "bench_forward", "check_candidates", "input_axes"]


def bench(
    exported: ExportedModel | str | Path,
    *,
    model: LoadedModel | None = None,
    against: Sequence[str | Path | ExportedModel] = (),
    options: BenchOptions | None = None,
    progress: Progress = silent,
) -> BenchReport | GenerationReport:
    """Measure an exported model by itself, or compare it with PyTorch and other exports.

    A file is measured by the latency of one pass. A folder that generates text is measured on the CPU by its time to
    the first token and between tokens.

    Args:
        exported: a file or folder that `export` wrote, or the path of one.
        model: the checkpoint; needed to compare with PyTorch. For a folder that generates text it is loaded with the
            task "text-generation".
        against: what to compare with. For a file: "torch", "torch.compile", "reference-load", other exports, or other
            backends that run the same file, such as "openvino". For a folder that generates text: "torch" or other such
            folders.
        options: see `BenchOptions`.
        progress: receives the progress of the work.

    Returns:
        A `BenchReport`, or a `GenerationReport` for a folder that generates text.

    Raises:
        IBNormError: a candidate is unknown or needs the checkpoint, the sequence is longer than the model has
            positions, or an option does not apply to a folder that generates text.
        BackendUnavailable: the backend is not installed, or cannot compute the file's type here.
    """
    options = BenchOptions() if options is None else options
    path = exported.path if isinstance(exported, ExportedModel) else Path(exported)
    if options.backend == Backend.ORT_CPU and generates_text(path):
        with _torch_threads(options.thread_count):
            return bench_generation(path, model=model, against=against, options=options, progress=progress)
    exported = exported if isinstance(exported, ExportedModel) else ExportedModel(path)
    if options.generation != GenerationOptions():
        raise IBNormError(
            f"--prompts and --batches (BenchOptions.generation) do not apply to {path}, which is measured by one pass: "
            "use --batch and --seq (BenchOptions.sizes)"
        )
    return bench_forward(exported, model=model, against=against, options=options, progress=progress)


def bench_forward(
    exported: ExportedModel,
    *,
    model: LoadedModel | None = None,
    against: Sequence[str | Path | ExportedModel] = (),
    options: BenchOptions | None = None,
    progress: Progress = silent,
) -> BenchReport:
    """Measure the latency of one pass, also of a file that generates text; arguments and errors as in `bench`."""
    options = BenchOptions() if options is None else options
    check_candidates(against, options=options)
    _require_sizes(exported, options.sizes)
    sizes = {BATCH: 1, SEQUENCE: default_length(exported.metadata.max_positions), **options.sizes}
    own = _own_axes(exported, options.sizes, length=sizes[SEQUENCE])
    _require_axes(exported, options.sizes, also={SEQUENCE} if own else set())
    sizes = own | sizes | axis_sizes(exported.metadata.shape)
    _require_runnable(exported, options=options, length=sizes.get(TOTAL, sizes[SEQUENCE]))
    inputs = draw_inputs(exported, sizes, seed=options.seed)
    with _torch_threads(options.thread_count):
        candidates = _candidates(exported, model=model, against=against, options=options)
        report = measure(
            candidates,
            inputs,
            threads=options.thread_count,
            rounds=options.rounds,
            timing=options.loop,
            progress=progress,
        )
    quantization = exported.metadata.quantization
    precision = exported.dtype if quantization is None else f"{exported.dtype}, int{quantization.bits} weights"
    report = replace(report, model=str(exported.path), require_fused=options.require_fused, precision=str(precision))
    if not BACKENDS[options.backend].runs_fused_kernels or options.provider is not None:
        return report
    from ibnorm_export.runtimes.norm_executions import norm_executions

    library = fused_library(options.backend, options.kernels)
    report = replace(report, norms=norm_executions(exported, inputs, library=library, backend=options.backend))
    if options.loading == 0:
        return report
    return replace(
        report,
        loading=measure_loading(
            exported.path,
            inputs,
            name=options.backend,
            threads=options.thread_count,
            library=library,
            processes=options.loading,
        ),
    )


def _require_runnable(exported: ExportedModel, *, options: BenchOptions, length: int) -> None:
    if options.loading and (options.backend != Backend.ORT_CPU or options.provider is not None):
        raise IBNormError(
            f"loading can only be measured with backend {Backend.ORT_CPU} and without another execution provider: "
            "leave out --loading, or the other one"
        )
    if options.backend == Backend.ORT_CPU and exported.dtype == DType.BF16:
        raise BackendUnavailable(
            "ONNX Runtime has no bfloat16 kernels on the CPU (MatMul among them), so this model cannot be timed "
            "here: export --dtype fp32, or use a GPU"
        )
    longest = exported.metadata.max_positions
    if 0 < longest < length:
        raise IBNormError(
            f"{exported.path} has {longest} positions, fewer than a sequence of {length}: use at most {longest} (--seq)"
        )


def _own_axes(exported: ExportedModel, given: Mapping[str, int], *, length: int) -> dict[str, int]:
    """The size of the one axis of a name of the user's own, such as time: it is taken for the sequence.

    With several such axes, or with the size of an example and no `given` length, there is nothing to take.
    """
    known = (BATCH, SEQUENCE, PAST, TOTAL, CAPACITY)
    own = {axis for tensor in exported.inputs for axis in tensor.shape[1:] if isinstance(axis, str)}
    own = {axis for axis in own if axis_name(axis) not in known}
    example = exported.metadata.arguments.get("sizes", {})
    return dict.fromkeys(own, length) if len(own) == 1 and (SEQUENCE in given or not own & set(example)) else {}


def _require_sizes(exported: ExportedModel, sizes: Mapping[str, int]) -> None:
    """Raise IBNormError for a size that an export with fixed sizes does not take."""
    for axis, size in axis_sizes(exported.metadata.shape).items():
        if sizes.get(axis, size) != size:
            raise IBNormError(
                f"{exported.path} takes only {axis} {size}, not {sizes[axis]}: leave the size out, or export with "
                f"--shape {axis}={sizes[axis]}"
            )


def _require_axes(exported: ExportedModel, sizes: Mapping[str, int], *, also: set[str]) -> None:
    """Raise IBNormError for a size of an axis that the inputs do not have.

    Args:
        exported: the file.
        sizes: the user's sizes, by today's names.
        also: names that are understood besides those of the inputs.
    """
    dynamic = input_axes(exported)
    known = {axis_name(axis) for axis in dynamic} | axis_sizes(exported.metadata.shape).keys() | also
    legal = (
        f"the sizes of these can be given: {listed(dynamic)}" if dynamic else "all their sizes are fixed: leave it out"
    )
    for axis in sizes:
        if axis not in known:
            near = difflib.get_close_matches(axis, dynamic, n=1, cutoff=0.6)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise IBNormError(f"the inputs of {exported.path} have no axis {quoted(axis)}; {legal}{hint}")


def input_axes(exported: ExportedModel) -> tuple[str, ...]:
    """Return the names of the dynamic axes of the inputs, in order."""
    return tuple(dict.fromkeys(axis for tensor in exported.inputs for axis in tensor.shape if isinstance(axis, str)))


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    """Give PyTorch as many threads as the other candidates have, and restore its own number afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _candidates(
    exported: ExportedModel,
    *,
    model: LoadedModel | None,
    against: Sequence[str | Path | ExportedModel],
    options: BenchOptions,
) -> dict[str, Runner]:
    """Runners by the name that is reported; the file itself is named after its backend."""
    for other in against:
        if other in TORCH_CANDIDATES and model is None:
            raise IBNormError(f"comparing with {other} needs the checkpoint: add --checkpoint DIR (model= in Python)")
    candidates = {options.backend: _open(exported, options, engine=options.engine)}
    for other in against:
        if other in TORCH_CANDIDATES:
            assert model is not None
            candidates[str(other)] = _torch_runner(
                model, exported.dtype, compiled=other == "torch.compile", on_gpu=options.backend == Backend.ORT_CUDA
            )
        elif other == REFERENCE_LOAD:
            candidates[REFERENCE_LOAD] = ReferenceLoad()
        elif other in BACKEND_CANDIDATES:
            candidates[str(other)] = _open(exported, _for_backend(options, str(other)))
        else:
            second = other if isinstance(other, ExportedModel) else ExportedModel(other)
            candidates[str(second.path)] = _open(second, options)
    return candidates


def check_candidates(against: Sequence[str | Path | ExportedModel], *, options: BenchOptions) -> None:
    """Raise the errors of `bench` about backends and candidates of a file before a checkpoint is read.

    Args:
        against: as in `bench`.
        options: the backend, and what applies to it.

    Raises:
        IBNormError: a candidate is unknown, or is the backend itself, or the backend does not take an option.
        BackendUnavailable: the backend, or one that it is compared with, is not installed.
    """
    check_backend(options.backend, engine=options.engine, provider=options.provider, npm=options.npm)
    for other in against:
        named = (*TORCH_CANDIDATES, REFERENCE_LOAD, *BACKEND_CANDIDATES)
        if not isinstance(other, ExportedModel) and other not in named and not Path(other).exists():
            raise IBNormError(
                f"cannot compare with {str(other)!r}: it is neither one of "
                f"{', '.join((*TORCH_CANDIDATES, *BACKEND_CANDIDATES))} nor an exported file"
            )
        if other == options.backend:
            raise IBNormError(f"cannot compare backend {other} with itself: leave it out of --against")
        if other in BACKEND_CANDIDATES:
            its = _for_backend(options, str(other))
            check_backend(its.backend, npm=its.npm)


def _for_backend(options: BenchOptions, backend: str) -> BenchOptions:
    """The options for another backend, which takes what applies to it."""
    npm = options.npm if BACKENDS[backend].takes_npm else None
    return replace(options, backend=backend, kernels=Kernels.AUTO, provider=None, npm=npm)


def _open(exported: ExportedModel, options: BenchOptions, *, engine: Path | None = None) -> Runner:
    return open_runner(
        options.backend,
        exported,
        threads=options.thread_count,
        kernels=options.kernels,
        engine=engine,
        provider=options.provider,
        npm=options.npm,
    )


def _torch_runner(model: LoadedModel, dtype: str, *, compiled: bool, on_gpu: bool) -> Runner:
    from ibnorm_export.runtimes.torch import TorchCudaRunner, TorchRunner

    module = model.in_dtype(torch_dtype(DType(dtype)))
    return (TorchCudaRunner if on_gpu else TorchRunner)(model, module, compiled=compiled)
