"""Engines on disk: which are rejected with which message, and which profile accepts which inputs, without TensorRT."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.cli import main
from ibnorm_export.errors import BackendUnavailable, EngineError
from ibnorm_export.op import native
from ibnorm_export.runtimes.tensorrt import bindings as bindings_module
from ibnorm_export.runtimes.tensorrt import build, engine
from ibnorm_export.runtimes.tensorrt.engine import read_engine
from ibnorm_export.runtimes.tensorrt.options import Runtime
from ibnorm_export.runtimes.tensorrt.profiles import Profile, Range, fitting_profile

PLAN = b"a plan of an engine"


def model(path: Path) -> ExportedModel:
    info = onnx.helper.make_tensor_value_info
    ends = [info(name, onnx.TensorProto.FLOAT, ["batch", 8]) for name in ("X", "Y")]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["X"], ["Y"])], "g", ends[:1], ends[1:])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10), path)
    return ExportedModel(path)


@pytest.fixture
def source(tmp_path: Path) -> ExportedModel:
    return model(tmp_path / "m.onnx")


def written(source: ExportedModel, runtime: str = "tensorrt-rtx", **changed: Any) -> Path:
    """Write a plan and its description next to the model."""
    plan = source.path.with_name("m.plan")
    plan.write_bytes(PLAN)
    ranges = [{"axis": "batch", "smallest": 1, "optimal": 1, "largest": 8, "profile": "default"}]
    about = {
        "source": "m.onnx",
        "source_sha256": hashlib.sha256(source.path.read_bytes()).hexdigest(),
        "runtime": runtime,
        "runtime_version": "1.7.1",
        "gpu": None,
        "compute_capabilities": ["sm_89", "sm_120"],
        "profiles": [{"name": "default", "ranges": ranges}],
        "norm": "function",
        "why": "as requested",
        "norms": [],
        "build_s": 1.0,
        "size_bytes": len(PLAN),
        "sha256": hashlib.sha256(PLAN).hexdigest(),
    }
    plan.with_name("m.plan.json").write_text(json.dumps({**about, **changed}))
    return plan


def installed(monkeypatch: pytest.MonkeyPatch, version: str = "1.7.1") -> None:
    monkeypatch.setattr(engine, "bindings", lambda runtime: SimpleNamespace(__version__=version))


def with_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))


def test_a_good_engine_is_read(source: ExportedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch)
    read = read_engine(written(source), source, wanted=Runtime.TENSORRT_RTX)
    assert read.description.profiles == (
        Profile("default", (Range("batch", 1, optimal=1, largest=8, profile="default"),)),
    )


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"gpu": "NVIDIA L4"}, r"was built for NVIDIA L4; this machine has NVIDIA H200: build it again"),
        ({}, r"was built for sm_89, sm_120; this machine has sm_90 \(NVIDIA H200\): build it again"),
    ],
)
def test_an_engine_for_another_gpu_is_rejected(
    source: ExportedModel, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], words: str
) -> None:
    installed(monkeypatch)
    with_gpu(monkeypatch)
    with pytest.raises(EngineError, match=words):
        read_engine(written(source, **changed))
    assert read_engine(written(source, compute_capabilities=["sm_90"]))
    assert read_engine(written(source, compute_capabilities="the runtime's default"))


def truncated(source: ExportedModel) -> Path:
    plan = written(source)
    plan.write_bytes(PLAN[:-3])
    return plan


def changed_source(source: ExportedModel) -> Path:
    plan = written(source)
    source.path.write_bytes(source.path.read_bytes() + b"\x1a\x00")  # adds an empty doc_string
    return plan


BAD = {
    "truncated": (truncated, "is truncated: it has 16 bytes, not 19; build it again"),
    "version": (lambda s: written(s, runtime_version="1.6.0"), "was built by tensorrt-rtx 1.6.0; 1.7.1 is installed"),
    "runtime": (lambda s: written(s, "tensorrt"), "is an engine for tensorrt, not for tensorrt-rtx"),
    "file": (changed_source, "was built from a different file"),
    "profiles": (lambda s: written(s, profiles=[{"name": "x"}]), "is damaged"),
    "missing": (lambda s: s.path.with_name("none.plan"), "none.plan' does not exist"),
}


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    installed(monkeypatch)
    for place in ("runner", "bindings"):  # the latter is what `check_backend` calls
        monkeypatch.setattr(f"ibnorm_export.runtimes.tensorrt.{place}.bindings", engine.bindings)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["ibnorm-export", *words])
    return main.main()


@pytest.mark.parametrize("case", BAD)
def test_bench_reports_a_bad_engine_without_a_gpu(
    source: ExportedModel, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], case: str
) -> None:
    """The exit code is 2, with one line that does not mention the missing GPU."""
    make, words = BAD[case]
    plan = make(source)
    assert run(monkeypatch, "bench", str(source.path), "--backend", "tensorrt-rtx", "--engine", str(plan)) == 2
    output = capfd.readouterr().err.strip()
    assert words in output
    assert "\n" not in output


def test_verify_reports_a_bad_engine_without_a_gpu(
    exported_llama: ExportedModel,
    llama_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(exported_llama.path.parent, tmp_path / "llama")
    source = ExportedModel(tmp_path / "llama" / exported_llama.path.name)
    words = ["verify", str(source.path), str(llama_checkpoint), "--backend", "tensorrt-rtx", "--engine"]
    assert run(monkeypatch, *words, str(truncated(source))) == 2
    assert "m.plan is truncated" in capfd.readouterr().err
    assert run(monkeypatch, *words, str(written(source))) == 3
    assert "needs an NVIDIA GPU" in capfd.readouterr().err


def test_a_good_engine_without_a_gpu_exits_with_3(
    source: ExportedModel, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["bench", str(source.path), "--backend", "tensorrt-rtx", "--engine", str(written(source))]
    assert run(monkeypatch, *words) == 3
    assert "needs an NVIDIA GPU" in capfd.readouterr().err


def test_other_backends_accept_no_engine(
    source: ExportedModel, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    plan = written(source)
    assert run(monkeypatch, "bench", str(source.path), "--engine", str(plan)) == 2
    assert "backend ort-cpu takes no engine" in capfd.readouterr().err


# -- versions of TensorRT --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "known"), [("10.0.1", True), ("11.4.0.106", True), ("9.3.0", False), ("12.0", False)]
)
def test_major_versions_that_the_plugin_supports(version: str, known: bool) -> None:
    problem = native.plugin_problem(version)
    assert (not problem) if known else problem.startswith(f"the plugin library does not support TensorRT {version}")
    trt = SimpleNamespace(__version__=version)
    if not known:
        with pytest.raises(EngineError, match="it supports versions 10 and 11"):
            build._load_plugin(trt, None, embed=False)


@pytest.mark.parametrize("runtime", Runtime)
def test_a_folder_with_the_name_of_a_module_is_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runtime: Runtime
) -> None:
    for name in bindings_module._MODULES[runtime]:
        (tmp_path / name).mkdir()
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(BackendUnavailable, match=f"{runtime.value} is not installed"):
        bindings_module.bindings(runtime)
    for name in bindings_module._MODULES[runtime]:
        monkeypatch.delitem(sys.modules, name)


# -- which profile takes which inputs --------------------------------------------------------------

AXES = {"input_ids": ("batch", "sequence"), "past.0": ("batch", 4, "past", 8), "mask": ("batch", "total")}


def profile(name: str, **ranges: tuple[int, int, int]) -> Profile:
    return Profile(
        name,
        tuple(Range(axis, low, optimal=best, largest=high, profile=name) for axis, (low, best, high) in ranges.items()),
    )


PREFILL = profile("prefill", batch=(1, 1, 8), sequence=(1, 128, 512), past=(0, 0, 0), total=(1, 128, 512))
DECODE = profile("decode", batch=(1, 1, 8), sequence=(1, 1, 1), past=(1, 128, 511), total=(2, 129, 512))
LONG = profile("long", batch=(1, 8, 8), sequence=(1, 512, 512), past=(0, 0, 0), total=(1, 512, 512))


def shapes(batch: int, sequence: int, past: int) -> dict[str, tuple[int, ...]]:
    return {"input_ids": (batch, sequence), "past.0": (batch, 4, past, 8), "mask": (batch, past + sequence)}


@pytest.mark.parametrize(
    ("sizes", "chosen"),
    [((1, 128, 0), 0), ((1, 1, 0), 0), ((2, 1, 5), 1), ((8, 1, 511), 1), ((8, 400, 0), 2), ((1, 130, 0), 0)],
)
def test_the_nearest_profile_that_accepts_the_inputs(sizes: tuple[int, int, int], chosen: int) -> None:
    assert fitting_profile([PREFILL, DECODE, LONG], AXES, shapes=shapes(*sizes)) == chosen


def test_inputs_that_no_profile_accepts() -> None:
    words = (
        "no profile of the engine accepts batch 2, sequence 3, past 5, total 8: prefill accepts batch 1 to 8, sequence"
    )
    with pytest.raises(EngineError, match=words):
        fitting_profile([PREFILL, DECODE], AXES, shapes=shapes(2, 3, 5))
    with pytest.raises(EngineError, match="past 0, total 1: decode accepts"):
        fitting_profile([DECODE], AXES, shapes=shapes(1, 1, 0))
    with pytest.raises(EngineError, match="axis 'batch' has size 2 in one input and 3 in mask"):
        fitting_profile([PREFILL], AXES, shapes={**shapes(2, 3, 0), "mask": (3, 3)})
    assert fitting_profile([], {"X": (1, 8)}, shapes={"X": (1, 8)}) == 0
