"""A file that no runtime loads fails, whatever copy of it the numbers come from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import pytest

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.verifier.static.types import check_types
from ibnorm_export.verifier.verify import VerifyOptions, verify
from tests.support.planting import Change, initializer, insert, plant

ONE = VerifyOptions(samples=1)


def store_a_weight_as_fp32(proto: onnx.ModelProto) -> None:
    """Nothing declares a type after it, so that only the operator can object."""
    tensor = initializer(proto, "model.layers.0.mlp.up_proj.weight.T")
    wide = onnx.numpy_helper.to_array(tensor).astype(np.float32)
    tensor.CopyFrom(onnx.numpy_helper.from_array(wide, tensor.name))
    del proto.graph.value_info[:]


def declare_logits_as_float(proto: onnx.ModelProto) -> None:
    proto.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT


def multiply_by_a_float(proto: onnx.ModelProto) -> None:
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(1.0), "one"))
    node = next(n for n in proto.graph.node if "embedding" in n.input)
    insert(proto, node, onnx.helper.make_node("Mul", ["embedding", "one"], ["multiplied"], name="extra"))
    node.input[list(node.input).index("embedding")] = "multiplied"


FAULTS: dict[str, Change] = {
    "a weight is stored as fp32": store_a_weight_as_fp32,
    "logits are declared float": declare_logits_as_float,
    "a float constant in a product": multiply_by_a_float,
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_file_that_does_not_load_fails(
    fp16_llama: ExportedModel, llama: LoadedModel, tmp_path: Path, fault: str
) -> None:
    bad = plant(fp16_llama, tmp_path, FAULTS[fault])
    report = verify(bad, llama, options=ONE)
    assert report.numeric is not None
    assert any(f.where == "runtime" and "cannot load" in str(f) for f in report.numeric.findings), report.findings


@pytest.mark.parametrize("fault", ["logits are declared float", "a float constant in a product"])
def test_types_are_checked_without_a_runtime(fp16_llama: ExportedModel, tmp_path: Path, fault: str) -> None:
    assert list(check_types(fp16_llama)) == []
    (finding,) = check_types(plant(fp16_llama, tmp_path, FAULTS[fault]))
    assert finding.where == "types"
    assert "type" in finding.what


def test_bfloat16_is_accepted_with_a_note(bf16_vit: ExportedModel, vit: LoadedModel) -> None:
    """ONNX Runtime has no bfloat16 kernels on a CPU, but checks types before it looks for kernels."""
    report = verify(bf16_vit, vit, options=ONE)
    assert report, report.findings
    assert report.numeric is not None
    assert any("accepts the types of the file, but cannot run it on a CPU" in note for note in report.numeric.notes)
