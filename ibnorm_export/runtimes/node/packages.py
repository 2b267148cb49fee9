"""Find Node, and the npm packages that a backend needs."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ibnorm_export.errors import BackendUnavailable, ModelFileError
from ibnorm_export.parsing import read_json
from ibnorm_export.runtimes.runner import Backend

__all__ = ["PACKAGES", "NodePackage", "find_node", "find_package"]

#: The npm package of each backend.
PACKAGES: Final = {Backend.ORT_WEB: "onnxruntime-web", Backend.ORT_NODE: "onnxruntime-node"}


@dataclass(frozen=True, slots=True)
class NodePackage:
    """An installed npm package.

    Args:
        name: its name, e.g. "onnxruntime-web".
        folder: the folder whose node_modules holds it.
        version: its version; empty if its package.json does not state one.
    """

    name: str
    folder: Path
    version: str


def find_node(backend: str) -> Path:
    """Return the program `node`.

    Raises:
        BackendUnavailable: there is none on PATH.
    """
    found = shutil.which("node")
    if found is None:
        raise BackendUnavailable(
            f"backend {backend} needs Node 18 or later, but there is no `node` on PATH: install it from "
            "https://nodejs.org or with your system's package manager"
        )
    return Path(found)


def find_package(backend: Backend, folder: Path | None = None) -> NodePackage:
    """Find the npm package of a backend where Node would: in node_modules of a folder, or of the folders above it.

    Args:
        backend: a key of `PACKAGES`.
        folder: the folder given to `npm install --prefix`; None starts at the current one.

    Raises:
        BackendUnavailable: it is not there.
    """
    name = PACKAGES[backend]
    start = (Path.cwd() if folder is None else folder).resolve()
    for place in (start, *start.parents) if folder is None else (start,):
        described = place / "node_modules" / name / "package.json"
        if described.is_file():
            return NodePackage(name, place, _version(described))
    where = f"{start}/node_modules" if folder is not None else f"node_modules of {start} or of a folder above it"
    raise BackendUnavailable(
        f"backend {backend} needs the npm package {name}, which is not in {where}: npm install --ignore-scripts "
        f"--prefix DIR {name}, then add --npm DIR (npm= in Python), or run a command without that option in DIR"
    )


def _version(described: Path) -> str:
    try:
        content = read_json(described)
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{described} cannot be read ({error}): install the package again") from error
    version = content.get("version") if isinstance(content, dict) else None
    return version if isinstance(version, str) else ""
