"""Text from imported checkpoints: the exported file with a cache chooses the tokens of the training code's model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ibnorm_export import import_checkpoint, load
from ibnorm_export.exporter.export import ExportOptions
from ibnorm_export.exporter.text_folder import export_folder
from ibnorm_export.runtimes.runner import Kernels
from ibnorm_export.verifier.verify import VerifyOptions, verify
from tests.models.importers import test_galore, test_litgpt, test_nanogpt
from tests.support.file_against_module import decode, open_session
from tests.support.strangers import save_nanogpt


def of_nanogpt(folder: Path) -> nn.Module:
    model = test_nanogpt.gpt(n_embd=32)
    source = save_nanogpt(folder / "ckpt.pt", model, test_nanogpt.ARGS | {"n_embd": 32})
    import_checkpoint(source, folder / "imported", norm=test_nanogpt.NORM)
    return model


def of_galore(folder: Path) -> nn.Module:
    model = test_galore.llama()
    source = test_galore.saved(folder / "model_10", model, test_galore.CONFIG)
    import_checkpoint(source, folder / "imported", norm=test_galore.NORM)
    return model


def of_litgpt(folder: Path) -> nn.Module:
    model = test_litgpt.lit(test_litgpt.CONFIG)
    source = test_litgpt.lit_folder(folder / "out", model, test_litgpt.CONFIG)
    import_checkpoint(source, folder / "imported", norm=test_litgpt.NORM)
    return model


@pytest.mark.parametrize("trained", [of_nanogpt, of_galore, of_litgpt])
def test_greedy_tokens_are_those_of_the_training_code(tmp_path: Path, trained: Callable[[Path], nn.Module]) -> None:
    stranger = copy.deepcopy(trained(tmp_path)).double()
    exported = export_folder(load(tmp_path / "imported", task="text-generation"), tmp_path / "text")
    prompt = np.array([[5, 17, 29]], dtype=np.int64)
    steps = decode(open_session(exported.path), prompt, np.ones_like(prompt))
    logits, text = next(steps), torch.from_numpy(prompt)
    with torch.no_grad():
        for _ in range(18):
            wanted = stranger(text)[:, -1:]
            assert np.abs(logits[:, -1:] - wanted.numpy()).max() < 1e-4 * wanted.abs().max()
            token = wanted.argmax(-1)
            assert logits[0, -1].argmax() == token
            text = torch.cat([text, token], dim=1)
            logits = steps.send(token.numpy())
    assert len(set(text[0].tolist())) > 4, "a text that repeats one token would show little"


def test_an_imported_gpt_in_int4(tmp_path: Path) -> None:
    """Its matrices are a step from the checkpoint's at most, and the file computes with them to fp32's tolerance."""
    of_nanogpt(tmp_path)
    model = load(tmp_path / "imported", task="text-generation")
    exported = export_folder(model, tmp_path / "int4", options=ExportOptions.with_weights("int4"))
    assert exported.operators["com.microsoft::MatMulNBits"] == 9
    report = verify(exported, model, options=VerifyOptions(kernels=Kernels.FUNCTION))
    assert {finding.where for finding in report.findings} <= {"quality"}, "predictions of random weights are poor"
    assert report.numeric is not None
    assert report.numeric.dtype == "int4"
    assert max(output.error for output in report.numeric.outputs) < 2e-6
