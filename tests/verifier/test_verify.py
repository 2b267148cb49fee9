"""Verification: good files pass, every planted fault is a false report that names it, hostile input is refused.

A verifier that cannot fail is worth nothing, so most of this module plants faults.
"""

from __future__ import annotations

import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import pytest
import torch
from safetensors.torch import load_file, save_file

from ibnorm_export import models
from ibnorm_export.analysis.batches import read_labels
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.input_files import read_inputs
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.tensors import DType
from ibnorm_export.errors import IBNormError, ModelFileError, ParityError
from ibnorm_export.exporter.export import ExportOptions, export
from ibnorm_export.gate.parity import parity_cases
from ibnorm_export.gate.report import Outcome
from ibnorm_export.runtimes.runner import Kernels
from ibnorm_export.verifier import numeric as numeric_check
from ibnorm_export.verifier.report import Finding, NumericReport, ParityReport, StaticReport
from ibnorm_export.verifier.verify import VerifyOptions, verify
from tests.support.planting import (
    Change,
    drop_norm,
    flip_one_sign,
    initializer,
    norms,
    rewrite,
    set_attribute,
    swap_scales,
    tanh_in_every_body,
)

NUMERIC = VerifyOptions(static=False)

#: With the library of fused kernels installed, the bodies in the file would not run.
FUNCTION_PATH = VerifyOptions(kernels=Kernels.FUNCTION)


@pytest.fixture(scope="session")
def llama(llama_checkpoint: Path) -> LoadedModel:
    return models.load(llama_checkpoint)


@pytest.fixture(scope="session")
def vit(vit_checkpoint: Path) -> LoadedModel:
    return models.load(vit_checkpoint)


@pytest.fixture(scope="session")
def half_llama(llama_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportedModel:
    """Exported from a model of its own: export converts the parameters in place."""
    folder = tmp_path_factory.mktemp("half")
    return export(models.load(llama_checkpoint), folder / "llama.onnx", options=ExportOptions(dtype=DType.FP16))


@pytest.fixture(scope="session")
def bf16_vit(vit_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportedModel:
    folder = tmp_path_factory.mktemp("half")
    return export(models.load(vit_checkpoint), folder / "vit.onnx", options=ExportOptions(dtype=DType.BF16))


def planted(exported: ExportedModel, folder: Path, change: Change) -> ExportedModel:
    """A copy of the file with a fault."""
    proto = onnx.load(exported.path)
    before = proto.SerializeToString()
    change(proto)
    assert proto.SerializeToString() != before, "nothing was planted"
    onnx.save(proto, folder / "planted.onnx")
    return ExportedModel(folder / "planted.onnx")


# ---- good files ----


def test_good_files_pass(
    exported_llama: ExportedModel, exported_vit: ExportedModel, llama: LoadedModel, vit: LoadedModel
) -> None:
    for exported, model in ((exported_llama, llama), (exported_vit, vit)):
        for backend in ("ort-cpu", "reference"):
            report = verify(exported, model, options=VerifyOptions(backend=backend))
            assert report, report.findings
            assert report.static is not None
            assert report.static.norms == 5
            assert report.static.weights >= len(model.module.state_dict())
            assert report.numeric is not None
            assert (report.numeric.backend, report.numeric.dtype, report.numeric.samples) == (backend, "fp32", 4)
            logits = report.numeric.outputs[-1]  # norms as functions; fused ones come first where they are installed
            assert logits.error <= 2e-6
            assert logits.top1_agreement == 1.0
            assert logits.cosine == pytest.approx(1.0, abs=1e-9)
            assert report.notes == ()
            assert report.to_dict()["verdict"] == "pass"
            report.raise_if_failed()


def test_good_half_files_pass(
    half_llama: ExportedModel, bf16_vit: ExportedModel, llama: LoadedModel, vit: LoadedModel
) -> None:
    for exported, model, dtype, size in ((half_llama, llama, "fp16", 2e-3), (bf16_vit, vit, "bf16", 2e-2)):
        report = verify(exported, model)
        assert report, report.findings
        assert report.numeric is not None
        assert report.numeric.dtype == dtype
        assert "explicit Casts" in report.numeric.method
        logits = report.numeric.outputs[-1]
        assert size / 1000 < logits.error < size, "it was rounded, and not more than a few times"
    report = verify(half_llama, llama, options=VerifyOptions(backend="reference", samples=1))
    assert report, report.findings


def test_padding_is_not_judged(exported_llama: ExportedModel, llama: LoadedModel) -> None:
    inputs = llama.sample(np.random.default_rng(0), 1)
    report = verify(exported_llama, llama, inputs=[inputs])
    assert report.numeric is not None
    assert (inputs["attention_mask"] == 0).sum() > 0
    assert report.numeric.outputs[0].elements == int((inputs["attention_mask"] != 0).sum()) * 256


def test_the_seed_decides_the_samples(exported_vit: ExportedModel, vit: LoadedModel) -> None:
    first, same, other = (
        verify(exported_vit, vit, options=VerifyOptions(seed=seed, samples=1)).numeric for seed in (1, 1, 2)
    )
    assert first == same
    assert first is not None
    assert other is not None
    assert first.outputs[0].max_abs != other.outputs[0].max_abs


# ---- planted faults ----


def transpose_one(proto: onnx.ModelProto) -> None:
    rewrite(proto, "model.layers.1.self_attn.q_proj.weight.T", lambda a: a.T)


def a_node_for_another_norm(proto: onnx.ModelProto) -> None:
    """Two norms trade places: all the same attributes and weights, the wrong module each."""
    _, a, b, *_ = norms(proto)
    a.input[0], b.input[0] = b.input[0], a.input[0]


def ones_that_are_not(proto: onnx.ModelProto) -> None:
    rewrite(proto, "ibnorm.zeros.32", lambda a: a + 0.01)


def a_body_with_other_wiring(proto: onnx.ModelProto) -> None:
    for body in proto.functions:
        next(n for n in body.node if n.op_type == "LayerNormalization").input[0] = next(
            n for n in body.node if n.op_type == "Div"
        ).output[0]


def a_body_with_another_epsilon(proto: onnx.ModelProto) -> None:
    for body in proto.functions:
        node = next(n for n in body.node if n.op_type == "LayerNormalization")
        epsilon = next(a for a in node.attribute if a.name == "epsilon")
        epsilon.CopyFrom(onnx.helper.make_attribute("epsilon", 0.5))


def at_second(change: Callable[[onnx.NodeProto], None]) -> Change:
    return lambda proto: change(norms(proto)[1])


def scale_of_no_dimension(proto: onnx.ModelProto) -> None:
    tensor = initializer(proto, norms(proto)[0].input[-2])
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.float32(1.0), tensor.name))


#: fault -> what a finding says, and whether running the file shows it too.
FAULTS: dict[str, tuple[Change, str, bool]] = {
    "sign of one weight": (flip_one_sign, "down_proj.weight.T: 1 of 2048 values differ .* in sign alone", True),
    "T for L in the body": (tanh_in_every_body, "function IBNormL: its body is not the operator's", True),
    "lambda 4.1": (
        at_second(lambda node: set_attribute(node, "lambd", 4.1)),
        "layers.0.post_attention_layernorm .*lambd is 4.0999",
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
    "norms that trade places": (a_node_for_another_norm, "", True),
    "a scale of no dimension": (scale_of_no_dimension, r"input_layernorm.weight: shape is \(\)", True),
    "zeros that are not": (ones_that_are_not, "constant ibnorm.zeros.32: must hold 0", True),
    "other wiring in the body": (a_body_with_other_wiring, "function IBNormL: .*wiring or attributes", True),
    "another epsilon in the body": (a_body_with_another_epsilon, "function IBNormL: .*wiring or attributes", True),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_planted_fault_is_named(
    exported_llama: ExportedModel, llama: LoadedModel, tmp_path: Path, fault: str
) -> None:
    change, said, visible = FAULTS[fault]
    try:
        bad = planted(exported_llama, tmp_path, change)
        report = verify(bad, llama, options=FUNCTION_PATH)
    except ModelFileError:
        assert fault == "norms that trade places"  # a cycle: the runtime refuses the file
        return
    assert not report
    assert report.to_dict()["verdict"] == "fail"
    assert report.static is not None
    assert report.numeric is not None
    if said:
        assert not report.static
        assert any(re.search(said, str(f)) for f in report.static.findings), report.static.findings
    assert bool(report.numeric) is not visible
    with pytest.raises(ParityError, match=r"planted\.onnx"):
        report.raise_if_failed()


@pytest.mark.parametrize("backend", ["ort-cpu", "reference"])
@pytest.mark.parametrize("fault", ["sign of one weight", "T for L in the body"])
def test_the_numeric_verdict_alone_finds_it(
    exported_llama: ExportedModel, llama: LoadedModel, tmp_path: Path, fault: str, backend: str
) -> None:
    bad = planted(exported_llama, tmp_path, FAULTS[fault][0])
    report = verify(bad, llama, options=VerifyOptions(backend=backend, static=False, kernels=Kernels.FUNCTION))
    assert report.static is None
    assert not report
    assert any(f.where == "output logits" and "relative error" in f.what for f in report.findings)


def test_faults_in_a_half_precision_file(half_llama: ExportedModel, llama: LoadedModel, tmp_path: Path) -> None:
    for change, said in (
        (tanh_in_every_body, "IBNormL"),
        (at_second(lambda node: set_attribute(node, "lambd", 4.1)), "lambd"),
        (flip_one_sign, "sign alone"),
    ):
        report = verify(planted(half_llama, tmp_path, change), llama, options=FUNCTION_PATH)
        assert not report
        assert any(said in str(f) for f in report.findings)


def test_a_missing_function_is_named(exported_vit: ExportedModel, vit: LoadedModel, tmp_path: Path) -> None:
    def forget(proto: onnx.ModelProto) -> None:
        del proto.functions[:]

    report = verify(planted(exported_vit, tmp_path, forget), vit, options=FUNCTION_PATH)
    assert not report
    assert any("IBNormT" in str(f) and "is not in the file" in str(f) for f in report.findings)


def test_a_weight_that_is_not_in_the_file(exported_vit: ExportedModel, vit: LoadedModel, tmp_path: Path) -> None:
    """The values are there under another name: nobody can say whose they are."""

    def rename(proto: onnx.ModelProto) -> None:
        initializer(proto, "classifier.bias").name = "nobody's"
        for node in proto.graph.node:
            for position, name in enumerate(node.input):
                if name == "classifier.bias":
                    node.input[position] = "nobody's"

    report = verify(planted(exported_vit, tmp_path, rename), vit)
    assert not report
    assert report.numeric
    assert any(f.where == "weight classifier.bias" for f in report.findings)


def test_the_wrong_one_of_two_checkpoints(exported_vit: ExportedModel, vit_checkpoint: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(vit_checkpoint, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    weights["classifier.bias"] += 1e-3
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    report = verify(exported_vit, models.load(other))
    assert not report
    assert [f.where for f in report.findings if f.where.startswith("weight")] == ["weight classifier.bias"]
    assert any("another copy" in note for note in report.notes)


def test_a_fault_in_an_inlined_file(vit: LoadedModel, vit_checkpoint: Path, tmp_path: Path) -> None:
    """Its norms cannot be told from other nodes, so the numeric verdict alone decides, and the report says so."""
    exported = export(models.load(vit_checkpoint), tmp_path / "inlined.onnx", options=ExportOptions(inline=True))

    def change(proto: onnx.ModelProto) -> None:
        node = next(n for n in proto.graph.node if n.op_type == "LayerNormalization")
        next(a for a in node.attribute if a.name == "epsilon").f = 1e-2

    assert verify(exported, vit)
    report = verify(planted(exported, tmp_path, change), vit)
    assert not report
    assert report.static
    assert any("inlined" in note for note in report.static.notes)
    demanded = verify(exported, vit, options=VerifyOptions(require_fused=True, samples=1))
    assert [str(f) for f in demanded.findings] == [
        "norms: are inlined in this file, so no kernel can take them: export without --inline"
    ]


def test_fused_kernels_are_not_asked_of_a_backend_without_any(exported_vit: ExportedModel, vit: LoadedModel) -> None:
    """It would run nothing, and a gate that has run nothing must not be green."""
    with pytest.raises(IBNormError, match="backend reference has none"):
        verify(exported_vit, vit, options=VerifyOptions(backend="reference", kernels=Kernels.FUSED))


@pytest.mark.parametrize(
    "numeric",
    [
        NumericReport("b", "fp32", method="m", samples=0, outputs=(), findings=()),
        NumericReport("b", "fp32", method="m", samples=1, outputs=(), findings=(Finding("layer", "is wrong"),)),
        NumericReport("b", "fp32", method="m", samples=1, outputs=(), findings=(Finding("runtime", "is wrong"),)),
    ],
)
def test_a_gate_is_red_whenever_the_report_is(numeric: NumericReport) -> None:
    report = ParityReport("m", "c", static=StaticReport(3, 5, (), ()), numeric=numeric)
    assert not report
    assert any(
        case.outcome is Outcome.FAIL for case in parity_cases("m", "b", report=report, max_error=None, seconds=0.0)
    )


def test_where_pytorch_itself_is_far_off_nothing_passes(
    bf16_vit: ExportedModel, vit: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three times an error of a half would let zeros pass."""
    monkeypatch.setattr(numeric_check, "_MOST", 1e-4)
    report = verify(bf16_vit, vit, options=VerifyOptions(samples=1))
    assert {f.where for f in report.findings} == {"bf16 of output logits"}
    assert "its error is no yardstick: the model does not fit this type" in report.findings[0].what


# ---- overflow in half precision ----


def scale_up_and_down(proto: onnx.ModelProto) -> None:
    """Values of one projection are multiplied by 3e4 and divided again: nothing in float32, infinity in float16."""
    node = next(n for n in proto.graph.node if n.op_type == "MatMul" and "down_proj" in n.input[1])
    output = node.output[0]
    node.output[0] = "up"
    for name, value in (("large", 3e4), ("small", 1 / 3e4)):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value, np.float16), name))
    place = list(proto.graph.node).index(node) + 1
    proto.graph.node.insert(place, onnx.helper.make_node("Mul", ["up", "large"], ["up/large"], name="up/large"))
    proto.graph.node.insert(place + 1, onnx.helper.make_node("Mul", ["up/large", "small"], [output], name="down"))
    kind = next(v for v in proto.graph.value_info if v.name == output)
    for name in ("up", "up/large"):
        copy = proto.graph.value_info.add()
        copy.CopyFrom(kind)
        copy.name = name


def loud(
    checkpoint: Path, exported: ExportedModel, folder: Path, factors: dict[str, float]
) -> tuple[ExportedModel, LoadedModel]:
    """Checkpoint and file with some weights multiplied by powers of two: exact but for float16's subnormals."""
    copy = Path(shutil.copytree(checkpoint, folder / "loud"))
    weights = load_file(copy / "model.safetensors")
    for name, factor in factors.items():
        weights[name] *= factor
    save_file(weights, copy / "model.safetensors", {"format": "pt"})

    def change(proto: onnx.ModelProto) -> None:
        for name, factor in factors.items():
            rewrite(proto, f"{name}.T", lambda a, factor=factor: a * a.dtype.type(factor))

    return planted(exported, copy, change), models.load(copy)


DOWN, UP = "model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.up_proj.weight"


def test_an_overflow_that_the_file_has_and_pytorch_has_not(
    half_llama: ExportedModel, llama_checkpoint: Path, tmp_path: Path
) -> None:
    """On a CPU, ONNX Runtime computes this graph in float32, where nothing overflows."""
    good, model = loud(llama_checkpoint, half_llama, tmp_path, {DOWN: 2.0**14})
    report = verify(good, model, options=NUMERIC)
    assert report, report.findings
    bad = planted(good, tmp_path, scale_up_and_down)
    report = verify(bad, model, options=NUMERIC)
    assert not report
    assert any("overflow in fp16" in f.what for f in report.findings), report.findings


def test_an_overflow_of_the_model_itself(
    half_llama: ExportedModel, exported_llama: ExportedModel, llama_checkpoint: Path, tmp_path: Path
) -> None:
    """Finite weights whose product passes 65504: in float32 the model is fine, in float16 it is not."""
    factors = {DOWN: 2.0**14, UP: 2.0**14}
    for folder in ("half", "single"):
        (tmp_path / folder).mkdir()
    half, model = loud(llama_checkpoint, half_llama, tmp_path / "half", factors)
    assert all(np.isfinite(half.array(f"{name}.T")).all() for name in factors)
    report = verify(half, model)
    assert not report
    assert any("PyTorch itself overflows in fp16" in f.what for f in report.findings), report.findings
    single, model = loud(llama_checkpoint, exported_llama, tmp_path / "single", factors)
    report = verify(single, model)
    assert report, report.findings


# ---- reports ----


def test_an_empty_report_is_false() -> None:
    assert not StaticReport(0, 0, ())
    assert not StaticReport(3, 0, ())
    assert not NumericReport("ort-cpu", "fp32", method="", samples=0, outputs=(), findings=())
    assert not ParityReport("m", "c", static=None, numeric=None)
    assert ParityReport("m", "c", static=StaticReport(1, 1, ()), numeric=None)
    with pytest.raises(ParityError):
        ParityReport("m", "c", static=None, numeric=None).raise_if_failed()


# ---- inputs ----


def ids(*shape: int) -> np.ndarray[Any, Any]:
    return np.ones(shape, np.int64)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"input_ids": ids(1, 3)}, "attention_mask"),
        ({"input_ids": ids(1, 3), "attention_mask": ids(1, 3), "x": ids(1)}, "'x'"),
        ({"input_ids": ids(1, 3), "attention_mask": ids(1, 4)}, "attention_mask has shape"),
        ({"input_ids": ids(2, 3), "attention_mask": ids(1, 3)}, "attention_mask has shape"),
        ({"input_ids": ids(3), "attention_mask": ids(3)}, "input_ids has shape"),
        ({"input_ids": ids(1, 0), "attention_mask": ids(1, 0)}, "empty"),
        ({"input_ids": ids(1, 3) * 0.5, "attention_mask": ids(1, 3)}, "input_ids is float64"),
        ({"input_ids": np.array([["a"]]), "attention_mask": ids(1, 1)}, "input_ids is <U1"),
        ({"input_ids": np.array([[None]]), "attention_mask": ids(1, 1)}, "plain arrays"),
        ({"input_ids": ids(1, 3) * 256, "attention_mask": ids(1, 3)}, "256"),
        ({"input_ids": ids(1, 3) * -1, "attention_mask": ids(1, 3)}, "-1"),
    ],
)
def test_hostile_inputs(
    exported_llama: ExportedModel, llama: LoadedModel, tmp_path: Path, arrays: dict[str, Any], said: str
) -> None:
    np.savez(tmp_path / "in.npz", **arrays)
    with pytest.raises(IBNormError, match=said):
        verify(exported_llama, llama, inputs=[read_inputs(tmp_path / "in.npz", llama)])


@pytest.mark.parametrize("text", [b"", b"PK\x03\x04", b"no zip at all", b"\x93NUMPY\x01\x00"])
def test_files_that_are_no_npz(llama: LoadedModel, tmp_path: Path, text: bytes) -> None:
    (tmp_path / "in.npz").write_bytes(text)
    with pytest.raises(ModelFileError, match=r"in\.npz"):
        read_inputs(tmp_path / "in.npz", llama)


def test_a_single_array_is_no_npz(llama: LoadedModel, tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", ids(3))
    with pytest.raises(ModelFileError, match=r"one\.npy"):
        read_inputs(tmp_path / "one.npy", llama)


def test_a_missing_npz(llama: LoadedModel, tmp_path: Path) -> None:
    for place in (tmp_path / "none.npz", tmp_path):
        with pytest.raises(ModelFileError, match=r"does not exist|not an"):
            read_inputs(place, llama)


@pytest.mark.parametrize("cut", [10, 300, -5])
def test_a_truncated_npz(llama: LoadedModel, tmp_path: Path, cut: int) -> None:
    np.savez(tmp_path / "in.npz", input_ids=ids(1, 3), attention_mask=ids(1, 3))
    (tmp_path / "in.npz").write_bytes((tmp_path / "in.npz").read_bytes()[:cut])
    with pytest.raises(ModelFileError, match=r"in\.npz"):
        read_inputs(tmp_path / "in.npz", llama)


def encrypted(content: bytes) -> bytes:
    """The archive with the flag that says so, in both headers of its one member."""
    central = content.find(b"PK\x01\x02")
    changed = bytearray(content)
    changed[6] |= 1
    changed[central + 8] |= 1
    return bytes(changed)


def of_an_unknown_method(content: bytes) -> bytes:
    central = content.find(b"PK\x01\x02")
    return content[:8] + b"\x63" + content[9 : central + 10] + b"\x63" + content[central + 11 :]


@pytest.mark.parametrize(
    ("change", "said"), [(encrypted, "encrypted"), (of_an_unknown_method, "compression method is not supported")]
)
def test_archives_that_cannot_be_read(
    llama: LoadedModel, tmp_path: Path, change: Callable[[bytes], bytes], said: str
) -> None:
    np.savez(tmp_path / "in.npz", input_ids=ids(1, 3))
    (tmp_path / "in.npz").write_bytes(change((tmp_path / "in.npz").read_bytes()))
    with pytest.raises(ModelFileError, match=rf"in\.npz is not an \.npz file of plain arrays: .*{said}"):
        read_inputs(tmp_path / "in.npz", llama)


def test_a_member_that_is_no_array_is_named(llama: LoadedModel, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "in.npz", "w") as archive:
        archive.writestr("input_ids", b"hello")
    with pytest.raises(ModelFileError, match="its member 'input_ids' is not an array"):
        read_inputs(tmp_path / "in.npz", llama)


def test_labels_that_are_no_npy(tmp_path: Path) -> None:
    for content in (b"PK\x03\x04", b"\x93NUMPY\x01\x00", b""):
        (tmp_path / "labels.npy").write_bytes(content)
        with pytest.raises(ModelFileError, match=r"labels\.npy is not a \.npy file of labels"):
            read_labels(tmp_path / "labels.npy")
    np.savez(tmp_path / "in.npz", a=ids(1))
    with pytest.raises(ModelFileError, match="several arrays"):
        read_labels(tmp_path / "in.npz")


def test_the_inputs_behind_the_first_are_guarded_too(exported_llama: ExportedModel, llama: LoadedModel) -> None:
    good = {"input_ids": ids(1, 3), "attention_mask": ids(1, 3)}
    with pytest.raises(ModelFileError, match=r"on input 2 \(input_ids from 999 to 999, attention_mask from 1 to 1\)"):
        verify(exported_llama, llama, inputs=[good, good, {**good, "input_ids": ids(1, 3) * 999}])


def test_an_error_of_this_program_is_not_blamed_on_the_inputs(
    exported_llama: ExportedModel, llama: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise IndexError("a defect")

    monkeypatch.setattr("ibnorm_export.verifier.verify.check_numeric", fail)
    with pytest.raises(IndexError, match="a defect"):
        verify(exported_llama, llama, options=NUMERIC)


def test_inputs_are_converted(vit: LoadedModel, exported_vit: ExportedModel, tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", pixel_values=np.random.default_rng(0).standard_normal((3, 1, 8, 8)))
    arrays = read_inputs(tmp_path / "in.npz", vit)
    assert arrays["pixel_values"].dtype == np.float32
    report = verify(exported_vit, vit, inputs=[arrays])
    assert report, report.findings
    assert report.numeric is not None
    assert report.numeric.samples == 1


# ---- what cannot be compared ----


def test_files_that_do_not_belong_together(
    exported_llama: ExportedModel, exported_vit: ExportedModel, llama: LoadedModel, tmp_path: Path
) -> None:
    with pytest.raises(ModelFileError, match=r"is a vit model; .* is llama"):
        verify(exported_vit, llama)

    def strip(proto: onnx.ModelProto) -> None:
        del proto.metadata_props[:]

    with pytest.raises(ModelFileError, match="carries no ibnorm metadata"):
        verify(planted(exported_llama, tmp_path, strip), llama)

    def rename(proto: onnx.ModelProto) -> None:
        proto.graph.input[0].name = "tokens"
        for node in proto.graph.node:
            for position, name in enumerate(node.input):
                if name == "input_ids":
                    node.input[position] = "tokens"

    with pytest.raises(ModelFileError, match="tokens"):
        verify(planted(exported_llama, tmp_path, rename), llama)


def test_a_damaged_initializer_is_named(exported_llama: ExportedModel, llama: LoadedModel, tmp_path: Path) -> None:
    def cut(proto: onnx.ModelProto) -> None:
        tensor = initializer(proto, "model.norm.weight")
        tensor.raw_data = tensor.raw_data[:-4]

    with pytest.raises(ModelFileError, match=r"model\.norm\.weight|planted\.onnx"):
        verify(planted(exported_llama, tmp_path, cut), llama)


def test_options_out_of_range(exported_llama: ExportedModel, llama: LoadedModel) -> None:
    with pytest.raises(ModelFileError, match="samples is 0"):
        verify(exported_llama, llama, options=VerifyOptions(samples=0))
    with pytest.raises(IBNormError, match=r"abacus.*ort-cpu"):
        verify(exported_llama, llama, options=VerifyOptions(backend="abacus"))


def test_a_checkpoint_with_nan_fails_and_says_why(
    exported_vit: ExportedModel, vit_checkpoint: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(vit_checkpoint, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    weights["classifier.bias"][2] = torch.nan
    save_file(weights, other / "model.safetensors", {"format": "pt"})

    def change(proto: onnx.ModelProto) -> None:
        rewrite(proto, "classifier.bias", lambda a: np.where(np.arange(10) == 2, np.float32(np.nan), a))

    report = verify(planted(exported_vit, tmp_path, change), models.load(other))
    assert not report
    assert report.static, "file and checkpoint agree"
    assert any("checkpoint itself gives NaN" in f.what for f in report.findings)
    assert any("classifier.bias" in note for note in report.notes)
