"""Options that are one of a few values take a member of the enum or its text, and refuse anything else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ibnorm_export import BenchOptions, EngineOptions, IBNormError, PackageOptions, VerifyOptions
from ibnorm_export.runtimes.runner import Backend, Kernels
from ibnorm_export.runtimes.tensorrt.options import NormRoute, Runtime
from ibnorm_export.serving.triton.options import Format, TritonBackend, Variant


def test_a_text_becomes_the_member_of_the_enum() -> None:
    for options in (VerifyOptions("ort-cuda", kernels="fused"), BenchOptions("ort-cuda", "fused")):  # type: ignore[arg-type]
        assert options.backend is Backend.ORT_CUDA
        assert options.kernels is Kernels.FUSED
    engine: Any = EngineOptions("tensorrt", "plugin", timing_cache="cache", embed_plugin=True)  # type: ignore[arg-type]
    assert (engine.runtime, engine.norm) == (Runtime.TENSORRT, NormRoute.PLUGIN)
    assert isinstance(engine.runtime, Runtime)
    assert engine.timing_cache == Path("cache")
    repository: Any = PackageOptions("kserve", backend="tensorrt", plan="m.plan", warmup="x.npz")  # type: ignore[arg-type]
    assert isinstance(repository.format, Format)
    assert repository.root == "/mnt/models"
    assert repository.backend is TritonBackend.TENSORRT
    assert (repository.plan, repository.warmup) == (Path("m.plan"), Path("x.npz"))
    assert PackageOptions(variant="both").variant is Variant.BOTH  # type: ignore[arg-type]


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
