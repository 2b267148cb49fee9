"""JSON of plain values, including the numbers that JSON lacks."""

from __future__ import annotations

import json
import math
from typing import Any, Final

__all__ = ["SCHEMA_VERSION", "json_text"]

#: Version of the form of all JSON that commands print. It rises when a key is renamed or removed, or its values change;
#: a new key does not change it.
SCHEMA_VERSION: Final = 1


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def json_text(value: Any, *, indent: int | None = 2) -> str:
    """Return `value` as JSON, with NaN and infinity as the strings "nan", "inf" and "-inf".

    Args:
        value: dictionaries, lists, tuples, strings, numbers, booleans and None.
        indent: spaces of one level; None writes a single line.
    """
    return json.dumps(_finite(value), indent=indent)
