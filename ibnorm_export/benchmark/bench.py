"""Set up an exported file and PyTorch for a fair race: same inputs, same threads, one thread pool."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.loaded_model import LoadedModel, torch_dtype
from ibnorm_export.artifacts.random_inputs import draw
from ibnorm_export.artifacts.tensors import DType
from ibnorm_export.benchmark.measure import BenchOptions, BenchReport, bench
from ibnorm_export.errors import BackendUnavailable, IBNormError
from ibnorm_export.progress import Progress, silent
from ibnorm_export.runtimes.registry import fused_library, open_runner
from ibnorm_export.runtimes.runner import Kernels, Runner

__all__ = ["OPPONENTS", "contest"]

#: What `--against` takes.
OPPONENTS: Final = ("torch", "torch.compile")


def contest(
    exported: ExportedModel,
    backend: str,
    *,
    model: LoadedModel | None,
    against: Sequence[str],
    sizes: Mapping[str, int],
    threads: int,
    options: BenchOptions | None = None,
    seed: int = 0,
    kernels: Kernels = Kernels.AUTO,
    progress: Progress = silent,
    beside: Sequence[Runner] = (),
    engine: Path | None = None,
) -> BenchReport:
    """Race an exported file on a backend against PyTorch on its checkpoint.

    Args:
        exported: the file.
        backend: see `ibnorm_export.runtimes.BACKENDS`.
        model: the checkpoint; needed for an opponent.
        against: of `OPPONENTS`; may be empty.
        sizes: of the dynamic axes, by name.
        threads: of every contender; torch's are restored afterwards.
        options, progress: see `bench`.
        seed: of the inputs.
        kernels: how the norms run where the backend has a choice.
        beside: more contenders.
        engine: built from the file before, for TensorRT; None builds one.

    Raises:
        IBNormError: an unknown opponent, or one without a checkpoint; more tokens than the model has positions.
        BackendUnavailable: the backend is not installed, or cannot compute the file's type here.
    """
    for name in against:
        if name not in OPPONENTS:
            raise IBNormError(f"cannot compare with {name!r}; known are {', '.join(OPPONENTS)}")
    if against and model is None:
        raise IBNormError(f"comparing with {', '.join(against)} needs the checkpoint: add --checkpoint DIR")
    dtype = DType(exported.dtype)
    if backend == "ort-cpu" and dtype is DType.BF16:
        raise BackendUnavailable(
            "ONNX Runtime has no bfloat16 kernels on the CPU (MatMul among them), so this model cannot be timed "
            "here: export --dtype fp32, or use a GPU"
        )
    longest, asked = exported.metadata.max_positions, sizes.get("total", sizes.get("sequence", 0))
    if 0 < longest < asked:
        raise IBNormError(f"{exported.path} has {longest} positions, fewer than a sequence of {asked}")
    inputs = draw(exported, sizes, seed=seed)
    contenders: list[Runner] = [open_runner(backend, exported, threads=threads, kernels=kernels, engine=engine)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        if against and model is not None:
            from ibnorm_export.runtimes.torch import TorchCudaRunner, TorchRunner

            module = model.in_dtype(torch_dtype(dtype))
            make = TorchCudaRunner if backend == "ort-cuda" else TorchRunner
            contenders += [make(model, module, compiled=name == "torch.compile") for name in against]
        contenders += beside
        report = bench(contenders, inputs, threads=threads, options=options, progress=progress)
    finally:
        torch.set_num_threads(before)
    if not backend.startswith("ort-"):
        return report
    from ibnorm_export.runtimes.norm_executions import norm_executions

    return replace(
        report, norms=norm_executions(exported, inputs, library=fused_library(backend, kernels), backend=backend)
    )
