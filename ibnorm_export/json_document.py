"""The form that all JSON of this package has, and the published schema of each command's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any, Final

from ibnorm_export.environment import environment, version_of
from ibnorm_export.errors import IBNormError, quoted
from ibnorm_export.files import sha256_of
from ibnorm_export.json_text import SCHEMA_VERSION
from ibnorm_export.parsing import parse_json

__all__ = ["json_document", "json_schema", "schema_names"]

_SUFFIX: Final = ".schema.json"


def json_document(
    command: str, content: Mapping[str, Any], *, files: Iterable[str | Path | None] = ()
) -> dict[str, Any]:
    """Return what a command prints with --json: its result, and when, where and from which files it was made.

    Args:
        command: name of the command, such as "verify".
        content: the result; a report's `to_dict()`. Its own `environment`, where it was measured, is kept.
        files: the files that the command read and wrote; of a folder, every file in it. None and an empty text, which
            is not the current folder here, are left out.
    """
    machine = environment()
    return {
        "schema_version": SCHEMA_VERSION,
        "command": command,
        "version": version_of("ibnorm-export"),
        "date": machine["date"],
        "environment": machine,
        "files": [_described(file) for path in files if path not in (None, "") for file in _regular(Path(path))],
        **content,
    }


def _regular(path: Path) -> list[Path]:
    """The file, or those in the folder, in order."""
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    return [path] if path.is_file() else []


def _described(file: Path) -> dict[str, Any]:
    return {"path": str(file), "size_bytes": file.stat().st_size, "sha256": sha256_of(file)}


def schema_names() -> list[str]:
    """Return the names of the commands that have a schema, in order."""
    folder = package_files("ibnorm_export") / "schemas"
    return sorted(file.name.removesuffix(_SUFFIX) for file in folder.iterdir() if file.name.endswith(_SUFFIX))


def json_schema(command: str) -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of what a command prints with --json.

    Args:
        command: name of the command, such as "verify".

    Raises:
        IBNormError: there is no such command.
    """
    if command not in schema_names():
        raise IBNormError(f"there is no schema of {quoted(command)}; there is one of {', '.join(schema_names())}")
    file = package_files("ibnorm_export") / "schemas" / f"{command}{_SUFFIX}"
    schema: dict[str, Any] = parse_json(file.read_text(encoding="utf-8"))
    return schema
