"""Engines that TensorRT-RTX builds without a GPU, and what their norms become."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from ibnorm_export import models
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.tensors import DType
from ibnorm_export.errors import EngineError
from ibnorm_export.exporter.export import ExportOptions, export
from ibnorm_export.exporter.text_folder import export_folder
from ibnorm_export.op.spec import Compression, IBNormSpec
from ibnorm_export.runtimes.tensorrt.build import build_engine
from ibnorm_export.runtimes.tensorrt.engine import Engine, read_engine
from ibnorm_export.runtimes.tensorrt.norm_kernels import kernels_in_plan
from ibnorm_export.runtimes.tensorrt.options import EngineOptions, Runtime
from ibnorm_export.runtimes.tensorrt.profiles import parse_ranges
from tests.support.json_documents import read_document
from tests.support.one_norm import TYPES
from tests.support.one_norm import one_norm as one_norm_model

if importlib.util.find_spec("tensorrt_rtx_bindings") is None:
    pytest.skip("TensorRT-RTX is not installed: pip install 'ibnorm-export[tensorrt-rtx]'", allow_module_level=True)

TARGETS = ("sm_89", "sm_120")


def options(**rest: Any) -> EngineOptions:
    return EngineOptions(Runtime.TENSORRT_RTX, compute_capabilities=TARGETS, **rest)


def one_norm(path: Path, compression: Compression, dtype: str, skip: bool) -> ExportedModel:
    values = np.arange(384) % 7 / 4 - 0.75
    return one_norm_model(path, IBNormSpec(compression, 3.0), dtype, skip, values, values)


@pytest.mark.parametrize("skip", [False, True], ids=["plain", "skip"])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("compression", Compression, ids=lambda c: c.value)
def test_a_single_norm_is_one_kernel(tmp_path: Path, compression: Compression, dtype: str, skip: bool) -> None:
    engine = build_engine(
        one_norm(tmp_path / "op.onnx", compression, dtype, skip), tmp_path / "op.plan", options=options()
    )
    assert [(n.module, n.realised, len(n.kernels)) for n in engine.norms] == [("the_norm", "fused", 1)]


@pytest.mark.parametrize("dtype", TYPES)
def test_the_generated_kernel_keeps_the_accurate_logarithm(tmp_path: Path, dtype: str) -> None:
    """Max, Log and Div remain in that order, and Log is logf rather than hlog or __logf."""
    model = one_norm(tmp_path / "op.onnx", Compression.LOGARITHMIC, dtype, skip=False)
    engine = build_engine(model, tmp_path / "op.plan", options=options())
    assert re.search("MaxAddLogMulDiv", engine.norms[0].kernels[0])
    text = engine.path.read_bytes().decode("latin-1")
    assert re.search(r"__myln_float __myln_log___myln_float___myln_float\(__myln_float x\) \{return logf\(x\);\}", text)
    start = f'extern "C" __global__ void {engine.norms[0].kernels[0]}'
    bodies = [body.split("\x00")[0] for body in text.split(start)[1:]]
    assert bodies
    for body in bodies:
        # A plan contains the body once for each way to launch it.
        body = body.split('extern "C" __global__')[0]
        largest, log = body.find("__myln_max___myln_float"), body.find("__myln_log___myln_float___myln_float")
        assert 0 < largest < log
        assert body.find("__myln_div___myln_float___myln_float", log) > log
        assert not re.search(r"hlog|__logf|__myln_log___myln_half|__myln_log___myln_bf16", body)


def small(family: str, request: pytest.FixtureRequest) -> Any:
    return models.load(request.getfixturevalue(f"{family}_checkpoint"))


@pytest.mark.parametrize(("dtype", "fuse_skip"), [("fp32", False), ("fp32", True), ("fp16", False), ("bf16", False)])
@pytest.mark.parametrize("family", ["llama", "vit"])
def test_models_build_for_both_targets(
    tmp_path: Path, family: str, dtype: str, fuse_skip: bool, request: pytest.FixtureRequest
) -> None:
    """Each norm takes at most two kernels. The last of a ViT takes one: the class token is selected before it."""
    model = small(family, request)
    exported = export(model, tmp_path / "m.onnx", options=ExportOptions(DType(dtype), fuse_skip=fuse_skip))
    engine = build_engine(exported, tmp_path / "m.plan", options=options())
    assert len(engine.norms) == 5
    counts = {norm.module: len(norm.kernels) for norm in engine.norms}
    assert set(counts.values()) <= {1, 2}, counts
    if family == "vit":
        assert counts["vit.layernorm"] == 1


@pytest.mark.parametrize("dtype", TYPES)
def test_a_cache_has_a_profile_for_prompts_and_one_for_tokens(
    tmp_path: Path, llama_checkpoint: Path, dtype: str
) -> None:
    model = models.load(llama_checkpoint, task="text-generation")
    exported = export_folder(model, tmp_path / "llama", options=ExportOptions(DType(dtype)))
    engine = build_engine(exported, tmp_path / "llama.plan", options=options())
    assert [item.name for item in engine.description.profiles] == ["prefill", "decode"]
    total = {
        p.name: r.largest for p in engine.description.profiles for r in p.ranges if r.axis == "total_sequence_length"
    }
    assert total == {"prefill": 64, "decode": 64}  # the model's own positions
    # Both profiles are in the plan, and the report describes the one with more kernels.
    graphs = kernels_in_plan(engine.path.read_bytes())
    assert len(graphs) == 2
    assert [len(norm.kernels) for norm in engine.norms] == [1] * 5


# -- the file and its description ------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp("engine")
    ranges = parse_ranges(["sequence=2x64x256"])
    model = one_norm(folder / "op.onnx", Compression.TANH, "fp32", skip=False)
    return build_engine(model, folder / "op.plan", options=options(ranges=ranges, workspace_bytes=1 << 28))


def test_the_description_next_to_the_plan(engine: Engine) -> None:
    read = read_engine(engine.path)
    assert read == engine
    about = json.loads(engine.path.with_name("op.plan.json").read_text())
    assert about["source"] == "op.onnx"
    assert about["runtime"] == "tensorrt-rtx"
    assert about["compute_capabilities"] == list(TARGETS)
    assert about["norm"] == "function"
    assert "fuses the function" in about["why"]
    ranges = [(p["axis"], p["smallest"], p["optimal"], p["largest"]) for p in about["profiles"][0]["ranges"]]
    assert ranges == [("batch_size", 1, 1, 8), ("sequence_length", 2, 64, 256)]


def copy_of(engine: Engine, folder: Path) -> Path:
    for name in ("op.plan", "op.plan.json"):
        (folder / name).write_bytes(engine.path.with_name(name).read_bytes())
    return folder / "op.plan"


def change(plan: Path, **values: Any) -> None:
    beside = plan.with_name("op.plan.json")
    beside.write_text(json.dumps({**json.loads(beside.read_text()), **values}))


def test_bad_engines_are_rejected(engine: Engine, tmp_path: Path) -> None:
    plan = copy_of(engine, tmp_path)
    change(plan, runtime_version="1.2.3")
    with pytest.raises(EngineError, match=r"was built by tensorrt-rtx 1\.2\.3; 1\.\S+ is installed"):
        read_engine(plan)
    plan = copy_of(engine, tmp_path)
    plan.write_bytes(plan.read_bytes()[:-7])
    with pytest.raises(EngineError, match="is truncated"):
        read_engine(plan)
    plan = copy_of(engine, tmp_path)
    plan.write_bytes(plan.read_bytes()[:-1] + b"?")
    with pytest.raises(EngineError, match=r"is not the engine that op\.plan\.json describes"):
        read_engine(plan)
    plan = copy_of(engine, tmp_path)
    plan.with_name("op.plan.json").write_text("{")
    with pytest.raises(EngineError, match="is damaged"):
        read_engine(plan)
    plan.unlink()
    with pytest.raises(EngineError, match="does not exist"):
        read_engine(plan)


def test_an_unsupported_operator_is_named(tmp_path: Path) -> None:
    info = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node("Det", ["X"], ["Y"], name="of_three")
    graph = onnx.helper.make_graph(
        [node], "g", [info("X", onnx.TensorProto.FLOAT, [2, 3, 3])], [info("Y", onnx.TensorProto.FLOAT, [2])]
    )
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 22)], ir_version=10),
        tmp_path / "d.onnx",
    )
    with pytest.raises(EngineError, match=r"does not support the operator Det \(node 'of_three'\)"):
        build_engine(ExportedModel(tmp_path / "d.onnx"), tmp_path / "d.plan", options=options())
    assert not (tmp_path / "d.plan").exists()


def test_an_unknown_target_is_rejected(tmp_path: Path) -> None:
    model = one_norm(tmp_path / "op.onnx", Compression.LINEAR, "fp32", skip=False)
    with pytest.raises(EngineError, match=r"compute capability is 'sm_90'; it must be one of sm_75"):
        build_engine(
            model, tmp_path / "p.plan", options=EngineOptions(Runtime.TENSORRT_RTX, compute_capabilities=["sm_90"])
        )


def test_the_command_line(tmp_path: Path) -> None:
    one_norm(tmp_path / "op.onnx", Compression.LOGARITHMIC, "fp16", skip=True)
    command = [str(Path(sys.executable).with_name("ibnorm-export")), "build-engine", str(tmp_path / "op.onnx")]
    command += ["-o", str(tmp_path / "op.plan"), "--runtime", "tensorrt-rtx", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    printed = read_document(done.stdout, "build-engine")
    assert printed["norms"][0]["realised"] == "fused"
    assert printed["compute_capabilities"] == "the runtime's default"
    assert printed["size_bytes"] == (tmp_path / "op.plan").stat().st_size
