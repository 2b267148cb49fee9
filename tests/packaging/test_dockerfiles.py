"""The Dockerfiles, by their linter, and what they install."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
DOCKERFILES = sorted((REPOSITORY / "docker").glob("*.Dockerfile"))


def test_there_is_one_for_cpus_and_one_for_gpus() -> None:
    assert [path.name for path in DOCKERFILES] == ["cpu.Dockerfile", "gpu.Dockerfile"]


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.stem)
def test_hadolint_finds_nothing(dockerfile: Path) -> None:
    linter = Path(sys.executable).parent / "hadolint"
    finished = subprocess.run([linter, dockerfile], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.stem)
def test_it_installs_extras_that_exist(dockerfile: Path) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = re.search(r"ibnorm-export\[([\w,]+)\]", dockerfile.read_text())
    assert extras
    assert set(extras[1].split(",")) <= set(project["optional-dependencies"])
