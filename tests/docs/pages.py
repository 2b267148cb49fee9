"""Blocks of code on the pages of `docs/` and in the README, for tests that run them.

A block of the language `console` has commands after `$ `, and below each what it prints. A line `...` stands for any
lines. A block after `<!-- not run: REASON -->` is only read. A block of another language whose first line is a comment
with the name of a file is that file.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

__all__ = ["ROOT", "Block", "Command", "blocks", "commands", "page_names", "python_files"]

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"

_REASON = re.compile(r"<!-- not run: (.+) -->")
_FILE = re.compile(r"# (\w+\.(?:py|toml))")


@dataclass(frozen=True, slots=True)
class Command:
    """A command of a console block, and the lines that the page shows below it."""

    text: str
    printed: tuple[str, ...]

    @property
    def words(self) -> list[str]:
        """The command in words, as a shell would split it."""
        return shlex.split(self.text)


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: its language, its lines, and where it is. `reason` is why it is not run."""

    language: str
    lines: tuple[str, ...]
    _: KW_ONLY
    where: str
    reason: str | None = None

    @property
    def file(self) -> str | None:
        """Name of the file that the block is."""
        match = _FILE.fullmatch(self.lines[0]) if self.lines else None
        return match[1] if match else None

    def commands(self) -> Iterator[Command]:
        """The commands of a console block. A line that ends in a backslash continues on the next."""
        text: list[str] = []
        printed: list[str] = []
        for line in self.lines:
            if text and text[-1].endswith("\\"):
                text.append(line.strip())
            elif line.startswith("$ "):
                if text:
                    yield Command(" ".join(part.rstrip("\\ ") for part in text), tuple(printed))
                text, printed = [line[2:]], []
            else:
                printed.append(line)
        if text:
            yield Command(" ".join(part.rstrip("\\ ") for part in text), tuple(printed))


def page_names() -> list[str]:
    """Every page, as a path below docs/, and the README."""
    return [*sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")), "../README.md"]


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    found: list[Block] = []
    fence, language, lines, reason = "", "", list[str](), None
    for number, line in enumerate((DOCS / page).read_text(encoding="utf-8").splitlines(), 1):
        if fence:
            if line == fence:
                where = f"{page}:{number - len(lines)}"
                found.append(Block(language, tuple(lines), where=where, reason=reason))
                fence, lines, reason = "", [], None
            else:
                lines.append(line)
        elif match := re.fullmatch(r"(```+)(\w*).*", line):
            fence, language = match[1], match[2]
        elif match := _REASON.fullmatch(line):
            reason = match[1]
        elif line:
            reason = None
    assert not fence, f"{page}: a block is not closed"
    return found


def commands(page: str) -> list[list[str]]:
    """The words of every `ibnorm-export` command of a page's consoles, in order, without the program's name."""
    found = [c for block in blocks(page) if block.language == "console" for c in block.commands()]
    return [command.words[1:] for command in found if command.words[0] == "ibnorm-export"]


def python_files(page: str) -> dict[str, str]:
    """Every block that is a file of Python, by its name."""
    return {b.file: "\n".join(b.lines) + "\n" for b in blocks(page) if b.language == "python" and b.file}
