"""Prepare a repository before a server starts on it: check its files, and make its library paths valid."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from ibnorm_export.artifacts.manifest import check_files, check_library, read_manifest

__all__ = ["check_repository", "stage_repository"]

_LIBRARY: Final = re.compile(r'op_library_filename\s*:\s*\[?\s*"([^"]*)"')


def check_repository(repository: Path) -> None:
    """Check that every file is as it was packaged, and that no config names a library that the manifest does not.

    Raises:
        ModelFileError: a file is missing or changed, or a library cannot be loaded on this machine.
    """
    manifest = read_manifest(repository)
    check_files(repository, manifest)
    for config in sorted(repository.glob("*/config.pbtxt")):
        for declared in _LIBRARY.findall(config.read_text(encoding="utf-8")):
            check_library(repository, f"{config.parent.name}/{Path(declared).name}", manifest=manifest)


def stage_repository(repository: Path, folder: Path) -> Path:
    """Make library paths valid on this machine, for a server whose backend loads libraries by absolute path.

    Args:
        repository: the repository.
        folder: a folder that does not exist; it receives links to the files, and configs with new library paths.

    Returns:
        `repository` if its library paths are valid here, otherwise `folder`.
    """
    folder.mkdir()
    changed = False
    for model in sorted(path for path in repository.iterdir() if path.is_dir()):
        (folder / model.name).mkdir()
        for entry in model.iterdir():
            if entry.name != "config.pbtxt":
                (folder / model.name / entry.name).symlink_to(entry)
        packaged = (model / "config.pbtxt").read_text(encoding="utf-8")
        text = packaged
        for declared in _LIBRARY.findall(packaged):
            text = text.replace(f'"{declared}"', f'"{model / Path(declared).name}"')
        changed |= text != packaged
        (folder / model.name / "config.pbtxt").write_text(text, encoding="utf-8")
    return folder if changed else repository
