"""Code blocks of the pages in `docs/`, for tests that run them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

__all__ = ["commands", "python_files"]

DOCS = Path(__file__).resolve().parents[2] / "docs"


def _blocks(page: str, language: str) -> list[str]:
    text = (DOCS / page).read_text(encoding="utf-8")
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [block for kind, block in found if kind == language]


def commands(page: str) -> list[list[str]]:
    """The words of every `ibnorm-export` command of a page, in order."""
    lines = [line for block in _blocks(page, "") for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("ibnorm-export ")]


def python_files(page: str) -> dict[str, str]:
    """Every block of Python whose first line names a file, by that name."""
    found = {}
    for block in _blocks(page, "python"):
        if match := re.match(r"# (\w+\.py)\n", block):
            found[match[1]] = block
    return found
