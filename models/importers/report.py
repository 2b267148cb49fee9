"""What an import did, and of which training code."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

from ibnorm_export.text_report import Report, counted, text_table

__all__ = ["ImportKind", "ImportReport"]


class ImportKind(enum.StrEnum):
    """Which training code wrote a checkpoint."""

    AUTO = "auto"
    NANOGPT = "nanogpt"
    GALORE = "galore"
    TIMM = "timm"
    TORCHVISION = "torchvision"
    LIGHTNING = "lightning"
    DCP = "dcp"
    LITGPT = "litgpt"


@dataclass(frozen=True, slots=True)
class ImportReport(Report):
    """What an import did.

    Args:
        path: the folder.
        kind: which training code's checkpoint it was.
        family: the architecture of the folder.
        norms: by module path, kind, reading and, where a class was identified, the relative error of the reading.
        mapped: by name of a tensor in the folder, where it comes from.
        notes: what the user should know, one sentence each.
        tokenizer: whether the folder has a tokenizer.
        causal: whether the model can generate text.
    """

    path: Path
    _: KW_ONLY
    kind: ImportKind
    family: str
    norms: tuple[tuple[str, str, float | None], ...]
    mapped: Mapping[str, str]
    notes: tuple[str, ...]
    tokenizer: bool
    causal: bool

    def __bool__(self) -> bool:
        return bool(self.norms)

    def __str__(self) -> str:
        title = f"{self.path}: {self.family} from a checkpoint of {self.kind}, {counted(len(self.mapped), 'tensor')}"
        readings: dict[str, list[tuple[str, float | None]]] = {}
        for path, reading, residual in self.norms:
            readings.setdefault(reading, []).append((path, residual))
        rows = []
        for reading, members in readings.items():
            residuals = [residual for _, residual in members if residual is not None]
            first, last = members[0][0], members[-1][0]
            where = first if len(members) == 1 else f"{first} ... {last}"
            rows.append((where, str(len(members)), reading, f"{max(residuals):.1e}" if residuals else "stated"))
        table = text_table(title, ("norms", "count", "reading", "residual"), rows=rows)
        return "\n".join([table, *(f"note: {note}" for note in self.notes)])

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON."""
        return {
            "path": str(self.path),
            "kind": str(self.kind),
            "family": self.family,
            "norms": [{"path": path, "reading": text, "residual": error} for path, text, error in self.norms],
            "tensors": dict(self.mapped),
            "notes": list(self.notes),
            "tokenizer": self.tokenizer,
        }
