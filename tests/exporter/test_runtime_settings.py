"""Exports for a runtime and with fixed sizes: what they set, what contradicts, and that the files verify."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ibnorm_export import models
from ibnorm_export.artifacts.axes import BATCH, PAST, SEQUENCE, TOTAL
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.metadata import Task
from ibnorm_export.artifacts.runtime_versions import RuntimeName
from ibnorm_export.benchmark.bench import bench
from ibnorm_export.benchmark.options import BenchOptions
from ibnorm_export.errors import ExportError, IBNormError, ModelFileError
from ibnorm_export.evaluation.candidates import ModelCandidate, open_candidate
from ibnorm_export.evaluation.options import EvaluationOptions
from ibnorm_export.exporter.export import ExportOptions, export
from ibnorm_export.exporter.fixed_shapes import fixed_sizes
from ibnorm_export.exporter.options import parse_shape
from ibnorm_export.exporter.runtime_settings import SETTINGS, runtime_settings
from ibnorm_export.exporter.single_file import _choose_opset
from ibnorm_export.generation.sessions import open_sessions
from ibnorm_export.runtimes.ort import OrtRunner
from ibnorm_export.verifier.report import ParityReport
from ibnorm_export.verifier.verify import VerifyOptions, verify


@pytest.fixture(scope="module")
def llama(llama_checkpoint: Path) -> LoadedModel:
    return models.load(llama_checkpoint)


@pytest.fixture(scope="module")
def writing_llama(llama_checkpoint: Path) -> LoadedModel:
    return models.load(llama_checkpoint, task=Task.TEXT_GENERATION)


# -- what a runtime sets ---------------------------------------------------------------------------


def test_the_table_has_every_runtime_and_says_why() -> None:
    assert set(SETTINGS) == set(RuntimeName)
    assert all(row.why.endswith(".") for row in SETTINGS.values())


@pytest.mark.parametrize(
    ("text", "inline", "opset", "bits"),
    [
        ("ort", False, 26, (4, 8)),
        ("ort>=1.18", False, 21, (4,)),
        ("ort>=1.22", False, 22, (4, 8)),
        ("ORT >= 1.24.4", False, 25, (4, 8)),
        ("openvino", True, 22, (4, 8)),
        ("litert", True, 18, ()),
    ],
)
def test_what_a_runtime_sets(text: str, inline: bool, opset: int, bits: tuple[int, ...]) -> None:
    options = ExportOptions(runtime=text)
    assert options.runtime is not None
    assert (options.inline, options.runtime.opset, options.runtime.bits) == (inline, opset, bits)


@pytest.mark.parametrize(
    ("runtime", "family", "dtype", "opset"),
    [
        (None, "vit", "fp32", 20),
        ("ort", "vit", "fp32", 23),
        ("ort>=1.24", "vit", "fp32", 23),
        ("ort>=1.23", "vit", "fp32", 20),  # its Attention is not right
        ("ort>=1.23", "vit", "bf16", 22),
        ("openvino", "vit", "fp32", 20),
        ("web", "vit", "fp32", 20),
        ("ort", "resnet", "fp32", 20),
    ],
)
def test_the_opset_with_the_fastest_kernels(
    llama: LoadedModel, runtime: str | None, family: str, dtype: str, opset: int
) -> None:
    model = replace(llama, family=family, opset=20)
    assert _choose_opset(model, ExportOptions(dtype, runtime=runtime)) == opset


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("coreml", "must be one of ort, web, openvino, tensorrt"),
        ("ort>=1", "must be one of"),
        ("ort>=1.17", "files run on ONNX Runtime 1.18 and later"),
        ("web>=1.24", "only ort takes a version, so write web"),
    ],
)
def test_runtimes_that_do_not_exist(text: str, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        runtime_settings(text)


@pytest.mark.parametrize(
    ("runtime", "stated", "message"),
    [
        ("ort>=1.18", {"opset": 23}, "opset is 23; it must be at most 21"),
        ("litert", {"dtype": "fp16"}, "dtype is fp16; it must be fp32"),
        ("openvino", {"inline": False}, "the norms must be expanded, but inline is False"),
        ("openvino", {"cache": "static"}, "the cache is static; it must be dynamic"),
    ],
)
def test_a_stated_option_that_contradicts_is_an_error(runtime: str, stated: dict[str, str], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        ExportOptions(runtime=runtime, **stated)


def test_a_stated_option_that_the_runtime_takes_wins() -> None:
    options = ExportOptions(runtime="ort>=1.18", opset=18, inline=True)
    assert (options.opset, options.inline) == (18, True)


def test_the_head_of_quantised_weights_follows_the_runtime() -> None:
    old, new = (ExportOptions.with_weights("int4", runtime=runtime) for runtime in ("ort>=1.18", "ort>=1.22"))
    assert old.quantization is not None
    assert new.quantization is not None
    assert (old.quantization.head_bits, new.quantization.head_bits) == (4, 8)
    with pytest.raises(ExportError, match="matrices are stored in int8; the runtime takes int4"):
        ExportOptions.with_weights("int8", runtime="ort>=1.18")


def test_models_that_a_runtime_does_not_run(writing_llama: LoadedModel, llama: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="loaded for the task text-generation; the runtime takes forward"):
        export(writing_llama, tmp_path / "out", options=ExportOptions(runtime="litert"))
    settings = replace(SETTINGS[RuntimeName.IREE], families=("vit", "resnet"))
    with pytest.raises(ExportError, match="is a llama; the runtime takes vit, resnet"):
        export(llama, tmp_path / "out.onnx", options=ExportOptions(runtime=settings))
    with pytest.raises(ExportError, match=r"bf16 needs opset 22, but --for ort>=1.18 takes at most 21"):
        export(llama, tmp_path / "out.onnx", options=ExportOptions("bf16", runtime="ort>=1.18"))


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_cache_in_half_precision_avoids_attention_for_openvino(
    writing_llama: LoadedModel, tmp_path: Path, dtype: str
) -> None:
    """OpenVINO cannot compile the Attention of opset 23 with a cache in these types."""
    exported = export(writing_llama, tmp_path / "out", options=ExportOptions(dtype, runtime="openvino"))
    assert exported.opset == 22
    assert not any(node.op_type == "Attention" for node in exported.proto.graph.node)


# -- fixed sizes -----------------------------------------------------------------------------------


def steps_of(report: ParityReport) -> set[str]:
    assert report.numeric is not None
    return {output.name for output in report.numeric.outputs}


@pytest.fixture(scope="module")
def for_litert(llama: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> ExportedModel:
    return export(llama, tmp_path_factory.mktemp("litert") / "m.onnx", options=ExportOptions(runtime="litert"))


def test_a_file_for_litert_has_fixed_sizes_and_verifies(for_litert: ExportedModel, llama: LoadedModel) -> None:
    assert {tensor.shape for tensor in for_litert.inputs} == {(1, 64)}  # the model takes 64 tokens
    assert for_litert.metadata.shape == {BATCH: 1, SEQUENCE: 64}
    assert (for_litert.opset, for_litert.metadata.inlined) == (18, True)
    report = verify(for_litert, llama, options=VerifyOptions(samples=2))
    assert report, report.findings
    assert any("takes one size only: batch_size 1, sequence_length 64" in note for note in report.notes)


def test_inputs_that_do_not_fit_are_one_clear_line(for_litert: ExportedModel) -> None:
    ids = np.zeros((1, 5), dtype=np.int64)
    with pytest.raises(ModelFileError, match=r"index: 1 Got: 5 Expected: 64") as raised:
        OrtRunner(for_litert.path, threads=1).run({"input_ids": ids, "attention_mask": ids})
    assert "\n" not in str(raised.value)


def test_a_size_that_the_file_does_not_take_is_not_timed(for_litert: ExportedModel) -> None:
    with pytest.raises(IBNormError, match="takes only batch_size 1, not 2: leave the size out"):
        bench(for_litert, options=BenchOptions(sizes={"batch": 2}))


def test_a_cache_of_a_fixed_size_verifies(writing_llama: LoadedModel, tmp_path: Path) -> None:
    options = ExportOptions(shape={"batch_size": 1, "sequence_length": 1, "past_sequence_length": 7})
    exported = export(writing_llama, tmp_path / "out", options=options)
    assert exported.metadata.shape == {BATCH: 1, SEQUENCE: 1, PAST: 7, TOTAL: 8}
    report = verify(exported, writing_llama, options=VerifyOptions(samples=2))
    assert report, report.findings
    assert not any(name.startswith("decoding") for name in steps_of(report))
    assert any(note.endswith("nor is decoding, for which the cache must grow") for note in report.notes)
    with pytest.raises(ModelFileError, match=r"takes only past_sequence_length 7, .*, and a text has any length"):
        open_sessions(exported.path)


def test_texts_of_any_length_do_not_fit_a_fixed_one(for_litert: ExportedModel) -> None:
    candidate = open_candidate(for_litert, options=EvaluationOptions())
    assert isinstance(candidate, ModelCandidate)
    with pytest.raises(ModelFileError, match=r"takes only input_ids of the shape 1, 64, and texts have any length"):
        candidate._logits(np.zeros((2, 7), dtype=np.int64))


def test_images_are_classified_in_batches_of_the_fixed_size(
    vit_checkpoint: Path, exported_vit: ExportedModel, tmp_path: Path
) -> None:
    fixed = export(models.load(vit_checkpoint), tmp_path / "m.onnx", options=ExportOptions(shape={BATCH: 2}))
    images = np.random.default_rng(0).standard_normal((5, 1, 8, 8)).astype(np.float32)
    found, expected = (
        open_candidate(file, options=EvaluationOptions()).classify(images) for file in (fixed, exported_vit)
    )
    # sums of up to 64 products in float32, which may differ in every rounding
    np.testing.assert_allclose(found, expected, rtol=0, atol=64 * 2**-23 * float(np.abs(expected).max()))


@pytest.mark.parametrize(
    ("shape", "steps"),
    [({BATCH: 1}, 32), ({BATCH: 2, SEQUENCE: 1}, 51), ({SEQUENCE: 8}, 5)],
)
def test_a_file_with_some_fixed_sizes_is_decoded_within_them(
    writing_llama: LoadedModel, tmp_path: Path, shape: dict[str, int], steps: int
) -> None:
    exported = export(writing_llama, tmp_path / "out", options=ExportOptions(shape=shape))
    report = verify(exported, writing_llama, options=VerifyOptions(samples=2))
    assert report, report.findings
    assert {"prompt (1 call)", f"decoding ({steps} calls)"} <= steps_of(report)
    assert not any("nor is decoding" in note for note in report.notes)


def test_a_static_cache_takes_fixed_sizes(writing_llama: LoadedModel, tmp_path: Path) -> None:
    options = ExportOptions(cache="static", shape={BATCH: 1, SEQUENCE: 1})
    exported = export(writing_llama, tmp_path / "out", options=options)
    assert exported.inputs[0].shape == (1, 1)
    report = verify(exported, writing_llama, options=VerifyOptions(samples=2))
    assert report, report.findings


def test_sizes_that_do_not_fit_into_memory(writing_llama: LoadedModel) -> None:
    with pytest.raises(ExportError, match=r"batch_size=999999999, with which the inputs take .* GB; this machine has"):
        fixed_sizes(writing_llama, ExportOptions(shape={BATCH: 999_999_999}))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"height": 4}, "no such dynamic axis; it has batch_size, past_sequence_length"),
        ({"sequence_length": 65}, "takes at most 64 tokens"),
        ({"sequence_length": 1, "past_sequence_length": 64}, "total_sequence_length=65, but"),
        ({"sequence_length": 1, "past_sequence_length": 2, "total_sequence_length": 4}, "make 3; leave"),
        ({"total_sequence_length": 4}, "give past_sequence_length and sequence_length instead"),
    ],
)
def test_sizes_that_do_not_fit_the_model(writing_llama: LoadedModel, shape: dict[str, int], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        fixed_sizes(writing_llama, ExportOptions(shape=shape))


def test_sizes_as_text() -> None:
    assert parse_shape("batch_size=1, sequence=128") == {BATCH: 1, SEQUENCE: 128}
    for text in ("", "batch_size", "batch_size=", "batch_size=-1", "batch_size=1;", "=3", "a=1,"):
        with pytest.raises(ExportError, match="it must be AXIS=SIZE"):
            parse_shape(text)
    with pytest.raises(ExportError, match="names batch twice"):
        parse_shape("batch_size=1,batch=2")
    for shape, message in (({"batch_size": 0}, "at least 1"), ([1], "must hold sizes by name")):
        with pytest.raises(ExportError, match=message):
            ExportOptions(shape=shape)  # type: ignore[arg-type]  # one of them is a list
