"""Stock architectures with a stranger's norms: the exported file, in onnxruntime, against the stranger's module."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from ibnorm_export import models
from ibnorm_export.artifacts.metadata import Task
from ibnorm_export.exporter.export import export
from ibnorm_export.runtimes.runner import Kernels
from ibnorm_export.verifier.verify import VerifyOptions, verify
from tests.support.architectures import ARCHITECTURES, CAUSAL, ENCODERS, IMAGES, LAMBDA, save_theirs
from tests.support.file_against_module import (
    TOLERANCE,
    decoding_error,
    encoder_error,
    greedy_tokens,
    image_error,
    logits_error,
)


def exported_and_verified(name: str, folder: Path, *, task: Task = Task.FORWARD, kind: str | None = None) -> Any:
    """The file of an architecture and the stranger's module; S, L and T in turn unless `kind` is given."""
    theirs = save_theirs(name, kind or "SLT"[list(ARCHITECTURES).index(name) % 3], folder / "c")
    model = models.load(folder / "c", task=task)
    exported = export(model, folder / ("m.onnx" if task is Task.FORWARD else "out"))
    report = verify(exported, model, options=VerifyOptions(kernels=Kernels.FUNCTION))
    assert report, report.findings
    return exported.path, theirs


@pytest.mark.parametrize("name", CAUSAL)
def test_text_generation(name: str, tmp_path: Path) -> None:
    """A prompt with padding, cached steps and greedy tokens, all far longer than a window of 4 tokens."""
    path, theirs = exported_and_verified(name, tmp_path, task=Task.TEXT_GENERATION)
    assert decoding_error(path, theirs) <= TOLERANCE
    tokens, expected = greedy_tokens(path, theirs)
    assert tokens == expected
    shapes = [sorted(tensor.dims) for tensor in onnx.load(path).graph.initializer]
    tied_twice = name == "gpt2"  # as files of the first version
    vocabulary, hidden = theirs.get_input_embeddings().weight.shape
    stored = 1 if theirs.config.tie_word_embeddings and not tied_twice else 2
    assert shapes.count(sorted((vocabulary, hidden))) == stored, "the embedding and the head"


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("mistral", logits_error),
        ("gemma2", logits_error),
        *((name, encoder_error) for name in ENCODERS),
        *((name, image_error) for name in IMAGES),
    ],
)
def test_forward(name: str, error: Callable[..., float], tmp_path: Path) -> None:
    path, theirs = exported_and_verified(name, tmp_path)
    assert error(path, theirs) <= TOLERANCE


def test_a_wrong_lambda_is_seen(tmp_path: Path) -> None:
    """The comparison is sharp: a file of another lambda misses the tolerance by far."""
    path, theirs = exported_and_verified("convnext", tmp_path, kind="T")
    for norm in theirs.modules():
        if hasattr(norm, "lambd"):
            norm.lambd = 2 * LAMBDA
    assert image_error(path, theirs) > 100 * TOLERANCE
