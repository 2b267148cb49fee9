"""The manifest of a folder: the SHA-256 of every file, and the machine and operator schema of every native library.

A native library is code that is loaded into the process that runs the model. Before one is loaded from a folder, its
bytes, its machine and its schema are compared with the manifest.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from ibnorm_export.errors import ModelFileError, printable, quoted, shortened
from ibnorm_export.files import has_file, machine_of, sha256_of
from ibnorm_export.op.spec import SCHEMA
from ibnorm_export.parsing import read_json

__all__ = [
    "MANIFEST_FILE",
    "check_files",
    "check_library",
    "edited_files",
    "library_entry",
    "read_manifest",
    "write_manifest",
]

MANIFEST_FILE: Final = "manifest.json"
_FORMAT: Final = "1"

#: Suffixes of files that users may edit: settings and documents.
_EDITABLE: Final = (".pbtxt", ".md", ".yaml")


def library_entry(library: Path) -> dict[str, Any]:
    """Return the manifest entry of a library that can be loaded here."""
    return {"machine": machine_of(library), "schema": SCHEMA}


def write_manifest(folder: Path, libraries: Mapping[str, Path], *, content: Mapping[str, Any]) -> None:
    """Write manifest.json for all files of a folder.

    Args:
        folder: the folder, complete except for the manifest.
        libraries: native libraries: the path in the folder, and the file that was copied there.
        content: other entries of the manifest.
    """
    files = {
        file.relative_to(folder).as_posix(): {"sha256": sha256_of(file), "size_bytes": file.stat().st_size}
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    entries = {name: library_entry(library) for name, library in libraries.items()}
    manifest = {"format": _FORMAT, **content, "libraries": entries, "files": files}
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read manifest.json of a folder.

    Raises:
        ModelFileError: the manifest is missing, damaged, or in another format.
    """
    file = folder / MANIFEST_FILE
    try:
        content = read_json(file)
        sums = {name: entry["sha256"] for name, entry in content["files"].items()}
        machines = {name: (entry["machine"], entry["schema"]) for name, entry in content["libraries"].items()}
    except FileNotFoundError as error:
        raise ModelFileError(f"{folder} has no {MANIFEST_FILE}; write it again with ibnorm-export") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelFileError(
            f"{file} is damaged ({quoted(error)}); write the folder again with ibnorm-export"
        ) from error
    if content.get("format") != _FORMAT or not sums or not machines.keys() <= sums.keys():
        raise ModelFileError(f"{file} is not in format {_FORMAT!r}; write the folder again with ibnorm-export")
    manifest: dict[str, Any] = content
    return manifest


def check_files(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Check that every file of the manifest exists and, unless users may edit it, is unchanged.

    Users may tune config.pbtxt, and documents have no effect; a changed model or warm-up input is an error.

    Raises:
        ModelFileError: a file is missing, changed or outside the folder, or a library cannot be loaded here.
    """
    for name, entry in manifest["files"].items():
        file = folder / name
        # By its name: in the cache of Hugging Face, every file is a link to a folder of blobs.
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ModelFileError(
                f"{folder / MANIFEST_FILE} lists {quoted(name)}, which is outside the folder; package the model again"
            )
        shown = folder / printable(shortened(name))
        if not has_file(folder, name):
            raise ModelFileError(f"{shown} is missing but listed in {MANIFEST_FILE}; package the model again")
        if file.suffix not in _EDITABLE and sha256_of(file) != entry["sha256"]:
            raise ModelFileError(
                f"{shown} was changed after packaging: its SHA-256 differs from the one in {MANIFEST_FILE}; package "
                "the model again, or restore the file"
            )
    for name in manifest["libraries"]:
        check_library(folder, name, manifest=manifest)


def edited_files(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Return the files that users may edit and have edited, relative to the folder."""
    return [
        name
        for name, entry in manifest["files"].items()
        if (file := folder / name).suffix in _EDITABLE and has_file(folder, name) and sha256_of(file) != entry["sha256"]
    ]


def check_library(folder: Path, name: str, *, manifest: Mapping[str, Any]) -> Path:
    """Check that a library of a folder can be loaded here, without loading it.

    Args:
        folder: the folder.
        name: path of the library in the folder.
        manifest: the folder's manifest.

    Returns:
        The library.

    Raises:
        ModelFileError: the manifest does not list the library, or it is missing, changed, built for another machine, or
            implements another version of the operator.
    """
    file = folder / name
    if name not in manifest["libraries"] or name not in manifest["files"]:
        raise ModelFileError(f"{file} is a native library that {MANIFEST_FILE} does not list; it is not loaded")
    if not has_file(folder, name):
        raise ModelFileError(f"{file} is missing but listed in {MANIFEST_FILE}; write the folder again")
    entry = manifest["libraries"][name]
    if sha256_of(file) != manifest["files"][name]["sha256"]:
        raise ModelFileError(
            f"{file} was changed after packaging: its SHA-256 differs from the one in {MANIFEST_FILE}; it is not "
            "loaded. Write the folder again, or restore the library"
        )
    here = platform.machine()
    if machine_of(file) != entry["machine"] or entry["machine"] != here:
        raise ModelFileError(
            f"{file} is built for {machine_of(file) or 'another system'}, but this machine is {here}; write the folder "
            "again on such a machine, or use the portable variant, which needs no library"
        )
    if entry["schema"] != SCHEMA:
        raise ModelFileError(
            f"{file} implements {json.dumps(entry['schema'])}, but this package implements {json.dumps(SCHEMA)}; "
            "write the folder again with this version of ibnorm-export"
        )
    return file
