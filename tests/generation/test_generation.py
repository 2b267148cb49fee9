"""Generation: the cache in the graph, decoding against PyTorch, saved caches, tokenizers, folders."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import transformers

from ibnorm_export import IBNormSpec, models
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.input_files import read_inputs
from ibnorm_export.artifacts.kv_cache import input_specs, positions
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.tensors import Arrays, DType
from ibnorm_export.artifacts.tokenizer import FolderTokenizer
from ibnorm_export.errors import BackendUnavailable, CheckpointError, ExportError, IBNormError, ModelFileError
from ibnorm_export.exporter.export import ExportOptions
from ibnorm_export.exporter.text_folder import export_folder
from ibnorm_export.generation.decoder import Decoder
from ibnorm_export.generation.sampling import Sampling
from ibnorm_export.generation.text_model import open_folder
from ibnorm_export.runtimes.registry import open_runner
from ibnorm_export.runtimes.runner import Kernels
from ibnorm_export.runtimes.torch import TorchRunner
from ibnorm_export.verifier.outputs.decoding import STEPS, decode
from ibnorm_export.verifier.verify import VerifyOptions, verify
from tests.support.accuracy import assert_rows_close
from tests.support.checkpoints import save_checkpoint
from tests.support.comparisons import compare_runners

TASK = "text-generation"
FUNCTION = VerifyOptions(kernels=Kernels.FUNCTION)


@pytest.fixture(scope="module")
def exported(portable_folder: Path) -> ExportedModel:
    return ExportedModel(portable_folder)


def load(checkpoint: Path) -> LoadedModel:
    return models.load(checkpoint, task=TASK)


def decoder(exported: ExportedModel) -> Decoder:
    return Decoder(open_runner("ort-cpu", exported, kernels=Kernels.FUNCTION), input_specs(exported))


# ---- the folder ----


def test_the_folder_is_complete_and_has_standard_operators(exported: ExportedModel) -> None:
    names = {p.name for p in exported.path.parent.iterdir()}
    assert {"model.onnx", "config.json", "tokenizer.json", "tokenizer_config.json"} <= names
    assert {node.domain for node in exported.proto.graph.node} == {"", "ai.ibnorm"}
    assert {"Attention", "RotaryEmbedding"} <= set(exported.operators)
    assert exported.metadata.task == TASK
    shapes = {t.name: t.shape for t in exported.inputs}
    assert shapes["past_key_values.1.value"] == ("batch_size", 2, "past_sequence_length", 8)
    assert shapes["attention_mask"] == ("batch_size", "total_sequence_length")
    assert [t.name for t in exported.outputs][:3] == ["logits", "present.0.key", "present.0.value"]


@pytest.mark.parametrize("loader", ["transformers", "own"])
def test_the_byte_tokenizer_is_bytes(exported: ExportedModel, loader: str) -> None:
    text = "naïve 日本\n  \x00 end"
    folder = exported.path.parent
    if loader == "own":
        tokens = FolderTokenizer(folder, 256)
        ids, back = tokens.encode(text).tolist(), tokens.decode(tokens.encode(text))
    else:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        ids = tokenizer(text)["input_ids"]
        back = tokenizer.decode(ids)
    assert ids == list(text.encode())
    assert back == text


def test_a_folder_of_something_else_is_left_alone(language_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ExportError, match=r"has no model\.onnx"):
        export_folder(load(language_checkpoint), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


# ---- verification ----


def test_decoding_is_verified_in_fp32(exported: ExportedModel, language_checkpoint: Path) -> None:
    report = verify(exported, load(language_checkpoint), options=FUNCTION)
    assert report, report.findings
    assert report.numeric is not None
    outputs = {o.name: o for o in report.numeric.outputs}
    assert outputs[f"decoding ({STEPS} calls)"].top1_agreement == 1.0
    assert outputs["present.1.value"].elements > 0


@pytest.mark.parametrize("dtype", [DType.FP16, DType.BF16])
def test_decoding_is_verified_in_half_precision(language_checkpoint: Path, tmp_path: Path, dtype: DType) -> None:
    half = export_folder(load(language_checkpoint), tmp_path / "half", options=ExportOptions(dtype=dtype))
    assert {t.dtype for t in half.inputs if t.name.startswith("past")} == {dtype.value}
    report = verify(half, load(language_checkpoint), options=FUNCTION)
    assert report, report.findings
    if dtype is DType.BF16:
        with pytest.raises(BackendUnavailable, match="bf16, which ONNX Runtime cannot compute on a CPU"):
            open_folder(half.path.parent)
    else:
        assert open_folder(half.path.parent).generate("x", Sampling(4)).tokens


def test_a_cache_that_goes_wrong_with_its_length_is_found(
    exported: ExportedModel, language_checkpoint: Path, tmp_path: Path
) -> None:
    """Presents of the two layers are swapped: every single call has correct logits, but decoding does not."""
    proto = onnx.load(exported.path)
    swapped = {"present.0.key": "present.1.key", "present.1.key": "present.0.key"}
    for node in proto.graph.node:
        for names in (node.input, node.output):
            names[:] = [swapped.get(name, name) for name in names]
    onnx.save(proto, tmp_path / "model.onnx")
    report = verify(ExportedModel(tmp_path), load(language_checkpoint), options=FUNCTION)
    assert not report
    assert any(f.where == "decoding" for f in report.findings)
    assert not any(f.where in ("output logits", "prompt") for f in report.findings)


@pytest.mark.parametrize("longest", [1, 2, 16])
def test_a_model_of_few_positions_is_verified(tmp_path: Path, longest: int) -> None:
    """GPT-2's positions are a table: a position past its end cannot be looked up."""
    config = {"model_type": "gpt2", "n_embd": 32, "n_head": 4, "n_layer": 1, "vocab_size": 256, "n_positions": longest}
    save_checkpoint(tmp_path / "gpt2", config, IBNormSpec("L", 4.0, epsilon=1e-5), seed=0)
    model = load(tmp_path / "gpt2")
    for index in range(8):
        arrays = model.sample(np.random.default_rng(index), index)
        assert arrays["attention_mask"].shape[1] <= longest
        assert (arrays["attention_mask"][:, -arrays["input_ids"].shape[1] :] != 0).all()
        assert (
            arrays["past_key_values.0.key"].shape[2] == arrays["attention_mask"].shape[1] - arrays["input_ids"].shape[1]
        )
    exported = export_folder(load(tmp_path / "gpt2"), tmp_path / "out")
    report = verify(exported, model, options=FUNCTION)
    assert report, report.findings
    assert report.numeric is not None
    steps = [o.name for o in report.numeric.outputs if o.name.startswith("decoding")]
    calls = min(longest - 1, STEPS)
    assert steps == ([] if longest == 1 else [f"decoding ({calls} call{'s' * (calls > 1)})"])
    assert any("one position" in note for note in report.notes) == (longest == 1)


def test_samples_of_many_positions_cover_the_shapes(language_checkpoint: Path) -> None:
    model = load(language_checkpoint)
    shapes = [model.sample(np.random.default_rng(0), index) for index in range(4)]
    found = [(*a["input_ids"].shape, a["past_key_values.0.key"].shape[2]) for a in shapes]
    assert found == [(1, 33, 0), (3, 1, 19), (1, 1, 0), (2, 5, 9)]
    np.testing.assert_array_equal((shapes[1]["attention_mask"] == 0).sum(axis=1), [0, 4, 8])


def first_call(tokens: int) -> Arrays:
    """One row of `tokens` tokens, without a past."""
    empty = np.zeros((1, 2, 0, 8), dtype=np.float32)
    return {
        "input_ids": np.full((1, tokens), 9),
        "attention_mask": np.ones((1, tokens), np.int64),
        "position_ids": np.arange(tokens)[None],
        **{f"past_key_values.{layer}.{kind}": empty for layer in range(2) for kind in ("key", "value")},
    }


def test_inputs_of_a_first_call_have_a_past_of_length_0(
    exported: ExportedModel, language_checkpoint: Path, tmp_path: Path
) -> None:
    model = load(language_checkpoint)
    np.savez(tmp_path / "in.npz", **first_call(3))
    report = verify(exported, model, options=FUNCTION, inputs=[read_inputs(tmp_path / "in.npz", model)])
    assert report, report.findings
    np.savez(tmp_path / "in.npz", **first_call(0))
    with pytest.raises(ModelFileError, match=r"input_ids has shape \(1, 0\); .* with no axis of size 0"):
        read_inputs(tmp_path / "in.npz", model)
    unknown = {**first_call(3), "input_ids": np.full((1, 3), 999)}
    with pytest.raises(ModelFileError, match=r"on input 0 \(input_ids from 999 to 999, .*: index out of range"):
        verify(exported, model, options=FUNCTION, inputs=[unknown])


def test_a_text_of_one_token_is_too_short(exported: ExportedModel, language_checkpoint: Path) -> None:
    with pytest.raises(ModelFileError, match="the text has 1 token; predictions need at least two"):
        verify(exported, load(language_checkpoint), options=FUNCTION, text="a")


class _Forgetful:
    """Depends on more than its inputs: a runner whose results change from call to call."""

    name = "forgetful"

    def __init__(self, runner: TorchRunner) -> None:
        self._runner, self._calls = runner, 0

    def run(self, inputs: Arrays) -> Arrays:
        self._calls += 1
        outputs = self._runner.run(inputs)
        return {**outputs, "logits": outputs["logits"] * np.float32(1.0 + 1e-7 * (self._calls > 34))}


def test_a_resumed_cache_must_be_bit_identical(exported: ExportedModel, language_checkpoint: Path) -> None:
    model = load(language_checkpoint)
    torch_runner = TorchRunner(model)
    assert decode(compare_runners(exported, model, runners={"torch": torch_runner})).findings == ()
    decoded = decode(compare_runners(exported, model, runners={"odd": _Forgetful(torch_runner)}))
    assert all(o.passed for o in decoded.outputs), "the change is too small for the error bound"
    assert [f.where for f in decoded.findings] == ["resume"]


# ---- the decoder ----


def test_cached_steps_equal_one_pass(exported: ExportedModel) -> None:
    tokens = np.arange(40, dtype=np.int64)[None] * 7 % 256
    one, many = decoder(exported), decoder(exported)
    one.start(1)
    many.start(1)
    whole = one.feed(tokens)
    parts = [many.feed(tokens[:, :11]), many.feed(tokens[:, 11:13])]
    parts += [many.feed(tokens[:, i : i + 1]) for i in range(13, 40)]
    assert many.length == 40
    assert_rows_close(np.concatenate(parts, axis=1), whole)


def test_padding_on_the_left_changes_nothing(exported: ExportedModel) -> None:
    tokens = np.arange(10, dtype=np.int64)[None] + 60
    single, batch = decoder(exported), decoder(exported)
    single.start(1)
    batch.start(2)
    padded = np.concatenate([np.zeros((1, 4), dtype=np.int64), tokens], axis=1)
    mask = np.ones((2, 14), dtype=np.int64)
    mask[0, :4] = 0
    a = single.feed(tokens)[0, -1]
    b = batch.feed(np.concatenate([padded, np.full((1, 14), 9)]), mask)[0, -1]
    assert_rows_close(a, b)
    np.testing.assert_array_equal(positions(mask)[:, -1], [9, 13])


def test_a_saved_cache_must_fit(exported: ExportedModel, tmp_path: Path) -> None:
    used = decoder(exported)
    used.start(1)
    used.feed(np.array([[1, 2, 3]]))
    used.save(tmp_path / "cache.npz")
    with np.load(tmp_path / "cache.npz") as archive:
        good = dict(archive)
    bad = {**good, "past_key_values.1.key": good["past_key_values.1.key"][:, :, :2]}
    np.savez(tmp_path / "bad.npz", **bad)
    with pytest.raises(ModelFileError, match=r"past_key_values.1.key has shape \(1, 2, 2, 8\); it must be"):
        decoder(exported).load(tmp_path / "bad.npz")
    del bad["past_key_values.1.key"]
    np.savez(tmp_path / "bad.npz", **bad)
    with pytest.raises(ModelFileError, match="not a cache of this model"):
        decoder(exported).load(tmp_path / "bad.npz")
    (tmp_path / "bad.npz").write_bytes(b"junk")
    with pytest.raises(ModelFileError, match="not a saved cache"):
        decoder(exported).load(tmp_path / "bad.npz")
    with pytest.raises(ModelFileError, match="does not exist"):
        decoder(exported).load(tmp_path / "none.npz")


# ---- what cannot generate ----


def test_a_model_that_is_not_a_language_model_is_rejected(vit_checkpoint: Path, llama_checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="not a causal language model"):
        load(vit_checkpoint)
    with pytest.raises(CheckpointError, match="'speech'; it must be one of forward, text-generation"):
        models.load(llama_checkpoint, task="speech")
    with pytest.raises(CheckpointError, match="needs a Hugging Face folder"):
        models.load(llama_checkpoint, "a:b", task=TASK)


def test_a_forward_file_has_no_cache(exported_llama: ExportedModel) -> None:
    with pytest.raises(ModelFileError, match="no cache; export it with --task text-generation"):
        decoder(exported_llama)


def test_a_tokenizer_must_fit(exported: ExportedModel, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"no tokenizer\.json"):
        FolderTokenizer(tmp_path)
    with pytest.raises(ModelFileError, match=r"token 255, but the model's embedding has only 100 rows"):
        FolderTokenizer(exported.path.parent, 100)
    with pytest.raises(ModelFileError, match="the prompt is empty"):
        FolderTokenizer(exported.path.parent).encode("")
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": 3}))
    with pytest.raises(IBNormError, match="is not a tokenizer"):
        FolderTokenizer(tmp_path)
