"""Without matplotlib and scikit-learn: one clear error where they are needed, and everything else works."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.errors import BackendUnavailable
from ibnorm_export.optional_packages import demand_package, import_package

#: Runs the command in a process that finds neither package.
HIDDEN = """
from importlib.machinery import PathFinder

find_spec = PathFinder.find_spec

def find_others(name, path=None, target=None):
    return None if name.partition(".")[0] in ("matplotlib", "sklearn") else find_spec(name, path, target)

PathFinder.find_spec = staticmethod(find_others)  # some packages call it on an instance
from ibnorm_export.cli.__main__ import run
run()
"""


def command(*words: object) -> tuple[int, list[str]]:
    done = subprocess.run([sys.executable, "-c", HIDDEN, *map(str, words)], capture_output=True, text=True, check=False)
    return done.returncode, done.stderr.strip().splitlines()


def test_verify_works_and_only_the_report_needs_matplotlib(
    exported_vit: ExportedModel, vit_checkpoint: Path, tmp_path: Path
) -> None:
    words = ("verify", exported_vit.path, vit_checkpoint, "--samples", 1)
    code, lines = command(*words)
    assert code == 0, lines
    page = tmp_path / "r.html"
    code, lines = command(*words, "--report", page)
    assert code == 3
    (line,) = lines
    assert line.endswith(
        "an HTML report needs the package matplotlib, which is not installed: pip install 'ibnorm-export[plots]'"
    )
    assert not page.exists()


def test_bench_works(exported_vit: ExportedModel) -> None:
    code, lines = command("bench", exported_vit.path, "--rounds", 1)
    assert code == 0, lines


def test_the_demo_demands_both_before_it_trains(tmp_path: Path) -> None:
    code, lines = command("demo", "--out", tmp_path / "demo")
    assert code == 3
    assert "pip install 'ibnorm-export[" in lines[-1]
    assert not (tmp_path / "demo").exists()


def test_a_missing_package_is_named_with_its_extra() -> None:
    for find in (import_package, demand_package):
        with pytest.raises(BackendUnavailable, match=r"a test needs the package nowhere, .*'ibnorm-export\[x\]'"):
            find("nowhere.at_all", extra="x", purpose="a test")
    demand_package("json", extra="x", purpose="a test")
    assert import_package("json.decoder", extra="x", purpose="a test").JSONDecoder
