"""`examples/evaluate_exports.py` runs as it is written."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "evaluate_exports.py"


def test_it_evaluates_two_exports(
    vit_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    np.savez(
        tmp_path / "data.npz",
        images=rng.standard_normal((30, 1, 8, 8), dtype=np.float32),
        labels=rng.integers(0, 10, 30),
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [str(SCRIPT), str(vit_checkpoint), "data.npz"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    out = capsys.readouterr().out
    assert ended.value.code == 0, out
    assert "fp16.onnx against vit (torch): drop of top-1" in out
    assert out.splitlines()[0].startswith("classification on data.npz: 30 samples")
