"""Norms over so many values that their function must sum in blocks, and the check of such functions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.checker
import onnx.helper
import onnx.numpy_helper
import pytest

from ibnorm_export import Compression, IBNormSpec, NormConfig, models
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.exporter.export import ExportOptions, export
from ibnorm_export.op import onnx_functions as onnx_op
from ibnorm_export.op import reference
from ibnorm_export.op.spec import DOMAIN
from ibnorm_export.runtimes.ort import OrtRunner
from ibnorm_export.runtimes.runner import Kernels
from ibnorm_export.verifier.verify import VerifyOptions, verify
from tests.support.accuracy import relative_error
from tests.support.checkpoints import RESNET
from tests.support.one_norm import one_norm

#: Size of ResNet's first feature map, 64 channels of 112 by 112.
WIDE = 802_816


@pytest.mark.parametrize("kind", list(Compression))
@pytest.mark.parametrize("skip", [False, True], ids=["plain", "skip"])
@pytest.mark.parametrize("mean", [0.0, 10.0])
def test_sums_in_blocks_are_accurate(kind: Compression, skip: bool, mean: float, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x, other = rng.standard_normal((2, 1, 3, WIDE)).astype(np.float32)
    x += np.float32(mean)
    scale, bias = rng.standard_normal((2, WIDE)).astype(np.float32)
    spec = IBNormSpec(kind)
    file = one_norm(tmp_path / "m.onnx", spec, "fp32", skip, scale, bias)
    inputs = {"X": x, **({"skip": other} if skip else {})}
    exact = reference.ibnorm(x + other if skip else x, scale, bias=bias, spec=spec)

    def error(widths: set[int]) -> float:
        del file.proto.functions[:]
        make = onnx_op.skip_function if skip else onnx_op.function
        file.proto.functions.append(make(kind, file.opset, widths=widths))
        onnx.checker.check_model(file.proto, full_check=True)
        return relative_error(OrtRunner(file.proto.SerializeToString()).run(inputs)["Y"], exact)

    assert error({WIDE, 25_088}) < 1e-6
    assert error({25_088}) > 2e-6, "the narrow body would be accurate enough"


@pytest.mark.parametrize(
    ("widths", "block"),
    [((65_536,), 0), ((65_537,), 1), ((WIDE,), 1024), ((WIDE, 200_704, 25_088), 896), ((131_072, 64), 64)],
)
def test_a_block_divides_every_width(widths: tuple[int, ...], block: int) -> None:
    body = onnx_op.functions(20, [("IBNormT", width) for width in widths])
    constants = [a.t for n in body["IBNormT"].node if n.output[0] == "block" for a in n.attribute]
    assert [onnx.numpy_helper.to_array(tensor).tolist() for tensor in constants] == ([[block]] if block else [])
    assert "LayerNormalization" in {n.op_type for n in body["IBNormS"].node}, "no norm of this type is wide"


@pytest.mark.parametrize("kind", list(Compression))
def test_inputs_without_rows_and_of_any_rank(kind: Compression) -> None:
    body = onnx_op.function(kind, 20, widths={65_536 + 64, 64})
    node = onnx_op.node("X", "scale", bias="bias", y="Y", spec=IBNormSpec(kind))
    info = onnx.helper.make_tensor_value_info
    one = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [node], "g", [info("X", one, None), info("scale", one, [64]), info("bias", one, [64])], [info("Y", one, None)]
    )
    file = onnx.helper.make_model(graph, functions=[body], opset_imports=onnx_op.opset_imports(20), ir_version=10)
    runner = OrtRunner(file.SerializeToString())
    scale, bias = np.random.default_rng(1).standard_normal((2, 64)).astype(np.float32)
    for shape in ((64,), (5, 64), (2, 3, 4, 64), (0, 64), (2, 0, 64)):
        x = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
        y = runner.run({"X": x, "scale": scale, "bias": bias})["Y"]
        assert y.shape == shape
        if x.size:
            assert relative_error(y, reference.ibnorm(x, scale, bias=bias, spec=IBNormSpec(kind))) <= 5e-7


WIDE_RESNET = {**RESNET, "image_size": 224}


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose norms have one op type and widths of 100,352, 25,088 and 12,544 values."""
    config = {"compression": "T", "lambda": 4.0, "epsilon": 1e-5, "convention": "divide", "grouping": "axes", "axis": 1}
    folder = tmp_path_factory.mktemp("resnet")
    models.save(models.new_model(WIDE_RESNET, NormConfig.from_config(config)), folder)
    return folder


@pytest.fixture(scope="module")
def exported(resnet: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportedModel:
    return export(models.load(resnet), tmp_path_factory.mktemp("exported") / "m.onnx")


FUNCTIONS = VerifyOptions(samples=1, kernels=Kernels.FUNCTION)


@pytest.mark.parametrize("inline", [False, True])
def test_a_wide_model_is_verified(resnet: Path, exported: ExportedModel, tmp_path: Path, inline: bool) -> None:
    if inline:
        exported = export(models.load(resnet), tmp_path / "m.onnx", options=ExportOptions(inline=True))
    assert "LayerNormalization" not in {n.op_type for f in exported.proto.functions for n in f.node}
    report = verify(exported, models.load(resnet), options=FUNCTIONS)
    assert report, report.findings
    assert report.numeric is not None
    assert max(o.error for o in report.numeric.outputs) < 1e-6


def _narrow(body: onnx.FunctionProto) -> onnx.FunctionProto:
    return onnx_op.function(Compression.TANH, 20)


def _other_block(body: onnx.FunctionProto) -> onnx.FunctionProto:
    return onnx_op.function(Compression.TANH, 20, widths={100_352})


def _no_centring(body: onnx.FunctionProto) -> onnx.FunctionProto:
    square = next(n for n in body.node if n.output[0] == "square")
    square.input[:] = ["c", "c"]
    return body


def _wrong_axis(body: onnx.FunctionProto) -> onnx.FunctionProto:
    outer = next(n for n in body.node if n.output[0] == "outer")
    outer.attribute[0].t.CopyFrom(onnx.numpy_helper.from_array(np.array([-1]), outer.attribute[0].t.name))
    return body


@pytest.mark.parametrize("change", [_narrow, _other_block, _no_centring, _wrong_axis])
def test_a_changed_body_is_rejected(
    resnet: Path, exported: ExportedModel, tmp_path: Path, change: Callable[[onnx.FunctionProto], onnx.FunctionProto]
) -> None:
    proto = onnx.load(exported.path)
    (body,) = (f for f in proto.functions if f.domain == DOMAIN)
    changed = change(body)
    del proto.functions[:]
    proto.functions.append(changed)
    onnx.save(proto, tmp_path / "m.onnx")
    report = verify(ExportedModel(tmp_path / "m.onnx"), models.load(resnet), options=FUNCTIONS)
    assert report.static is not None
    assert [f.where for f in report.static.findings] == ["function IBNormT"]


def test_blocks_are_rejected_in_a_file_with_narrow_norms(
    vit_checkpoint: Path, exported_vit: ExportedModel, tmp_path: Path
) -> None:
    proto = onnx.load(exported_vit.path)
    names = [f.name for f in proto.functions]
    del proto.functions[:]
    wide = onnx_op.functions(exported_vit.opset, [(name, 131_072) for name in names])
    proto.functions.extend(wide[name] for name in names)
    onnx.save(proto, tmp_path / "m.onnx")
    report = verify(ExportedModel(tmp_path / "m.onnx"), models.load(vit_checkpoint), options=FUNCTIONS)
    assert report.static is not None
    assert {f.where for f in report.static.findings} == {f"function {name}" for name in names}
