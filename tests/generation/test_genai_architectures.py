"""Architectures for onnxruntime-genai: those of its builder that agree with transformers, and the refusal of others."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ibnorm_export import models
from ibnorm_export.artifacts.tokenizer import write_byte_tokenizer
from ibnorm_export.errors import ExportError
from ibnorm_export.exporter.genai import export_genai
from ibnorm_export.generation.genai_session import GenaiModel
from ibnorm_export.op.float64_mode import compute_in_float64
from ibnorm_export.runtimes.runner import Kernels
from ibnorm_export.verifier.verify import VerifyOptions, verify
from tests.support.architectures import save_theirs
from tests.support.file_against_module import TOLERANCE

#: Heads of 16, the smallest that GroupQueryAttention rotates, and the tokens of the tokenizer of bytes.
SIZES: dict[str, Any] = {"hidden_size": 64, "vocab_size": 300, "eos_token_id": 2}
NO_WINDOW: dict[str, Any] = {"sliding_window": None, "use_sliding_window": False, "layer_types": None}


def checkpoint(name: str, kind: str, folder: Path, **changes: Any) -> Path:
    save_theirs(name, kind, folder, **{**SIZES, **changes})
    write_byte_tokenizer(folder)
    return folder


#: The builder's rotary tables are float32: an angle of up to 12 is off by up to 12 * 2^-24, as much again as what
#: `TOLERANCE` allows. PyTorch's error in float32 is added: 4e-6 for Phi-3 with T, whose rows are ill-conditioned.
LIMIT = 2 * TOLERANCE

#: By architecture, settings that make every layer attend to all tokens.
SETTINGS: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "qwen2": NO_WINDOW,
    "mistral": NO_WINDOW,
    "phi3": {**NO_WINDOW, "hidden_size": 128},  # half of each head of 32 is rotated
    "gemma": {"hidden_size": 96},  # whose root, the scale of the embedding, is not a decimal number
    "gemma2": {
        "hidden_size": 96,
        "layer_types": ["full_attention"] * 2,
        "sliding_window": 64,
        "query_pre_attn_scalar": 20,
    },
}


@pytest.mark.parametrize(
    ("name", "kind", "norms"),
    [
        ("qwen3", "T", 9),
        ("qwen2", "S", 5),
        ("mistral", "L", 5),
        ("phi3", "L", 5),
        ("phi3", "T", 5),
        ("gemma", "L", 5),
        ("gemma2", "S", 9),
    ],
)
def test_exported_and_verified(name: str, kind: str, norms: int, tmp_path: Path) -> None:
    sizes = {**SIZES, **SETTINGS[name]}
    theirs = save_theirs(name, kind, tmp_path / "c", **sizes)
    write_byte_tokenizer(tmp_path / "c")
    model = models.load(tmp_path / "c", task="text-generation")
    exported = export_genai(model, tmp_path / "out", kernels=Kernels.FUNCTION)
    assert len(exported.norms) == norms
    report = verify(exported, model, options=VerifyOptions(kernels=Kernels.FUNCTION))
    assert report, report.findings
    ids = np.random.default_rng(0).integers(3, 300, (1, 12))
    with torch.no_grad():
        in_float32 = copy.deepcopy(theirs).float()(torch.from_numpy(ids)).logits.numpy()
        with compute_in_float64():
            truth = theirs(torch.from_numpy(ids)).logits.numpy()
    session = GenaiModel(exported.path.parent).start(1, 20)  # onnxruntime-genai itself
    for length, got in ((8, session.feed(ids[:, :8])), (9, session.feed(ids[:, 8:9])), (12, session.feed(ids[:, 9:]))):
        want = truth[:, length - 1]
        baseline = np.linalg.norm(in_float32[:, length - 1] - want)
        assert np.linalg.norm(got - want) <= LIMIT * np.linalg.norm(want) + baseline


def test_a_model_without_an_end_token_is_refused(tmp_path: Path) -> None:
    config = checkpoint("qwen3", "S", tmp_path / "c", eos_token_id=None)
    model = models.load(config, task="text-generation")
    with pytest.raises(ExportError, match=r"eos_token_id .* Set eos_token_id in its config.json"):
        export_genai(model, tmp_path / "out", kernels=Kernels.FUNCTION)
    assert not (tmp_path / "out").exists()


def test_a_rotated_part_that_the_kernel_cannot_have(tmp_path: Path) -> None:
    model = models.load(checkpoint("phi3", "L", tmp_path / "c", **NO_WINDOW), task="text-generation")
    with pytest.raises(ExportError, match="16 values, of which 8 have rotary positions"):
        export_genai(model, tmp_path / "out", kernels=Kernels.FUNCTION)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mistral", "sliding window"),
        ("phi3", "sliding window"),
        ("gemma2", "sliding window"),
        ("gemma3_text", "reads rope_local_base_freq"),
        ("olmo2", "only models of the family llama, mistral, qwen2, qwen3, phi3, gemma, gemma2"),
    ],
)
def test_refused(name: str, words: str, tmp_path: Path) -> None:
    model = models.load(checkpoint(name, "L", tmp_path / "c"), task="text-generation")
    with pytest.raises(ExportError, match=words):
        export_genai(model, tmp_path / "out", kernels=Kernels.FUNCTION)
