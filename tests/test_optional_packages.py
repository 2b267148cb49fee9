"""Without matplotlib and scikit-learn: one clear error where they are needed, and everything else works."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.errors import BackendUnavailable
from ibnorm_export.optional_packages import demand_package, import_package
from tests.support.messages import messages

#: Runs commands in a process that finds neither package.
HIDDEN = """
import contextlib
import io
import json
import sys
from importlib.machinery import PathFinder

find_spec = PathFinder.find_spec

def find_others(name, path=None, target=None):
    return None if name.partition(".")[0] in ("matplotlib", "sklearn") else find_spec(name, path, target)

PathFinder.find_spec = staticmethod(find_others)  # some packages call it on an instance
from ibnorm_export.cli.main import main

for command in json.loads(sys.argv[1]):
    sys.argv = ["ibnorm-export", *command]
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
        code = main()
    print(json.dumps([code, err.getvalue()]))
"""


def run(*commands: tuple[object, ...]) -> list[tuple[int, list[str]]]:
    """The exit code and the lines on stderr of each command."""
    words = json.dumps([[str(word) for word in command] for command in commands])
    done = subprocess.run([sys.executable, "-c", HIDDEN, words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [(code, messages(err)) for code, err in map(json.loads, done.stdout.splitlines())]


def test_only_reports_and_the_demo_need_them(exported_vit: ExportedModel, vit_checkpoint: Path, tmp_path: Path) -> None:
    """The demo demands both before it trains."""
    page, folder = tmp_path / "r.html", tmp_path / "demo"
    verify = ("verify", exported_vit.path, vit_checkpoint, "--samples", 1)
    bench = ("bench", exported_vit.path, "--rounds", 1)
    verified, reported, timed, demo = run(verify, (*verify, "--report", page), bench, ("demo", "--out", folder))
    assert verified[0] == 0, verified
    assert timed[0] == 0, timed
    code, lines = reported
    assert code == 3
    (line,) = lines
    assert line.endswith(
        "an HTML report needs the package matplotlib, which is not installed: pip install 'ibnorm-export[plots]'"
    )
    assert not page.exists()
    code, lines = demo
    assert code == 3
    assert "pip install 'ibnorm-export[" in lines[-1]
    assert not folder.exists()


def test_a_missing_package_is_named_with_its_extra() -> None:
    for find in (import_package, demand_package):
        with pytest.raises(BackendUnavailable, match=r"a test needs the package nowhere, .*'ibnorm-export\[x\]'"):
            find("nowhere.at_all", extra="x", purpose="a test")
    demand_package("json", extra="x", purpose="a test")
    assert import_package("json.decoder", extra="x", purpose="a test").JSONDecoder
