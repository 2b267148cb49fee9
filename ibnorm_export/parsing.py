"""Read JSON, TOML, YAML and text from files that may be damaged or hostile.

Python's parsers recurse, so a thousand brackets end them with RecursionError, and slightly fewer end whatever walks
through the value. Everything here raises ValueError or OSError only.
"""

from __future__ import annotations

import json
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any, Final

from ibnorm_export.errors import shortened

__all__ = ["parse_json", "read_json", "read_text", "read_toml", "read_yaml", "repeated_keys"]

#: Levels of lists and objects. Files of this package and of Hugging Face have fewer than 20.
_MAX_DEPTH: Final = 100

#: Bytes of a file. The largest that is read here, an index of weights or a tokenizer's settings, has a few MB.
_MAX_BYTES: Final = 64 << 20


def _check_depth(value: Any) -> Any:
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [
            item
            for container in level
            if isinstance(container, (dict, list))
            for item in (container.values() if isinstance(container, dict) else container)
            if isinstance(item, (dict, list))
        ]
        if not level:
            return value
    raise ValueError(f"its values are nested more than {_MAX_DEPTH} levels deep")


def parse_json(text: str | bytes) -> Any:
    """Parse JSON text.

    Raises:
        ValueError: it is not JSON, or is nested too deeply; the message says where, and quotes no more than a value.
    """
    try:
        return _check_depth(json.loads(text))
    except RecursionError as error:
        raise ValueError(f"its values are nested more than {_MAX_DEPTH} levels deep") from error


def repeated_keys(text: str | bytes) -> tuple[str, ...]:
    """Keys that an object of JSON text gives more than once.

    Raises:
        ValueError: it is not JSON, or is nested too deeply.
    """
    found: list[str] = []

    def note(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found.extend(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        return dict(pairs)

    try:
        json.loads(text, object_pairs_hook=note)
    except RecursionError as error:
        raise ValueError(f"its values are nested more than {_MAX_DEPTH} levels deep") from error
    return tuple(found)


def read_text(path: Path, max_bytes: int = _MAX_BYTES) -> str:
    """Read a UTF-8 text file.

    Raises:
        FileNotFoundError: the file does not exist.
        OSError: it cannot be read, or is not a regular file: reading a pipe would wait for a writer.
        ValueError: it is larger than `max_bytes`, or not UTF-8.
    """
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is not a regular file")
    with path.open("rb") as stream:
        content = stream.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"it has more than {max_bytes} bytes")
    return content.decode("utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file; it raises what `read_text` and `parse_json` raise."""
    return parse_json(read_text(path))


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file; raises what `read_text` raises, and ValueError for wrong or deeply nested TOML."""
    text = read_text(path)
    try:
        parsed: dict[str, Any] = _check_depth(tomllib.loads(text))
    except RecursionError as error:
        raise ValueError(f"its values are nested more than {_MAX_DEPTH} levels deep") from error
    except tomllib.TOMLDecodeError as error:
        raise ValueError(shortened(str(error))) from error
    return parsed


def read_yaml(path: Path) -> Any:
    """Read a YAML file of plain values, without aliases: a few of them make a file of 1 kB a value of 1 GB.

    Raises:
        OSError: it cannot be read, or is not a regular file.
        ValueError: it is not YAML, has aliases, or is nested too deeply.
    """
    import yaml

    text = read_text(path)
    depth = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            match event:
                case yaml.AliasEvent():
                    raise ValueError("it has aliases (*name); write the values out")
                case yaml.CollectionStartEvent():
                    depth += 1
                case yaml.CollectionEndEvent():
                    depth -= 1
            if depth > _MAX_DEPTH:
                raise ValueError(f"its values are nested more than {_MAX_DEPTH} levels deep")
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(shortened(" ".join(str(error).split()))) from error
