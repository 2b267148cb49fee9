"""What a candidate checks, and what its cached results belong to."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

from ibnorm_export import IBNormError, load
from ibnorm_export.artifacts.axes import BATCH, SEQUENCE
from ibnorm_export.artifacts.tensors import Arrays, InputSpec
from ibnorm_export.evaluation.candidates import ModelCandidate, torch_candidate
from ibnorm_export.evaluation.samples import ModelFacts, Window


class _Runner:
    """A language model of 16 tokens, whose logits depend on all tokens up to their own, or on all tokens."""

    name = "fake"

    def __init__(self, *, causal: bool) -> None:
        self._causal = causal

    def run(self, inputs: Arrays) -> Arrays:
        seen = np.eye(16, dtype=np.float32)[inputs["input_ids"]]
        seen = np.cumsum(seen, axis=1) if self._causal else np.broadcast_to(seen.sum(axis=1, keepdims=True), seen.shape)
        return {"logits": seen.astype(np.float16)}


def candidate(*, causal: bool) -> ModelCandidate:
    def refuse() -> None:
        raise AssertionError("no text is to be generated")

    return ModelCandidate(
        "model",
        identity="",
        facts=ModelFacts(vocabulary=16),
        inputs=[InputSpec("input_ids", (BATCH, SEQUENCE), floating=False)],
        opener=lambda: _Runner(causal=causal),
        generator=refuse,  # type: ignore[arg-type]  # it is not called
    )


def test_a_model_that_sees_later_tokens_has_no_perplexity() -> None:
    """The masked language model of an encoder predicts a token from those around it, the padding included."""
    windows = [Window(np.arange(length), length - 1) for length in (9, 5)]
    scores = candidate(causal=True).score(windows)
    assert [len(score.log_probabilities) for score in scores] == [8, 4]
    with pytest.raises(IBNormError, match="model is not a causal language model: its predictions depend on later"):
        candidate(causal=False).score(windows)


def test_weights_that_changed_in_memory_are_another_candidate(vit_checkpoint: Path) -> None:
    """So are raw and EMA weights of one checkpoint, whose files are the same."""
    first, again, changed = (load(vit_checkpoint) for _ in range(3))
    next(changed.module.parameters()).data[0] += 1.0
    identities = [torch_candidate(model, name="x").identity for model in (first, again, changed)]
    assert identities[0] == identities[1] != identities[2]


CODE = """
import torch
from ibnorm_export import CustomModel, IBNorm, IBNormSpec
from ibnorm_export.artifacts.tensors import InputSpec

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = IBNorm(8, IBNormSpec("L", 4.0))
    def forward(self, x):
        return self.norm(x) * {factor}

def make():
    return CustomModel(Net(), inputs=(InputSpec("x", ("batch", 8), floating=True),), outputs=("y",))
"""


def test_other_code_with_the_same_weights_is_another_candidate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.syspath_prepend(str(tmp_path))
    identities = []
    for factor in (2, 3):
        (tmp_path / "own_net.py").write_text(CODE.format(factor=factor), encoding="utf-8")
        importlib.invalidate_caches()
        sys.modules.pop("own_net", None)
        made = importlib.import_module("own_net").Net()
        torch.save(made.state_dict(), tmp_path / "weights.pt")
        model = load(tmp_path / "weights.pt", "own_net:make")
        identities.append(torch_candidate(model, name="x").identity)
    sys.modules.pop("own_net", None)
    assert identities[0] != identities[1]
