"""What is in an exported file, and what the options change."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from ibnorm_export import IBNormSpec, NormConfig, models
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.tensors import DType
from ibnorm_export.errors import ExportError, ModelFileError
from ibnorm_export.exporter.export import export
from ibnorm_export.exporter.options import ExportOptions
from ibnorm_export.runtimes.ort import OrtRunner
from ibnorm_export.verifier.verify import VerifyOptions, verify
from tests.support.checkpoints import VIT
from tests.support.shared_exports import SharedExports


def test_int4_weights_of_images_point_to_fp16(vit_checkpoint: Path, tmp_path: Path) -> None:
    options = ExportOptions.with_weights("int4")
    with pytest.raises(ExportError, match=r"is not one: --dtype fp16 makes its file half as large"):
        export(models.load(vit_checkpoint), tmp_path / "m.onnx", options=options)


def test_one_node_per_norm_with_all_inputs_and_attributes(pair: tuple[ExportedModel, Path]) -> None:
    exported, checkpoint = pair
    model = models.load(checkpoint)
    assert [n.module for n in exported.norms] == sorted(model.norms, key=list(model.norms).index)
    for norm in exported.norms:
        spec: IBNormSpec = model.norms[norm.module]
        assert (norm.op_type.removeprefix("Skip"), norm.name) == (spec.op_type, norm.module)
        assert norm.attributes == {
            "lambd": float(np.float32(spec.lambd)),
            "epsilon": float(np.float32(spec.epsilon)),
            "axis": -1,
            "plugin_namespace": "",
        }
        assert norm.scale == f"{norm.module}.weight"
        assert norm.bias == (f"{norm.module}.bias" if spec.bias else "ibnorm.zeros.32")
    skip = [norm.module for norm in exported.norms if norm.op_type.startswith("Skip")]
    behind_a_residual = r"post_attention_layernorm|layernorm_after|layers\.1\.(input_layernorm|layernorm_before)"
    assert skip == [path for path in model.norms if re.search(behind_a_residual, path)]
    assert [f.name for f in exported.proto.functions] == sorted({norm.op_type for norm in exported.norms})
    assert {o.domain for o in exported.proto.opset_import} == {"", "ai.ibnorm"}
    assert exported.opset == model.opset == {"llama": 23, "vit": 20}[model.family]


def test_tools_can_read_the_file(pair: tuple[ExportedModel, Path]) -> None:
    """Each of these stops a tool: pnnx, quantize_dynamic, and onnx2tf, which reads only the `value` of a Constant."""
    exported, _ = pair
    assert not {info.name for info in exported.proto.graph.value_info} & set(exported.weights)
    for body in exported.proto.functions:
        names = [node.name for node in body.node]
        assert all(names)
        assert len(set(names)) == len(names)
        constants = [a for node in body.node if node.op_type == "Constant" for a in node.attribute]
        assert {a.name for a in constants if not a.ref_attr_name} == {"value"}
        assert [a.ref_attr_name for a in constants if a.ref_attr_name] == ["lambd"]


def test_initializers_have_the_names_of_the_state_dict(pair: tuple[ExportedModel, Path]) -> None:
    exported, checkpoint = pair
    state = models.load(checkpoint).module.state_dict()
    stored = {name.removesuffix(".T"): name for name in exported.weights if name.removesuffix(".T") in state}
    assert set(stored) == set(state)
    for name, as_stored in stored.items():
        expected = state[name].numpy()
        np.testing.assert_array_equal(exported.array(as_stored), expected.T if as_stored.endswith(".T") else expected)
    others = {n for n in exported.weights if n.removesuffix(".T") not in state and not n.startswith("ibnorm.")}
    assert all(exported.array(n).size <= 64 for n in others), "no weight has another name"


def test_tensor_names_are_those_that_servers_expect(exported_llama: ExportedModel, exported_vit: ExportedModel) -> None:
    assert [(t.name, t.dtype, t.shape) for t in exported_llama.inputs] == [
        ("input_ids", "int64", ("batch_size", "sequence_length")),
        ("attention_mask", "int64", ("batch_size", "sequence_length")),
    ]
    assert [(t.name, t.dtype, t.shape) for t in exported_llama.outputs] == [
        ("logits", "fp32", ("batch_size", "sequence_length", 256))
    ]
    assert [(t.name, t.dtype, t.shape) for t in exported_vit.inputs] == [
        ("pixel_values", "fp32", ("batch_size", 1, 8, 8))
    ]
    assert [(t.name, t.dtype, t.shape) for t in exported_vit.outputs] == [("logits", "fp32", ("batch_size", 10))]


def test_the_file_describes_itself(pair: tuple[ExportedModel, Path]) -> None:
    exported, checkpoint = pair
    model = models.load(checkpoint)
    found = exported.require_metadata()
    assert (found.family, found.dtype, found.task, found.inlined) == (
        model.family,
        "fp32",
        "forward",
        False,
    )
    assert found.source_sha256 == model.source_sha256
    assert found.config == json.loads((checkpoint / "config.json").read_text())["ibnorm"]
    assert found.norms == {path: spec.to_config() for path, spec in model.norms.items()}
    assert found.versions["torch"] == torch.__version__
    text = exported.path.read_bytes()
    for trace in (str(checkpoint), str(Path.cwd()), "site-packages", "pkg.torch"):
        assert trace.encode() not in text, "the file does not reveal where it was written"


def test_two_exports_are_byte_identical(
    llama_checkpoint: Path, vit_checkpoint: Path, exports: SharedExports, tmp_path: Path
) -> None:
    """In another process, with another hash seed, folder and file name."""
    code = (
        "import sys\nfrom ibnorm_export import models\nfrom ibnorm_export.exporter.export import export\n"
        "for source in sys.argv[1:]:\n    export(models.load(source), source.rpartition('/')[2] + ' 2.onnx')\n"
    )
    words = [sys.executable, "-c", code, llama_checkpoint.as_posix(), vit_checkpoint.as_posix()]
    subprocess.run(words, check=True, cwd=tmp_path, env={**os.environ, "PYTHONHASHSEED": "12345"})
    for family in ("llama", "vit"):
        assert (tmp_path / f"{family} 2.onnx").read_bytes() == exports(family).path.read_bytes()


def test_batch_and_sequence_are_dynamic(exported_llama: ExportedModel, exported_vit: ExportedModel) -> None:
    llama, vit = OrtRunner(exported_llama.path, threads=1), OrtRunner(exported_vit.path, threads=1)
    for batch, sequence in ((1, 1), (1, 64), (5, 3), (2, 17)):
        ids = np.arange(batch * sequence).reshape(batch, sequence) % 256
        assert llama.run({"input_ids": ids, "attention_mask": np.ones_like(ids)})["logits"].shape == (
            batch,
            sequence,
            256,
        )
        assert vit.run({"pixel_values": np.zeros((batch, 1, 8, 8))})["logits"].shape == (batch, 10)


@pytest.mark.parametrize(
    ("family", "opset"),
    [("llama", 18), ("llama", 20), ("llama", 24), ("llama", 26), ("vit", 18), ("vit", 23), ("vit", 24)],
)
def test_every_opset_verifies(request: pytest.FixtureRequest, exports: SharedExports, family: str, opset: int) -> None:
    """The default opsets are verified in the tests of the verifier."""
    exported = exports(family, opset=opset)
    assert exported.opset == opset
    assert {o.version for f in exported.proto.functions for o in f.opset_import if o.domain == ""} == {opset}
    checkpoint: Path = request.getfixturevalue(f"{family}_checkpoint")
    report = verify(exported, models.load(checkpoint), options=VerifyOptions(samples=2))
    assert report, report.findings


@pytest.mark.parametrize(("family", "dtype"), [("vit", DType.FP32), ("llama", DType.FP16)])
def test_an_inlined_file_needs_no_function(
    request: pytest.FixtureRequest, exports: SharedExports, family: str, dtype: DType
) -> None:
    exported = exports(family, inline=True, dtype=dtype)
    assert not exported.proto.functions
    assert {n.domain for n in exported.proto.graph.node} == {""}
    assert {o.domain for o in exported.proto.opset_import} == {""}
    report = verify(exported, models.load(request.getfixturevalue(f"{family}_checkpoint")))
    assert report, report.findings


@pytest.mark.parametrize(
    ("family", "dtype", "elem"),
    [("llama", DType.BF16, onnx.TensorProto.BFLOAT16), ("vit", DType.FP16, onnx.TensorProto.FLOAT16)],
)
def test_half_types(
    request: pytest.FixtureRequest, exports: SharedExports, family: str, dtype: DType, elem: int
) -> None:
    state = models.load(request.getfixturevalue(f"{family}_checkpoint")).module.state_dict()
    exported = exports(family, dtype=dtype)
    assert exported.dtype == exported.metadata.dtype == dtype.value
    assert {exported.weights[n].data_type for n in exported.weights if n.removesuffix(".T") in state} == {elem}
    (logits,) = exported.outputs
    assert logits.dtype == dtype.value
    known = {v.name: v.type.tensor_type.elem_type for v in exported.proto.graph.value_info}
    assert {known[n.output[0]] for n in exported.proto.graph.node if n.domain and n.output[0] in known} == {elem}


def test_layer_rules_and_no_affine(tmp_path: Path) -> None:
    """Norms of three kinds in one model; ones and zeros are shared, LayerNorm stays LayerNormalization."""
    config = NormConfig.from_config(
        {
            "compression": "S",
            "lambda": 4.0,
            "epsilon": 1e-5,
            "convention": "divide",
            "scale": False,
            "bias": False,
            "layers": [
                {"match": "vit.layers.0.*", "compression": "L", "scale": True, "bias": True},
                {"match": "*.layernorm_after", "norm": "layernorm", "scale": True, "bias": True},
            ],
        }
    )
    models.save(models.new_model(VIT, config), tmp_path / "c")
    model = models.load(tmp_path / "c")
    exported = export(model, tmp_path / "m.onnx")
    assert [(n.module, n.op_type, n.scale, n.bias) for n in exported.norms] == [
        (
            "vit.layers.0.layernorm_before",
            "IBNormL",
            "vit.layers.0.layernorm_before.weight",
            "vit.layers.0.layernorm_before.bias",
        ),
        ("vit.layers.1.layernorm_before", "SkipIBNormS", "ibnorm.ones.32", "ibnorm.zeros.32"),
        ("vit.layernorm", "IBNormS", "ibnorm.ones.32", "ibnorm.zeros.32"),
    ]
    assert exported.operators["LayerNormalization"] == 2
    assert sorted(f.name for f in exported.proto.functions) == ["IBNormL", "IBNormS", "SkipIBNormS"]
    report = verify(exported, model)
    assert report, report.findings


def test_the_file_that_was_written_is_read_only_when_asked_for(vit_checkpoint: Path, tmp_path: Path) -> None:
    """Reading it takes twice the memory of its weights, which is more than the export takes."""
    exported = export(models.load(vit_checkpoint), tmp_path / "m.onnx")
    exported.path.write_bytes(b"no longer ONNX")
    with pytest.raises(ModelFileError):
        _ = exported.norms
