"""A command as a user runs it, in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass
from typing import Any

import pytest

from ibnorm_export.cli import main
from tests.support.json_documents import read_document


@dataclass(frozen=True)
class Result:
    """What a command left: its exit code and what it printed. It unpacks as these three."""

    command: str
    _: KW_ONLY
    code: int
    out: str
    err: str

    def __iter__(self) -> Iterator[Any]:
        return iter((self.code, self.out, self.err))

    @property
    def json(self) -> Any:
        """The document that `--json` printed, which is as its schema says."""
        return read_document(self.out, self.command)


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """`cli("inspect", path)` runs `ibnorm-export inspect PATH`."""

    def run(*words: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["ibnorm-export", *map(str, words)])
        capfd.readouterr()
        code = main.main()
        out, err = capfd.readouterr()
        return Result(str(words[0]), code=code, out=out, err=err)

    return run
