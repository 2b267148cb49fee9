"""Verification of correct files, of inputs, and of what cannot be compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.input_files import read_inputs
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.errors import IBNormError, ModelFileError
from ibnorm_export.runtimes.runner import Kernels
from ibnorm_export.verifier.verify import VerifyOptions, verify
from tests.support.planting import plant
from tests.support.shared_exports import SharedExports

NUMERIC = VerifyOptions(static=False)


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
            assert (report.numeric.backend, report.numeric.dtype) == (backend, "fp32")
            assert report.numeric.samples == (7 if exported is exported_llama else 6)
            assert report.numeric.not_run == ()
            logits = report.numeric.outputs[-1]  # norms as functions; fused ones come first where they are installed
            assert logits.error <= 2e-6
            assert logits.top1_agreement == 1.0
            assert logits.cosine == pytest.approx(1.0, abs=1e-9)
            (note,) = report.notes
            assert "reading of config.json" in note
            assert "--expected" in note
            assert report.to_dict()["verdict"] == "pass"
            report.raise_if_failed()


def test_good_half_files_pass(
    fp16_llama: ExportedModel, bf16_vit: ExportedModel, llama: LoadedModel, vit: LoadedModel
) -> None:
    for exported, model, dtype, size in ((fp16_llama, llama, "fp16", 2e-3), (bf16_vit, vit, "bf16", 2e-2)):
        report = verify(exported, model)
        assert report, report.findings
        assert report.numeric is not None
        assert report.numeric.dtype == dtype
        assert "explicit Casts" in report.numeric.method
        logits = report.numeric.outputs[-1]
        assert size / 1000 < logits.error < size, "it was rounded, but not more than a few times"
    report = verify(fp16_llama, llama, options=VerifyOptions(backend="reference", samples=1))
    assert report, report.findings


def test_a_path_names_the_file(exported_vit: ExportedModel, vit: LoadedModel) -> None:
    assert verify(exported_vit.path, vit, options=VerifyOptions(samples=1))


def test_padding_is_not_compared(exported_llama: ExportedModel, llama: LoadedModel) -> None:
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


def ids(*shape: int) -> np.ndarray[Any, Any]:
    return np.ones(shape, np.int64)


def test_an_input_that_pytorch_refuses_is_named(exported_llama: ExportedModel, llama: LoadedModel) -> None:
    good = {"input_ids": ids(1, 3), "attention_mask": ids(1, 3)}
    with pytest.raises(ModelFileError, match=r"on input 2 \(input_ids from 999 to 999, attention_mask from 1 to 1\)"):
        verify(exported_llama, llama, inputs=[good, good, {**good, "input_ids": ids(1, 3) * 999}])


@pytest.mark.parametrize("token", [256, -1])
def test_a_token_outside_the_vocabulary_is_named(exported_llama: ExportedModel, llama: LoadedModel, token: int) -> None:
    with pytest.raises(ModelFileError, match=f"on input 0 .*input_ids from {token} to {token}"):
        verify(exported_llama, llama, inputs=[{"input_ids": ids(1, 3) * token, "attention_mask": ids(1, 3)}])


def test_an_error_of_this_program_is_not_attributed_to_the_inputs(
    exported_llama: ExportedModel, llama: LoadedModel
) -> None:
    def fail(what: str, done: int, total: int) -> None:
        raise IndexError("a defect")

    with pytest.raises(IndexError, match="a defect"):
        verify(exported_llama, llama, options=NUMERIC, progress=fail)


def test_an_empty_list_of_inputs_is_refused(exported_vit: ExportedModel, vit: LoadedModel) -> None:
    with pytest.raises(ModelFileError, match="inputs is empty; give at least one"):
        verify(exported_vit, vit, inputs=[])


def test_inputs_of_sizes_that_the_file_does_not_take(vit: LoadedModel, exports: SharedExports) -> None:
    fixed = exports("vit", shape={"batch_size": 1})
    with pytest.raises(ModelFileError, match=r"takes only batch_size 1, not 2 .*--shape batch_size=2"):
        verify(fixed, vit, inputs=[{"pixel_values": np.zeros((2, 1, 8, 8), np.float32)}])


def test_inputs_are_converted(vit: LoadedModel, exported_vit: ExportedModel, tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", pixel_values=np.random.default_rng(0).standard_normal((3, 1, 8, 8)))
    arrays = read_inputs(tmp_path / "in.npz", vit)
    assert arrays["pixel_values"].dtype == np.float32
    report = verify(exported_vit, vit, inputs=[arrays])
    assert report, report.findings
    assert report.numeric is not None
    assert report.numeric.samples == 1


def test_a_file_of_another_model_is_refused(
    exported_llama: ExportedModel, exported_vit: ExportedModel, llama: LoadedModel, tmp_path: Path
) -> None:
    with pytest.raises(ModelFileError, match=r"is a vit model; .* is llama"):
        verify(exported_vit, llama)

    def strip(proto: onnx.ModelProto) -> None:
        del proto.metadata_props[:]

    with pytest.raises(ModelFileError, match="has no ibnorm metadata"):
        verify(plant(exported_llama, tmp_path, strip), llama)

    def rename(proto: onnx.ModelProto) -> None:
        proto.graph.input[0].name = "tokens"
        for node in proto.graph.node:
            for position, name in enumerate(node.input):
                if name == "input_ids":
                    node.input[position] = "tokens"

    with pytest.raises(ModelFileError, match="tokens"):
        verify(plant(exported_llama, tmp_path, rename), llama)


def test_a_backend_without_fused_kernels_refuses_to_run_them(exported_vit: ExportedModel, vit: LoadedModel) -> None:
    """Nothing would run, and a check that has run nothing must not pass."""
    with pytest.raises(IBNormError, match="backend reference cannot run the fused kernels"):
        verify(exported_vit, vit, options=VerifyOptions(backend="reference", kernels=Kernels.FUSED))


def test_options_out_of_range(exported_llama: ExportedModel, llama: LoadedModel) -> None:
    with pytest.raises(ModelFileError, match="samples is 0"):
        verify(exported_llama, llama, options=VerifyOptions(samples=0))
    with pytest.raises(IBNormError, match=r"abacus.*ort-cpu"):
        verify(exported_llama, llama, options=VerifyOptions(backend="abacus"))
