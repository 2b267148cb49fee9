"""Explain a finding by its code: what it means, why it matters, what to do, and an example."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import KW_ONLY, asdict, dataclass
from types import MappingProxyType
from typing import Final

from ibnorm_export.errors import IBNormError, quoted
from ibnorm_export.findings import check_findings, file_findings, machine_findings, numeric_findings
from ibnorm_export.findings.code import FindingCode

__all__ = ["EXPLANATIONS", "Explanation", "explain"]


@dataclass(frozen=True, slots=True)
class Explanation:
    """What a finding means.

    Args:
        code: the finding's code.
        title: the finding in a few words.
        meaning: what is wrong.
        importance: why it matters.
        remedy: what to do.
        example: a command or a fault that shows it.
    """

    code: FindingCode
    title: str
    _: KW_ONLY
    meaning: str
    importance: str
    remedy: str
    example: str

    def __str__(self) -> str:
        return "\n".join(
            (
                f"{self.code}: {self.title}",
                "",
                f"What it means: {self.meaning}",
                f"Why it matters: {self.importance}",
                f"What to do: {self.remedy}",
                f"Example: {self.example}",
            )
        )

    def to_dict(self) -> dict[str, str]:
        """For JSON."""
        return {name: str(value) for name, value in asdict(self).items()}


#: The explanation of every code, in the order of the codes.
EXPLANATIONS: Final[Mapping[FindingCode, Explanation]] = MappingProxyType(
    {
        code: Explanation(code, title, meaning=meaning, importance=importance, remedy=remedy, example=example)
        for texts in (file_findings, numeric_findings, check_findings, machine_findings)
        for code, (title, meaning, importance, remedy, example) in texts.TEXTS.items()
    }
)


def explain(code: FindingCode | str) -> Explanation:
    """Explain a finding.

    Args:
        code: such as "IBN103"; capitals do not matter.

    Raises:
        IBNormError: there is no such code; the message names the nearest ones.
    """
    wanted = str(code).strip().upper()
    found = next((explanation for known, explanation in EXPLANATIONS.items() if known == wanted), None)
    if found is None:
        near = difflib.get_close_matches(wanted, list(EXPLANATIONS), n=3, cutoff=0.6) or [FindingCode.NORM_COUNT]
        raise IBNormError(
            f"there is no finding {quoted(str(code))}; the nearest {'are' if len(near) > 1 else 'is'} "
            f"{', '.join(near)}, and `ibnorm-export explain` lists all"
        )
    return found
