"""One thing that is wrong, and the words of every verdict."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from ibnorm_export.errors import message_text
from ibnorm_export.findings.code import FindingCode

__all__ = ["Finding", "verdict_word"]


def verdict_word(passed: bool) -> str:
    """The verdict as tables print it."""
    return "pass" if passed else "FAIL"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong.

    Args:
        where: the node, weight, output or part of the file.
        what: what is wrong there, in words.
        code: the code that `ibnorm-export explain` explains.
    """

    where: str
    what: str
    _: KW_ONLY
    code: FindingCode

    def __post_init__(self) -> None:
        # both have names of a file that may be damaged
        object.__setattr__(self, "where", message_text(self.where))
        object.__setattr__(self, "what", message_text(self.what))

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"
