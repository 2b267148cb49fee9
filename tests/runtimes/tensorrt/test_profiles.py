"""Profiles, options and messages of engines, without TensorRT. tests/custom_ops/tensorrt builds real engines."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.cli import main
from ibnorm_export.errors import BackendUnavailable, EngineError
from ibnorm_export.op import native
from ibnorm_export.op import onnx_functions as onnx_op
from ibnorm_export.op.spec import IBNormSpec
from ibnorm_export.runtimes.tensorrt import bindings
from ibnorm_export.runtimes.tensorrt.build import build_engine
from ibnorm_export.runtimes.tensorrt.norm_kernels import kernels_in_inspection, kernels_in_plan, norm_layers
from ibnorm_export.runtimes.tensorrt.options import EngineOptions, NormRoute, Runtime
from ibnorm_export.runtimes.tensorrt.profiles import Profile, parse_ranges, profiles, shapes_of


def model(path: Path, axes: tuple[str | int, ...] = ("batch", "sequence", 8)) -> ExportedModel:
    nodes = [
        onnx_op.node("X", "scale", bias="bias", y="middle", spec=IBNormSpec("L"), name="first"),
        onnx_op.node("middle", "scale", bias="bias", y="Y", spec=IBNormSpec("L"), name="second"),
    ]
    info = onnx.helper.make_tensor_value_info
    ends = [info(name, onnx.TensorProto.FLOAT, list(axes)) for name in ("X", "Y")]
    weights = [onnx.helper.make_tensor(n, onnx.TensorProto.FLOAT, [8], [1.0] * 8) for n in ("scale", "bias")]
    graph = onnx.helper.make_graph(nodes, "two", ends[:1], ends[1:], weights)
    bodies = [onnx_op.functions(20)["IBNormL"]]
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=onnx_op.opset_imports(20), ir_version=10, functions=bodies), path
    )
    return ExportedModel(path)


# -- profiles ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sequence", "it must be NAME=MINxOPTxMAX"),
        ("sequence=1x2", "it must be NAME=MINxOPTxMAX"),
        ("sequence=1x2xq", "it must be NAME=MINxOPTxMAX"),
        ("=1x2x3", "it must be NAME=MINxOPTxMAX"),
        ("sequence=-1x2x3", "it must be NAME=MINxOPTxMAX"),
        ("sequence=4x2x8", "at least 1 and in order"),
        ("sequence=1x9x8", "at least 1 and in order"),
        ("sequence=0x1x8", "at least 1 and in order"),
        ("decode:=1x1x1", "it must be NAME=MINxOPTxMAX"),
        ("past=0x2x1", "at least 0 and in order"),
    ],
)
def test_bad_profiles_are_rejected(text: str, words: str) -> None:
    with pytest.raises(EngineError, match=words):
        parse_ranges([text])


def test_a_repeated_profile_is_rejected() -> None:
    with pytest.raises(EngineError, match="'batch' is given twice"):
        parse_ranges(["batch=1x1x1", "batch=1x2x3"])


def sizes(profile: Profile) -> dict[str, tuple[int, int, int]]:
    return {item.axis: (item.smallest, item.optimal, item.largest) for item in profile.ranges}


def test_other_axes_get_defaults(tmp_path: Path) -> None:
    [profile] = profiles(model(tmp_path / "m.onnx"), parse_ranges(["sequence=2x3x4"]))
    assert profile.name == "default"
    assert sizes(profile) == {"batch": (1, 1, 8), "sequence": (2, 3, 4)}
    assert shapes_of(("batch", 5, "sequence"), profile.ranges) == ((1, 5, 2), (1, 5, 3), (8, 5, 4))


@pytest.mark.parametrize(("known", "largest"), [(None, 2048), (0, 2048), (64, 64), (300, 300), (5000, 2048)])
def test_defaults_do_not_exceed_the_models_length(tmp_path: Path, known: int | None, largest: int) -> None:
    exported = with_length(model(tmp_path / "m.onnx"), known)
    assert sizes(profiles(exported, ())[0])["sequence"] == (1, min(128, largest), largest)
    cached = with_length(model(tmp_path / "c.onnx", ("past", "sequence", "total")), known)
    prefill, decode = profiles(cached, ())
    assert (prefill.name, decode.name) == ("prefill", "decode")
    prompt, past = (1, min(128, largest), largest), (1, min(128, largest - 1), largest - 1)
    assert sizes(prefill) == {"past": (0, 0, 0), "sequence": prompt, "total": prompt}
    assert sizes(decode) == {"past": past, "sequence": (1, 1, 1), "total": (2, past[1] + 1, largest)}


def test_names_of_axes_are_todays_or_those_of_earlier_versions(tmp_path: Path) -> None:
    today = model(
        tmp_path / "t.onnx", ("batch_size", "past_sequence_length", "sequence_length", "total_sequence_length")
    )
    given = parse_ranges(["decode:batch=1x2x3", "prefill:sequence_length=4x4x4"])
    prefill, decode = (sizes(profile) for profile in profiles(today, given))
    assert decode["batch_size"] == (1, 2, 3)
    assert prefill["sequence_length"] == prefill["total_sequence_length"] == (4, 4, 4)
    assert decode["total_sequence_length"] == (2, 129, 2048)
    with pytest.raises(EngineError, match="is given twice"):
        parse_ranges(["batch=1x1x1", "batch_size=1x2x3"])


def with_length(exported: ExportedModel, known: int | None) -> ExportedModel:
    if known is not None:
        exported.proto.metadata_props.add(key="ibnorm.max_positions", value=str(known))
    return exported


def test_a_range_for_one_profile_or_for_all(tmp_path: Path) -> None:
    cached = model(tmp_path / "c.onnx", ("batch", "past", "sequence", "total"))
    given = parse_ranges(["batch=1x2x3", "decode:batch=4x5x6", "prefill:past=0x0x64", "decode:total=9x9x9"])
    prefill, decode = (sizes(profile) for profile in profiles(cached, given))
    assert (prefill["batch"], decode["batch"]) == ((1, 2, 3), (4, 5, 6))
    assert prefill["total"] == (1, 128, 2048 + 64)
    assert decode["total"] == (9, 9, 9)
    with pytest.raises(EngineError, match=r"no profile 'decoding'; it has prefill, decode"):
        profiles(cached, parse_ranges(["decoding:batch=1x1x1"]))


def test_axes_must_exist_in_the_model(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"no dynamic axis 'seq'; it has batch, sequence"):
        profiles(model(tmp_path / "m.onnx"), parse_ranges(["seq=1x2x3"]))
    with pytest.raises(EngineError, match=r"axis 'past' has no default sizes: add the range past=MINxOPTxMAX"):
        profiles(model(tmp_path / "p.onnx", ("past", 4, 8)), ())
    with pytest.raises(EngineError, match="no dynamic axis 'batch'; it has none"):
        profiles(model(tmp_path / "s.onnx", (1, 4, 8)), parse_ranges(["batch=1x2x3"]))
    assert profiles(model(tmp_path / "s.onnx", (1, 4, 8)), ()) == ()


# -- layers --------------------------------------------------------------------------------------

_LAUNCH = "function={{ name={} fqn=f args={{}} metadata={} swap_ab=false }}\n"


def test_layers_are_read_from_a_plan(tmp_path: Path) -> None:
    """The profile with more kernels counts; a launch that appears twice counts twice."""
    first, second = "[ONNX Layer: node_of_q | first (IBNormL)]", "[ONNX Layer: node_of_y | second (IBNormL)]"
    one = "header {\n" + _LAUNCH.format("both", first + second)
    two = (
        "\x1e\x00\x05header {\n"
        + _LAUNCH.format("a", first)
        + _LAUNCH.format("a", second)
        + _LAUNCH.format("b", second)
    )
    other = "header {\n" + _LAUNCH.format("matmul", "[ONNX Layer: MatMul_1]")
    layers = norm_layers(model(tmp_path / "m.onnx"), kernels_in_plan((one + two + other).encode()))
    assert [(n.realised, n.kernels) for n in layers] == [("fused", ("both",)), ("split into 2", ("a", "b"))]
    assert all(n.realised == "unknown" for n in norm_layers(model(tmp_path / "m.onnx"), kernels_in_plan(b"other")))


def test_layers_are_read_from_an_inspection(tmp_path: Path) -> None:
    listed = [
        {"Name": "p", "LayerType": "PluginV3", "Metadata": "[ONNX Layer: first]"},
        {"Name": "k", "LayerType": "kgen", "Metadata": "[ONNX Layer: node_of_d | second (IBNormL)]"},
        "only a name",
    ]
    layers = norm_layers(model(tmp_path / "m.onnx"), kernels_in_inspection(json.dumps({"Layers": listed})))
    assert [(n.realised, n.kernels) for n in layers] == [("plugin", ("p",)), ("fused", ("k",))]
    second = [{**listed[1], "Name": "k [profile 1]"}, {**listed[1], "Name": "l [profile 1]"}]  # type: ignore[dict-item]
    text = json.dumps({"Layers": [*listed, *second]})
    layers = norm_layers(model(tmp_path / "m.onnx"), kernels_in_inspection(text))
    assert [n.realised for n in layers] == ["plugin", "split into 2"]


# -- options, runtimes, libraries ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("runtime", "rest", "words"),
    [
        (Runtime.TENSORRT_RTX, {"norm": NormRoute.PLUGIN}, "TensorRT-RTX has no plugins"),
        (Runtime.TENSORRT_RTX, {"embed_plugin": True}, "TensorRT-RTX has no plugins"),
        (Runtime.TENSORRT_RTX, {"timing_cache": Path("t")}, "measures nothing"),
        (Runtime.TENSORRT, {"compute_capabilities": ["sm_89"]}, "builds only for this machine"),
        (Runtime.TENSORRT, {"embed_plugin": True}, 'needs norm "plugin"'),
        (Runtime.TENSORRT, {"workspace_bytes": 0}, "at least 1"),
    ],
)
def test_options_that_do_not_fit_together_are_rejected(runtime: Runtime, rest: dict[str, Any], words: str) -> None:
    with pytest.raises(EngineError, match=words):
        EngineOptions(runtime, **rest)


@pytest.mark.parametrize("runtime", Runtime)
def test_a_missing_runtime_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runtime: Runtime) -> None:
    for name in bindings._MODULES[runtime]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(BackendUnavailable, match=rf"{runtime.value} is not installed: pip install 'ibnorm-export\["):
        build_engine(model(tmp_path / "m.onnx"), tmp_path / "m.plan", options=EngineOptions(runtime))


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_bench_without_a_gpu_exits_with_3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], backend: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    file = model(tmp_path / "m.onnx").path
    monkeypatch.setattr(sys, "argv", ["ibnorm-export", "bench", str(file), "--backend", backend])
    assert main.main() == 3
    output = capfd.readouterr().err
    assert "needs an NVIDIA GPU" in output or f"{backend} is not installed" in output


def test_unusable_plugin_libraries_are_explained(tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailable, match=r"libibnorm_trt\.so is not installed; build it"):
        native.trt_library(tmp_path / "libibnorm_trt.so")
    (tmp_path / "libibnorm_trt.so").write_bytes(b"hello")
    with pytest.raises(BackendUnavailable, match="is not an IBNorm plugin library for this machine"):
        native.trt_library(tmp_path / "libibnorm_trt.so")


def test_a_library_with_another_schema_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Other:
        getCreators = None  # noqa: N815  # TensorRT's name

    (tmp_path / "libibnorm_trt.so").write_bytes(b"")
    monkeypatch.setattr("ctypes.CDLL", lambda path: Other())
    monkeypatch.setattr(native, "_text", lambda library, function: '{"version": 2}')
    with pytest.raises(BackendUnavailable, match=r'implements \{"version": 2\}, but this package'):
        native.trt_library(tmp_path / "libibnorm_trt.so")
