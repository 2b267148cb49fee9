"""What models of other kinds need beyond the small LLaMA: GPT-2, scaled rotary positions, shards, padding."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ibnorm_export import IBNormSpec, models
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.kv_cache import input_specs
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.tokenizer import write_byte_tokenizer
from ibnorm_export.errors import CheckpointError, ExportError
from ibnorm_export.exporter.export import ExportOptions
from ibnorm_export.exporter.genai import export_genai
from ibnorm_export.exporter.text_folder import export_folder
from ibnorm_export.generation.decoder import Decoder
from ibnorm_export.generation.sampling import Sampling
from ibnorm_export.generation.text_model import open_checkpoint, open_folder
from ibnorm_export.graph.quantization import Quantization
from ibnorm_export.models.registry import preset
from ibnorm_export.runtimes.registry import open_runner
from ibnorm_export.runtimes.runner import Kernels
from ibnorm_export.verifier.verify import VerifyOptions, verify
from tests.support.accuracy import assert_rows_close
from tests.support.checkpoints import LLAMA, save_checkpoint

FUNCTION = VerifyOptions(kernels=Kernels.FUNCTION)
GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "n_embd": 64,
    "n_head": 4,
    "n_layer": 2,
    "n_positions": 64,
    "vocab_size": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "initializer_range": 0.2,
}
#: Most of an export's time goes into its layers.
ONE_LAYER: dict[str, Any] = {**LLAMA, "hidden_size": 64, "num_hidden_layers": 1}


def load(checkpoint: Path) -> LoadedModel:
    return models.load(checkpoint, task="text-generation")


def make(folder: Path, config: dict[str, Any], spec: IBNormSpec | None = None) -> Path:
    save_checkpoint(folder, config, spec or IBNormSpec("L", 4.0, epsilon=1e-5, bias=False))
    write_byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("families") / "gpt2", GPT2, IBNormSpec("L", 4.0, epsilon=1e-5))


@pytest.fixture(scope="module", params=["dynamic", "static"])
def exported_gpt2(
    request: pytest.FixtureRequest, gpt2: Path, tmp_path_factory: pytest.TempPathFactory
) -> ExportedModel:
    """GPT-2 with each kind of cache."""
    return export_folder(
        load(gpt2), tmp_path_factory.mktemp("gpt2") / "out", options=ExportOptions(cache=request.param)
    )


def test_gpt2_decodes_as_pytorch_does(gpt2: Path, exported_gpt2: ExportedModel) -> None:
    exported = exported_gpt2
    assert (exported.operators["ai.ibnorm::IBNormL"], exported.operators["ai.ibnorm::SkipIBNormL"]) == (1, 4)
    assert {node.domain for node in exported.proto.graph.node} == {"", "ai.ibnorm"}
    report = verify(exported, load(gpt2), options=FUNCTION)
    assert report, report.findings
    assert report.static is not None
    assert report.static.weights == 29, "2 embeddings, 4 matrices of each layer, 5 norms, biases of both, the tied head"
    sampling = Sampling(12, 1.1, top_p=0.9, seed=2)
    texts = [
        m.generate("ab", sampling).tokens for m in (open_folder(exported.path.parent), open_checkpoint(load(gpt2)))
    ]
    assert texts[0] == texts[1]


def test_gpt2_quantised(gpt2: Path, tmp_path: Path) -> None:
    """GPT-2 multiplies with Gemm, which the quantizer does not accept."""
    exported = export_folder(load(gpt2), tmp_path / "out", options=ExportOptions(quantization=Quantization(8)))
    assert exported.operators["com.microsoft::MatMulNBits"] == 9
    assert "Gemm" not in exported.operators
    report = verify(exported, load(gpt2), options=FUNCTION)
    assert report.static, report.findings
    assert report.numeric is not None
    (quality,) = report.numeric.quality  # agreement is required of trained models; this one has many near ties
    assert quality.divergence < quality.bound.divergence
    assert quality.perplexity / quality.baseline_perplexity < quality.bound.perplexity


def test_gpt2_is_not_for_genai(gpt2: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match=r"of the family llama, .* of the family gpt2, .* Export with --target portable"
    ):
        export_genai(load(gpt2), tmp_path / "out")
    (gpt2_config := json.loads((gpt2 / "config.json").read_text()))["add_cross_attention"] = True
    crossed = tmp_path / "crossed"
    crossed.mkdir()
    for file in gpt2.iterdir():
        (crossed / file.name).write_bytes(file.read_bytes())
    (crossed / "config.json").write_text(json.dumps(gpt2_config))
    with pytest.raises(CheckpointError, match="cross-attention"):
        load(crossed)


@pytest.mark.parametrize(("name", "millions"), [("gpt2-124m", 124), ("gpt2-355m", 355)])
def test_presets_have_their_size(name: str, millions: int) -> None:
    _, c = preset(name)
    n, layers = int(str(c["n_embd"])), int(str(c["n_layer"]))
    embeddings = (int(str(c["vocab_size"])) + int(str(c["n_positions"]))) * n
    block = 12 * n * n + 13 * n  # attention 4 n^2 + 4 n, feed-forward 8 n^2 + 5 n, two norms of 2 n
    assert round((embeddings + layers * block + 2 * n) / 1e6) == millions


# ---- rotary positions ----

SCALED: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
        "rope_theta": 10000.0,
    },
    "yarn": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "rope_theta": 10000.0,
    },
}


@pytest.mark.parametrize(("target", "kind"), [*(("portable", kind) for kind in SCALED), ("ort-genai", "llama3")])
def test_scaled_rotary_positions(tmp_path: Path, kind: str, target: str) -> None:
    config = {**ONE_LAYER, "initializer_range": 0.2, "rope_parameters": SCALED[kind]}
    checkpoint = make(tmp_path / "llama", config)
    plain = make(tmp_path / "plain", {**config, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}})
    make_folder = {"portable": export_folder, "ort-genai": functools.partial(export_genai, kernels=Kernels.FUNCTION)}
    exported = make_folder[target](load(checkpoint), tmp_path / "out")
    report = verify(exported, load(checkpoint), options=FUNCTION)
    assert report, report.findings
    assert not verify(exported, load(plain), options=FUNCTION), "the scaling matters at these lengths"


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_scaling_that_genai_gets_wrong_is_rejected(tmp_path: Path, kind: str) -> None:
    checkpoint = make(tmp_path / "llama", {**LLAMA, "hidden_size": 64, "rope_parameters": SCALED[kind]})
    with pytest.raises(ExportError, match=f"rotary scaling is '{kind}'"):
        export_genai(load(checkpoint), tmp_path / "out", kernels=Kernels.FUNCTION)


def test_positions_that_change_with_the_length_are_rejected(tmp_path: Path) -> None:
    config = {**LLAMA, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}
    checkpoint = make(tmp_path / "llama", config)
    with pytest.raises(CheckpointError, match=r"'dynamic', whose frequencies change .* default, linear, llama3, yarn"):
        load(checkpoint)


# ---- shards, padding ----


@pytest.mark.parametrize("target", ["portable", "ort-genai"])
def test_a_checkpoint_in_shards(tmp_path: Path, target: str) -> None:
    whole = make(tmp_path / "whole", ONE_LAYER)
    sharded = tmp_path / "sharded"
    load(whole).module.save_pretrained(sharded, max_shard_size="60KB")
    write_byte_tokenizer(sharded)
    assert len(list(sharded.glob("*.safetensors"))) > 2
    outs = []
    for source in (whole, sharded):
        out = tmp_path / f"{source.name}-out"
        if target == "portable":
            outs.append(export_folder(load(source), out))
        else:
            outs.append(export_genai(load(source), out, kernels=Kernels.FUNCTION))
    assert verify(outs[1], load(sharded), options=FUNCTION)
    assert outs[0].weights.keys() == outs[1].weights.keys()
    assert all(np.array_equal(outs[0].array(name), outs[1].array(name)) for name in outs[0].weights)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing(exported_gpt2: ExportedModel, side: str) -> None:
    row, follow = np.arange(9)[None] * 7 + 60, np.array([[5], [9], [17]])

    def decoder(batch: int) -> Decoder:
        result = Decoder(open_runner("ort-cpu", exported_gpt2, kernels=Kernels.FUNCTION), input_specs(exported_gpt2))
        result.start(batch)
        return result

    single, batch = decoder(1), decoder(2)
    mask = np.ones((2, 13), dtype=np.int64)
    place = slice(4, 13) if side == "left" else slice(0, 9)
    mask[1, np.r_[0:4] if side == "left" else np.r_[9:13]] = 0
    tokens = np.full((2, 13), 33)
    tokens[1, place] = row
    logits = [single.feed(row)[0], batch.feed(tokens, mask)[1, place]]
    for token in follow:
        logits[0] = np.concatenate([logits[0], single.feed(token[None])[0]])
        logits[1] = np.concatenate([logits[1], batch.feed(np.array([token, token]))[1]])
    assert_rows_close(logits[0], logits[1])
    assert np.abs(logits[0]).max() > 1.0
