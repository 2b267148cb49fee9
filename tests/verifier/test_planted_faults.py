"""Faults in a file: each makes the report false, and a finding names it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import pytest
import torch
from safetensors.torch import load_file, save_file

from ibnorm_export import models
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.errors import ModelFileError, ParityError
from ibnorm_export.runtimes.runner import Kernels
from ibnorm_export.verifier.verify import VerifyOptions, verify
from tests.support.planting import (
    Change,
    drop_norm,
    flip_one_sign,
    initializer,
    norms,
    plant,
    rewrite,
    set_attribute,
    swap_scales,
    tanh_in_every_body,
)
from tests.support.shared_exports import SharedExports

#: With the library of fused kernels installed, the bodies in the file would not run.
FUNCTIONS = VerifyOptions(kernels=Kernels.FUNCTION)


def transpose_one(proto: onnx.ModelProto) -> None:
    rewrite(proto, "model.layers.1.self_attn.q_proj.weight.T", lambda a: a.T)


def exchange_two_norms(proto: onnx.ModelProto) -> None:
    """Exchange two norms: each has the attributes and weights of the other module."""
    _, a, b, *_ = norms(proto)
    a.input[0], b.input[0] = b.input[0], a.input[0]


def nonzero_zeros(proto: onnx.ModelProto) -> None:
    rewrite(proto, "ibnorm.zeros.32", lambda a: a + 0.01)


def rewire_bodies(proto: onnx.ModelProto) -> None:
    for body in proto.functions:
        next(n for n in body.node if n.op_type == "LayerNormalization").input[0] = next(
            n for n in body.node if n.op_type == "Div"
        ).output[0]


def change_epsilon_in_bodies(proto: onnx.ModelProto) -> None:
    for body in proto.functions:
        node = next(n for n in body.node if n.op_type == "LayerNormalization")
        epsilon = next(a for a in node.attribute if a.name == "epsilon")
        epsilon.CopyFrom(onnx.helper.make_attribute("epsilon", 0.5))


def at_second(change: Callable[[onnx.NodeProto], None]) -> Change:
    return lambda proto: change(norms(proto)[1])


def make_a_scale_scalar(proto: onnx.ModelProto) -> None:
    tensor = initializer(proto, norms(proto)[0].input[-2])
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.float32(1.0), tensor.name))


#: fault -> text of a finding, and whether the numeric verdict also finds it.
FAULTS: dict[str, tuple[Change, str, bool]] = {
    "sign of one weight": (flip_one_sign, "down_proj.weight.T: 1 of 2048 values differ .* only in sign", True),
    "T for L in the body": (
        tanh_in_every_body,
        "function IBNormL: the body differs from the operator's definition",
        True,
    ),
    "lambda 4.1": (
        at_second(lambda node: set_attribute(node, "lambd", 4.1)),
        r"layers.0.post_attention_layernorm .*lambd is 4\.1; the checkpoint has 4\.0",
        True,
    ),
    "epsilon times 100": (
        at_second(lambda node: set_attribute(node, "epsilon", 1e-3)),
        "post_attention_layernorm .*epsilon is 0.001",
        True,
    ),
    "dropped norm": (
        lambda proto: drop_norm(proto, norms(proto)[1]),
        "norm model.layers.0.post_attention_layernorm: .*dropped",
        True,
    ),
    "swapped scales": (
        lambda proto: swap_scales(*norms(proto)[1:3]),
        "scale is connected to 'model.layers.1.input_layernorm.weight'",
        True,
    ),
    "transposed matrix": (transpose_one, "q_proj.weight.T: .* values differ", True),
    "norms that trade places": (exchange_two_norms, "", True),
    "a scalar scale": (make_a_scale_scalar, r"input_layernorm.weight: shape is \(\)", True),
    "zeros that are not zero": (nonzero_zeros, "constant ibnorm.zeros.32: every value must be", True),
    "other wiring in the body": (rewire_bodies, "function IBNormL: .*wiring or attributes", True),
    "another epsilon in the body": (change_epsilon_in_bodies, "function IBNormL: .*wiring or attributes", True),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_planted_fault_is_named(
    exported_llama: ExportedModel, llama: LoadedModel, tmp_path: Path, fault: str
) -> None:
    change, message, visible = FAULTS[fault]
    try:
        bad = plant(exported_llama, tmp_path, change)
        report = verify(bad, llama, options=FUNCTIONS)
    except ModelFileError:
        assert fault == "norms that trade places"  # a cycle: the runtime refuses the file
        return
    assert not report
    assert report.to_dict()["verdict"] == "fail"
    assert report.static is not None
    assert report.numeric is not None
    if message:
        assert not report.static
        assert any(re.search(message, str(f)) for f in report.static.findings), report.static.findings
    assert bool(report.numeric) is not visible
    with pytest.raises(ParityError, match=r"planted\.onnx"):
        report.raise_if_failed()


@pytest.mark.parametrize("backend", ["ort-cpu", "reference"])
@pytest.mark.parametrize("fault", ["sign of one weight", "T for L in the body"])
def test_the_numeric_verdict_finds_faults_without_the_static_one(
    exported_llama: ExportedModel, llama: LoadedModel, tmp_path: Path, fault: str, backend: str
) -> None:
    bad = plant(exported_llama, tmp_path, FAULTS[fault][0])
    report = verify(bad, llama, options=VerifyOptions(backend=backend, static=False, kernels=Kernels.FUNCTION))
    assert report.static is None
    assert not report
    assert any(f.where == "output logits" and "relative error" in f.what for f in report.findings)


def test_faults_in_a_half_precision_file(fp16_llama: ExportedModel, llama: LoadedModel, tmp_path: Path) -> None:
    for change, said in (
        (tanh_in_every_body, "IBNormL"),
        (at_second(lambda node: set_attribute(node, "lambd", 4.1)), "lambd"),
        (flip_one_sign, "only in sign"),
    ):
        report = verify(plant(fp16_llama, tmp_path, change), llama, options=FUNCTIONS)
        assert not report
        assert any(said in str(f) for f in report.findings)


def test_a_missing_function_is_named(exported_vit: ExportedModel, vit: LoadedModel, tmp_path: Path) -> None:
    def forget(proto: onnx.ModelProto) -> None:
        del proto.functions[:]

    report = verify(plant(exported_vit, tmp_path, forget), vit, options=FUNCTIONS)
    assert not report
    assert any("IBNormT" in str(f) and "not in the file" in str(f) for f in report.findings)


def rename_a_bias(proto: onnx.ModelProto) -> None:
    initializer(proto, "classifier.bias").name = "unknown"
    for node in proto.graph.node:
        for position, name in enumerate(node.input):
            if name == "classifier.bias":
                node.input[position] = "unknown"


def test_a_weight_that_is_not_in_the_file(exported_vit: ExportedModel, vit: LoadedModel, tmp_path: Path) -> None:
    """Its name makes no difference, as tools rename; its values do."""

    def change(proto: onnx.ModelProto) -> None:
        rename_a_bias(proto)
        rewrite(proto, "unknown", lambda a: a + 1e-4 * (a == a[1]))

    assert verify(plant(exported_vit, tmp_path, rename_a_bias), vit, options=VerifyOptions(samples=1))
    report = verify(plant(exported_vit, tmp_path, change), vit, options=VerifyOptions(samples=1))
    assert not report
    assert {f.where for f in report.findings} >= {"weight classifier.bias", "constant unknown"}
    assert any("copy of the weight classifier.bias with 1 of 10 values changed" in str(f) for f in report.findings)


def test_a_checkpoint_with_other_weights(exported_vit: ExportedModel, vit_checkpoint: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(vit_checkpoint, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    weights["classifier.bias"] += 1e-3
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    report = verify(exported_vit, models.load(other))
    assert not report
    assert [f.where for f in report.findings if f.where.startswith("weight")] == ["weight classifier.bias"]
    assert any("another copy" in note for note in report.notes)


def test_a_fault_in_an_inlined_file(vit: LoadedModel, exports: SharedExports, tmp_path: Path) -> None:
    """Its norms are recognised by their operators, numbers and weights."""
    exported = exports("vit", inline=True)

    def change(proto: onnx.ModelProto) -> None:
        node = next(n for n in proto.graph.node if n.op_type == "LayerNormalization")
        next(a for a in node.attribute if a.name == "epsilon").f = 1e-2

    assert verify(exported, vit)
    report = verify(plant(exported, tmp_path, change), vit)
    assert not report
    assert report.static is not None
    (finding,) = report.static.findings
    assert re.search(r"norm vit\.layers\.0\.layernorm_before: .*dropped or changed", str(finding))
    assert any("4 norms of the file are inlined" in note for note in report.static.notes)
    demanded = verify(exported, vit, options=VerifyOptions(require_fused=True, samples=1))
    assert [str(f) for f in demanded.findings] == [
        "norms: inlined in this file, so no kernel can replace them: export without --inline"
    ]


def test_a_damaged_initializer_is_named(exported_llama: ExportedModel, llama: LoadedModel, tmp_path: Path) -> None:
    def cut(proto: onnx.ModelProto) -> None:
        tensor = initializer(proto, "model.norm.weight")
        tensor.raw_data = tensor.raw_data[:-4]

    with pytest.raises(ModelFileError, match=r"model\.norm\.weight|planted\.onnx"):
        verify(plant(exported_llama, tmp_path, cut), llama)


def test_nan_in_the_checkpoint_is_reported(exported_vit: ExportedModel, vit_checkpoint: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(vit_checkpoint, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    weights["classifier.bias"][2] = torch.nan
    save_file(weights, other / "model.safetensors", {"format": "pt"})

    def change(proto: onnx.ModelProto) -> None:
        rewrite(proto, "classifier.bias", lambda a: np.where(np.arange(10) == 2, np.float32(np.nan), a))

    report = verify(plant(exported_vit, tmp_path, change), models.load(other))
    assert not report
    assert report.static, "file and checkpoint agree"
    assert any("checkpoint itself gives NaN" in f.what for f in report.findings)
    assert any("classifier.bias" in note for note in report.notes)
