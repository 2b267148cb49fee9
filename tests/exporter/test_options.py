"""Options are converted and checked when they are created, before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ibnorm_export import models
from ibnorm_export.analysis.options import AnalysisOptions
from ibnorm_export.artifacts.metadata import CacheKind, Target, Task
from ibnorm_export.artifacts.tensors import DType
from ibnorm_export.errors import ExportError, IBNormError
from ibnorm_export.exporter.export import ExportOptions, export, task_of
from ibnorm_export.graph.quantization import Quantization


@pytest.mark.parametrize(
    ("dtype", "spellings"),
    [
        (DType.FP32, ("fp32", "float32", "float", "FP32", torch.float32, torch.float, np.float32, np.dtype("float32"))),
        (DType.FP16, ("fp16", "float16", "half", " Half", torch.float16, torch.half, np.float16, np.dtype("float16"))),
        (DType.BF16, ("bf16", "bfloat16", torch.bfloat16)),
    ],
)
def test_a_dtype_is_read_in_every_usual_spelling(dtype: DType, spellings: tuple[Any, ...]) -> None:
    for spelling in (dtype, *spellings):
        assert ExportOptions(spelling).dtype is dtype
        assert AnalysisOptions(dtypes=(spelling,)).dtypes == (dtype,)


@pytest.mark.parametrize("dtype", ["fp64", "double", torch.float64, np.float64, float, 16, None, "", "x" * 1000])
def test_any_other_dtype_is_one_clear_error(dtype: Any) -> None:
    with pytest.raises(ExportError, match=r"it must be one of fp32, fp16, bf16$") as found:
        ExportOptions(dtype)
    assert found.value.exit_code == 2
    assert len(str(found.value)) < 300
    with pytest.raises(IBNormError, match=r"it must be one of fp32, fp16, bf16$"):
        AnalysisOptions(dtypes=(dtype,))


@pytest.mark.parametrize("dtype", ["int8", "int4", torch.int8, np.int8])
def test_an_integer_dtype_points_to_quantised_weights(dtype: Any) -> None:
    with pytest.raises(ExportError, match=r"use ExportOptions\.with_weights\('int[84]'\)"):
        ExportOptions(dtype)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"opset": 17}, "opset is 17; it must be 18 to 26"),
        ({"opset": 27}, "opset is 27; it must be 18 to 26"),
        ({"opset": -1}, "opset is -1"),
        ({"opset": True}, "opset is True"),
        ({"opset": "20"}, "opset is '20'"),
        ({"opset": 20.0}, r"opset is 20\.0"),
        ({"inline": 1}, "inline is 1; it must be True or False"),
        ({"fuse_skip": "no"}, "fuse_skip is 'no'; it must be True or False"),
        ({"cache": "paged"}, "cache is 'paged'; it must be one of dynamic, static"),
        ({"quantization": 4}, "quantization is 4; it must be a Quantization or None"),
        ({"quantization": Quantization(4), "dtype": "half"}, "a model with quantised weights must compute in fp32"),
    ],
)
def test_an_illegal_value_is_named_with_the_legal_ones(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        ExportOptions(**options)


def test_names_become_members() -> None:
    assert ExportOptions(cache="static").cache is CacheKind.STATIC  # type: ignore[arg-type]  # converted


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ("fp32", ExportOptions()),
        ("fp16", ExportOptions(DType.FP16)),
        ("int8", ExportOptions(quantization=Quantization(8, 32, 8))),
        ("int4", ExportOptions(quantization=Quantization(4, 32, 8))),
    ],
)
def test_with_weights_takes_one_name(weights: str, expected: ExportOptions) -> None:
    assert ExportOptions.with_weights(weights) == expected


def test_the_head_of_quantised_weights() -> None:
    options = ExportOptions.with_weights("int4", block_size=64, head="fp32", opset=23, cache=CacheKind.STATIC)
    assert options == ExportOptions(opset=23, quantization=Quantization(4, 64, None), cache=CacheKind.STATIC)
    with pytest.raises(ExportError, match="head is 'fp16'; with quantised weights it must be one of int8, int4, fp32"):
        ExportOptions.with_weights("int4", head="fp16")
    with pytest.raises(ExportError, match="weights is 'int2'; it must be one of fp32, fp16, bf16, int8, int4"):
        ExportOptions.with_weights("int2")


# ---- one call for every target ----


def test_the_task_that_a_target_needs() -> None:
    assert task_of("portable") is Task.FORWARD
    assert task_of(Target.PORTABLE, "text-generation") is Task.TEXT_GENERATION
    assert task_of("ort-genai", Task.FORWARD) is Task.TEXT_GENERATION
    with pytest.raises(ExportError, match="target is 'coreml'; it must be one of portable, ort-genai"):
        task_of("coreml")
    with pytest.raises(ExportError, match="task is 'chat'; it must be one of forward, text-generation"):
        task_of("portable", "chat")


@pytest.mark.parametrize(
    "arguments", [{"target": "ort-genai"}, {"task": "text-generation"}, {"target": Target.ORT_GENAI, "task": "forward"}]
)
def test_a_model_that_was_loaded_for_another_task(
    llama_checkpoint: Path, tmp_path: Path, arguments: dict[str, Any]
) -> None:
    model = models.load(llama_checkpoint)
    with pytest.raises(ExportError, match=r"loaded for the task forward.*task='text-generation'\), or run") as found:
        export(model, tmp_path / "out", **arguments)
    assert "--task text-generation" in str(found.value)
    assert list(tmp_path.iterdir()) == []


def test_a_language_model_becomes_a_folder(llama_checkpoint: Path, tmp_path: Path) -> None:
    model = models.load(llama_checkpoint, task="text-generation")
    exported = export(model, tmp_path / "out", task="text-generation")
    assert exported.path == tmp_path / "out" / "model.onnx"
    assert (tmp_path / "out" / "config.json").is_file()
    assert exported.metadata.task is Task.TEXT_GENERATION
    with pytest.raises(ExportError, match="was loaded for the task text-generation, but this export needs forward"):
        export(model, tmp_path / "m.onnx", task="forward")
