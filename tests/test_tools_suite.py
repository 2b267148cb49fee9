"""The suite of tools: what it calls kept, lost and broken, and its table."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx
import onnx.inliner
import onnx.numpy_helper

from benchmarks.suites.tools import _outcome, table
from ibnorm_export.artifacts.exported_model import ExportedModel


def test_outcomes(exported_vit: ExportedModel, tmp_path: Path) -> None:
    kept, lost, wrong, damaged = (tmp_path / f"{name}.onnx" for name in ("kept", "lost", "wrong", "damaged"))
    shutil.copyfile(exported_vit.path, kept)
    onnx.save(onnx.inliner.inline_local_functions(onnx.load(kept)), lost)
    changed = onnx.load(kept)
    bias = next(t for t in changed.graph.initializer if t.name == "classifier.bias")
    bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + 1e-3, bias.name))
    onnx.save(changed, wrong)
    damaged.write_bytes(kept.read_bytes()[:1000])
    found = [_outcome(exported_vit, file, "", limit=2e-6) for file in (kept, lost, wrong, damaged)]
    assert [f["outcome"] for f in found] == ["keeps", "loses", "breaks", "breaks"]
    assert found[0]["error"] == 0
    assert "other numbers" in found[2]["why"]
    assert "refuses" in found[3]["why"]
    raised = _outcome(exported_vit, kept, "ValueError: no", limit=2e-6)
    assert raised == {"outcome": "breaks", "why": "the tool fails: ValueError: no"}


def _row(outcome: str, model: str, form: str, *, why: str = "", remedy: str = "") -> dict[str, object]:
    details = {"tool": "slim", "version": "1.0", "model": model, "form": form}
    return {"details": {**details, "outcome": outcome, "why": why, "remedy": remedy}}


def test_a_cell_is_one_word_where_the_models_agree() -> None:
    rows = [
        _row("loses", "llama", "functions", remedy="do not"),
        _row("loses", "vit", "functions", remedy="do not"),
        _row("keeps", "llama", "inlined"),
        _row("breaks", "vit", "inlined", why="a | b"),
    ]
    assert table(rows).splitlines()[2] == (
        "| slim 1.0 | loses the functions | llama keeps; vit **breaks**: a \\| b | do not |"
    )
