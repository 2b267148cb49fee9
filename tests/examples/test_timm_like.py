"""`examples/timm_like`: a training code of a stranger, whose checkpoint is exported through `--model` alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ibnorm_export import load

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "timm_like"


def test_what_it_trained_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed; it has the digits")
    subprocess.run(
        [sys.executable, str(EXAMPLE / "train_vit.py"), "--seconds", "0.5"],
        cwd=tmp_path,
        capture_output=True,
        check=True,
    )
    monkeypatch.syspath_prepend(str(EXAMPLE))
    monkeypatch.delitem(sys.modules, "vit", raising=False)
    with np.load(tmp_path / "example.npz") as file:
        images = file["images"]
    loaded = load(tmp_path / "last.pth.tar", "vit:build", inputs={"images": torch.from_numpy(images)})
    assert [str(spec.compression) for spec in loaded.norms.values()] == ["T"] * 9
    # the variance has n - 1, which is the scale times sqrt((n - 1) / n), and the outer factor changes epsilon
    assert next(iter(loaded.norms.values())).lambd == pytest.approx(3.0, rel=1e-9)
