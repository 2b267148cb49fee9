"""A folder for onnxruntime-genai as a candidate of `evaluate`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ibnorm_export import EvaluationOptions, evaluate
from ibnorm_export.errors import ModelFileError
from ibnorm_export.evaluation.candidates import open_candidate
from ibnorm_export.evaluation.samples import Window


def test_a_folder_runs_in_genai_and_scores_as_its_checkpoint(
    text_folder: Callable[[str], Path], genai_checkpoint: Path, tmp_path: Path
) -> None:
    data = tmp_path / "text.txt"
    data.write_text("The quick brown fox jumps over the lazy dog. " * 12, encoding="utf-8")
    folder = text_folder("genai-function")
    report = evaluate(
        [folder, f"{folder}@ort-cpu"],
        task="perplexity",
        data=data,
        against=genai_checkpoint,
        options=EvaluationOptions(max_length=32, batch=4),
    )
    assert [found.name for found in report.candidates[1:]] == [folder.name, f"{folder.name} (ort-cpu)"]
    for found in report.candidates[1:]:
        assert found.comparisons[0].drop == pytest.approx(0.0, abs=1e-5)
    identities = {open_candidate(name, options=EvaluationOptions()).identity for name in (folder, f"{folder}@ort-cpu")}
    named = open_candidate(folder, options=EvaluationOptions("ort-cpu"))
    assert named.identity == open_candidate(f"{folder}@ort-cpu", options=EvaluationOptions()).identity
    assert len(identities) == 2, "results of one runtime are not those of the other"


def test_padding_tokens_of_a_text_count_as_text(text_folder: Callable[[str], Path], genai_checkpoint: Path) -> None:
    """With several rows, GenAI takes the last tokens of a row for padding where they are the padding token."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 256, (3, 20))
    tokens[0, -6:] = 2  # the padding token of the folder
    windows = [Window(row[: 20 - index], 10) for index, row in enumerate(tokens)]
    options = EvaluationOptions()
    own, reference = (
        open_candidate(model, options=options).score(windows)
        for model in (text_folder("genai-function"), genai_checkpoint)
    )
    for ours, theirs in zip(own, reference, strict=True):
        np.testing.assert_allclose(ours.log_probabilities, theirs.log_probabilities, atol=1e-4)


def test_a_folder_of_another_kind_is_refused(text_folder: Callable[[str], Path]) -> None:
    with pytest.raises(ModelFileError, match=r"has no genai_config\.json; export it with --target ort-genai"):
        open_candidate(f"{text_folder('portable')}@ort-genai", options=EvaluationOptions())
