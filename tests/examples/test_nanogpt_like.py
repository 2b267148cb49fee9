"""`examples/nanogpt_like`: a training code of a stranger, whose checkpoint is imported with its own norm class."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ibnorm_export import import_checkpoint, load

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "nanogpt_like"


def test_it_imports_nothing_of_this_package() -> None:
    for file in EXAMPLE.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.startswith("ibnorm") for name in names)


def test_what_it_trained_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question.\n" * 40)
    subprocess.run(
        [sys.executable, str(EXAMPLE / "train.py"), "--text", "text.txt", "--seconds", "0.5", "--batch", "2"],
        cwd=tmp_path,
        capture_output=True,
        check=True,
    )
    monkeypatch.syspath_prepend(str(EXAMPLE))
    monkeypatch.delitem(sys.modules, "model", raising=False)
    report = import_checkpoint(
        tmp_path / "out", tmp_path / "gpt", norm_class="model:IBNorm", tokenizer=tmp_path / "out" / "meta.pkl"
    )
    assert report.tokenizer
    from model import GPT, GPTConfig  # type: ignore[import-not-found]  # the example's own file

    checkpoint = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)
    model = GPT(GPTConfig(**checkpoint["model_args"]))
    model.load_state_dict(checkpoint["model"])
    loaded = load(tmp_path / "gpt")
    ids = torch.arange(16)[None] % len(checkpoint["model"]["lm_head.weight"])
    with torch.no_grad():
        (got,) = loaded.call(loaded.in_dtype(torch.float64), ids, torch.ones_like(ids))
        want = model.double().eval()(ids)[0]
    assert float((got - want).abs().max() / want.abs().max()) < 1e-10
    monkeypatch.delitem(sys.modules, "model", raising=False)
