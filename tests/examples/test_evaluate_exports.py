"""`examples/evaluate_exports.py` runs as it is written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "evaluate_exports.py"


def test_it_evaluates_two_exports(vit_checkpoint: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez(
        tmp_path / "data.npz",
        images=rng.standard_normal((30, 1, 8, 8), dtype=np.float32),
        labels=rng.integers(0, 10, 30),
    )
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(vit_checkpoint), "data.npz"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "fp16.onnx against vit (torch): drop of top-1" in done.stdout
    assert done.stdout.rstrip().splitlines()[0].startswith("classification on data.npz: 30 samples")
