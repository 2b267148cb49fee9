"""`examples/in_memory.ipynb`: its cells run in order, without Jupyter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples" / "in_memory.ipynb"


def test_its_cells_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    notebook: dict[str, Any] = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [], "outputs are not stored, so that they cannot be out of date"
            exec(compile("".join(cell["source"]), f"{NOTEBOOK.name}[{number}]", "exec"), namespace)
    out = capsys.readouterr().out
    assert namespace["identity"].spec.lambd == pytest.approx(4.0, rel=1e-9)
    assert namespace["report"].passed
    assert "mapping" in out
    assert "ort-cpu is " in out
