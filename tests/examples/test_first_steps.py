"""`examples/first_steps.py`: short, and it works. `tests/test_public_api.py` checks its types."""

from __future__ import annotations

import ast
import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "first_steps.py"


def test_it_is_at_most_12_lines_of_code() -> None:
    tree = ast.parse(SCRIPT.read_text(encoding="utf-8"))
    code = tree.body[1:]  # without the docstring
    lines = {line for node in code for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    assert len(lines) <= 12


def test_it_exports_verifies_and_measures(
    vit_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [str(SCRIPT), str(vit_checkpoint)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.fp16.onnx", "model.onnx"]
    assert "ort-cpu is " in capsys.readouterr().out
