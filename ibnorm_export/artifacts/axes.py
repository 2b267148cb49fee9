"""Names of dynamic axes.

They are the ecosystem's: transformers.js sizes its cache by them, and onnxruntime-genai writes the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from ibnorm_export.errors import IBNormError

__all__ = ["BATCH", "CAPACITY", "PAST", "SEQUENCE", "TOTAL", "axis_name", "axis_sizes"]

BATCH: Final = "batch_size"
#: Tokens of one call.
SEQUENCE: Final = "sequence_length"
#: Tokens in the cache before a call.
PAST: Final = "past_sequence_length"
#: Tokens in the cache after a call.
TOTAL: Final = "total_sequence_length"
#: Tokens that a cache which is written in place has room for.
CAPACITY: Final = "capacity"

#: What earlier versions wrote.
_EARLIER: Final = {"batch": BATCH, "sequence": SEQUENCE, "past": PAST, "total": TOTAL}


def axis_name(name: str) -> str:
    """Return today's name of an axis; names of earlier versions are understood, and all others stay."""
    return _EARLIER.get(name, name)


def axis_sizes(sizes: Mapping[str, int], *, error: type[IBNormError] = IBNormError) -> dict[str, int]:
    """Return sizes by today's names of axes.

    Args:
        sizes: sizes by name.
        error: what is raised.

    Raises:
        IBNormError: an axis has two sizes, one by today's name and one by that of an earlier version.
    """
    found: dict[str, int] = {}
    for name, size in sizes.items():
        if found.setdefault(axis_name(name), size) != size:
            raise error(f"sizes has two sizes of {axis_name(name)}, {found[axis_name(name)]} and {size}: give one")
    return found
