"""Options: one of a few values is a member of an enum or its text, a number is a number; all else is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ibnorm_export import BenchOptions, EngineOptions, IBNormError, PackageOptions, VerifyOptions
from ibnorm_export.analysis.options import AnalysisOptions
from ibnorm_export.artifacts.tensors import DType
from ibnorm_export.benchmark.options import GenerationOptions, Timing
from ibnorm_export.generation.sampling import Sampling
from ibnorm_export.runtimes.runner import Backend, Kernels
from ibnorm_export.runtimes.tensorrt.options import NormRoute, Runtime
from ibnorm_export.serving.options import ServeOptions
from ibnorm_export.serving.text_limits import TextLimits
from ibnorm_export.serving.triton.config import TritonLimits
from ibnorm_export.serving.triton.options import PackagedNorms, RepositoryFormat, TritonBackend


def test_a_text_becomes_the_member_of_the_enum() -> None:
    for options in (VerifyOptions("ort-cuda", kernels="fused"), BenchOptions("ort-cuda", "fused")):  # type: ignore[arg-type]
        assert options.backend is Backend.ORT_CUDA
        assert options.kernels is Kernels.FUSED
    engine: Any = EngineOptions("tensorrt", "plugin", timing_cache="cache", embed_plugin=True)  # type: ignore[arg-type]
    assert (engine.runtime, engine.norm) == (Runtime.TENSORRT, NormRoute.PLUGIN)
    assert isinstance(engine.runtime, Runtime)
    assert engine.timing_cache == Path("cache")
    repository: Any = PackageOptions("kserve", backend="tensorrt", plan="m.plan", warmup="x.npz")  # type: ignore[arg-type]
    assert isinstance(repository.format, RepositoryFormat)
    assert repository.root == "/mnt/models"
    assert repository.backend is TritonBackend.TENSORRT
    assert (repository.plan, repository.warmup) == (Path("m.plan"), Path("x.npz"))
    assert PackageOptions(variant="both").variant is PackagedNorms.BOTH  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VerifyOptions("abacus"), "backend is 'abacus'; it must be one of ort-cpu, "),
        (lambda: VerifyOptions(kernels=None), "kernels is None; it must be one of auto, fused, function"),
        (lambda: BenchOptions("abacus"), "backend is 'abacus'; it must be one of ort-cpu, "),
        (lambda: BenchOptions(kernels="fast"), "kernels is 'fast'; it must be one of auto, fused, function"),
        (lambda: EngineOptions("trt"), "runtime is 'trt'; it must be one of tensorrt, tensorrt-rtx"),
        (lambda: EngineOptions(norm="fused"), "norm is 'fused'; it must be one of function, plugin, auto"),
        (lambda: PackageOptions("tgz"), "format is 'tgz'; it must be one of triton, kserve"),
        (lambda: PackageOptions(variant="x" * 999), "variant is 'xxx"),
    ],
)
def test_anything_else_is_refused_with_the_legal_values(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(IBNormError) as found:
        make()
    assert str(found.value).startswith(message)
    assert len(str(found.value)) < 300


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VerifyOptions(samples="4"), "samples is '4'; it must be a whole number"),
        (lambda: VerifyOptions(samples=True), "samples is True; it must be a whole number"),
        (lambda: BenchOptions(rounds="4"), "rounds is '4'; it must be a whole number"),
        (lambda: BenchOptions(rounds=2.5), "rounds is 2.5; it must be a whole number"),
        (lambda: BenchOptions(threads="2"), "threads is '2'; it must be a whole number, or None for the"),
        (lambda: BenchOptions(sizes={"batch": "2"}), "size of batch is '2'; it must be a whole number"),
        (lambda: BenchOptions(sizes=4), "sizes is 4; it must hold numbers by name"),
        (lambda: Timing(warmup_ms="4"), "warmup_ms is '4'; it must be a number"),
        (lambda: Timing(rest_ms=math.nan), "rest_ms is nan; it must be finite and at least 0"),
        (lambda: GenerationOptions(prompts=128), "prompts is 128; it must be a list of whole numbers"),
        (lambda: GenerationOptions(prompts="128"), "prompts is '128'; it must be a list of whole numbers"),
        (lambda: GenerationOptions(batches=()), "batches is empty; it must hold at least one number"),
        (lambda: ServeOptions(http_port="80"), "http_port is '80'; it must be a whole number; 0 means any"),
        (lambda: ServeOptions(http_port=65536), "http_port is 65536; it must be 0 to 65535; 0 means any"),
        (lambda: ServeOptions(finish_s="5"), "finish_s is '5'; it must be a whole number"),
        (lambda: ServeOptions(text=TextLimits(concurrency="4")), "the text endpoint's limit concurrency is '4'"),
        (lambda: TextLimits(request_s="4"), "the text endpoint's limit request_s is '4'; it must be a number"),
        (lambda: AnalysisOptions(lambdas=4.0), "lambdas is 4.0; it must be a list"),
        (lambda: AnalysisOptions(lambdas=["4"]), "a value of lambdas is '4'; it must be a number"),
        (lambda: AnalysisOptions(samples="4"), "samples is '4'; it must be a whole number"),
        (lambda: AnalysisOptions(alpha="2"), "alpha is '2'; it must be a number"),
        (lambda: TritonLimits(max_batch="4"), "max_batch is '4'; it must be a whole number"),
        (lambda: Sampling("4"), "max_new_tokens is '4'; it must be a whole number"),
        (lambda: Sampling(temperature="1"), "temperature is '1'; it must be a number"),
        (lambda: EngineOptions(workspace_bytes="1"), "workspace_bytes is '1'; it must be a whole number"),
        (lambda: EngineOptions(ranges=["batch=1x2x" + "9" * 5000]), "profile is 'batch=1x2x999"),
    ],
)
def test_a_number_of_another_type_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(IBNormError) as found:
        make()
    assert str(found.value).startswith(message)
    assert len(str(found.value)) < 400


def test_numbers_of_numpy_and_a_single_type_are_taken() -> None:
    assert type(VerifyOptions(samples=np.int64(4)).samples) is int
    options = AnalysisOptions((np.float32(0.5),), "fp16")  # type: ignore[arg-type]  # one type in place of a list
    assert (options.lambdas, options.dtypes) == ((0.5,), (DType.FP16,))
