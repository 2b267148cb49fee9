"""docs/how-to/own-architecture.md: its files and its commands, as a reader runs them."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from ibnorm_export.cli import main
from tests.docs.pages import commands, python_files

PAGE = "how-to/own-architecture.md"


def test_the_example_trains_exports_and_verifies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, code in python_files(PAGE).items():
        (tmp_path / name).write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    runpy.run_path("train.py", run_name="__main__")
    ending = [words for words in commands(PAGE) if words[0] != "serve"]  # it runs until it is stopped
    assert [words[0] for words in ending] == ["export", "verify", "identify", "identify"]
    for words in ending:
        monkeypatch.setattr(sys, "argv", ["ibnorm-export", *words])
        assert main.main() == 0
    printed = capfd.readouterr().out
    assert "verdict: pass" in printed
    assert "MyNorm is IBNorm-L: lambda 4, epsilon 1e-05" in printed
    runpy.run_path("in_memory.py", run_name="__main__")
    printed = capfd.readouterr().out
    assert "verdict: pass" in printed
    assert "torch" in printed
    sys.modules.pop("mymodel", None)
