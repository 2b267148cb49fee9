"""Architectures for onnxruntime-genai: those of its builder that agree with transformers, and the refusal of others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ibnorm_export import models
from ibnorm_export.artifacts.tokenizer import write_byte_tokenizer
from ibnorm_export.errors import ExportError
from ibnorm_export.exporter.genai import export_genai
from ibnorm_export.runtimes.runner import Kernels
from ibnorm_export.verifier.verify import VerifyOptions, verify
from tests.support.architectures import save_theirs

#: Heads of 16, the smallest that GroupQueryAttention rotates, and the tokens of the tokenizer of bytes.
SIZES: dict[str, Any] = {"hidden_size": 64, "vocab_size": 300, "eos_token_id": 2}
NO_WINDOW: dict[str, Any] = {"sliding_window": None, "use_sliding_window": False, "layer_types": None}


def checkpoint(name: str, kind: str, folder: Path, **changes: Any) -> Path:
    save_theirs(name, kind, folder, **{**SIZES, **changes})
    write_byte_tokenizer(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "kind", "norms"), [("qwen3", "T", 9), ("qwen2", "S", 5), ("mistral", "L", 5)], ids=lambda value: str(value)
)
def test_exported_and_verified(name: str, kind: str, norms: int, tmp_path: Path) -> None:
    changes = {} if name == "qwen3" else NO_WINDOW
    model = models.load(checkpoint(name, kind, tmp_path / "c", **changes), task="text-generation")
    exported = export_genai(model, tmp_path / "out", kernels=Kernels.FUNCTION)
    assert len(exported.norms) == norms
    report = verify(exported, model, options=VerifyOptions(kernels=Kernels.FUNCTION))
    assert report, report.findings


@pytest.mark.parametrize(
    ("name", "words"),
    [("mistral", "sliding window"), ("olmo2", "only models of the family llama, mistral, qwen2, qwen3")],
)
def test_refused(name: str, words: str, tmp_path: Path) -> None:
    model = models.load(checkpoint(name, "L", tmp_path / "c"), task="text-generation")
    with pytest.raises(ExportError, match=words):
        export_genai(model, tmp_path / "out", kernels=Kernels.FUNCTION)
