"""Which ONNX Runtime NVIDIA's containers of Triton hold, and which of them run a file.

Source: the versions in build.py of github.com/triton-inference-server/server, at its tags v2.48.0 to v2.71.0. Only the
table was read; no container was run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.onnx_file import MODEL_FILE
from ibnorm_export.artifacts.runtime_versions import (
    ONNX_RUNTIME,
    installed_version,
    required_versions,
    version_numbers,
    version_problem,
)
from ibnorm_export.errors import BackendUnavailable
from ibnorm_export.serving.triton.binary import TritonBinary

__all__ = ["CONTAINERS", "Container", "check_models", "container_for", "server_runtime"]


@dataclass(frozen=True, slots=True)
class Container:
    """A release of Triton.

    Args:
        name: its container, e.g. "25.10".
        server: version of tritonserver.
        onnxruntime: version of ONNX Runtime.
    """

    name: str
    server: str
    onnxruntime: str

    @property
    def image(self) -> str:
        """The image to run."""
        return f"nvcr.io/nvidia/tritonserver:{self.name}-py3"


#: From old to new.
CONTAINERS: Final = (
    Container("24.07", "2.48.0", "1.18.1"),
    Container("24.08", "2.49.0", "1.19.0"),
    Container("24.09", "2.50.0", "1.19.2"),
    Container("24.10", "2.51.0", "1.19.2"),
    Container("24.11", "2.52.0", "1.19.2"),
    Container("24.12", "2.53.0", "1.20.1"),
    Container("25.01", "2.54.0", "1.20.1"),
    Container("25.02", "2.55.0", "1.20.1"),
    Container("25.03", "2.56.0", "1.21.0"),
    Container("25.04", "2.57.0", "1.21.0"),
    Container("25.05", "2.58.0", "1.22.0"),
    Container("25.06", "2.59.0", "1.22.0"),
    Container("25.07", "2.59.1", "1.22.0"),
    Container("25.08", "2.60.0", "1.23.0"),
    Container("25.09", "2.61.0", "1.23.0"),
    Container("25.10", "2.62.0", "1.23.1"),
    Container("25.11", "2.63.0", "1.23.2"),
    Container("25.12", "2.64.0", "1.23.2"),
    Container("26.01", "2.65.0", "1.23.2"),
    Container("26.02", "2.66.0", "1.24.1"),
    Container("26.03", "2.67.0", "1.24.2"),
    Container("26.04", "2.68.0", "1.24.4"),
    Container("26.05", "2.69.0", "1.24.4"),
    Container("26.06", "2.70.0", "1.24.4"),
    Container("26.07", "2.71.0", "1.27.0"),
)


def container_for(model: ExportedModel) -> Container | None:
    """Return the oldest container whose ONNX Runtime runs a file; None if no known one does."""
    oldest = version_numbers(required_versions(model)[ONNX_RUNTIME])
    return next((item for item in CONTAINERS if version_numbers(item.onnxruntime) >= oldest), None)


def server_runtime(binary: TritonBinary) -> str:
    """Return the version of ONNX Runtime that a server runs models with; empty if it cannot be known.

    A container has the file TRITON_VERSION beside bin/tritonserver. The server of nvidia-pytriton runs the installed
    package.
    """
    if binary.root is not None:
        return installed_version(ONNX_RUNTIME)
    try:
        server = (binary.path.resolve().parent.parent / "TRITON_VERSION").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""
    return next((item.onnxruntime for item in CONTAINERS if item.server == server), "")


def _models(repository: Path) -> Iterator[ExportedModel]:
    return (ExportedModel(file) for file in sorted(repository.glob(f"*/*/{MODEL_FILE}")))


def check_models(repository: Path, binary: TritonBinary) -> None:
    """Check that a server's ONNX Runtime runs the models of a repository; one that cannot be known passes.

    Raises:
        BackendUnavailable: it is too old for a model.
    """
    version = server_runtime(binary)
    if not version:
        return
    for model in _models(repository):
        found = container_for(model)
        newer = f"a container from {found.name} on" if found else "`ibnorm-export serve` outside a container"
        install = "" if binary.root is not None else f"use {newer}"
        if problem := version_problem(model, ONNX_RUNTIME, version=version, install=install):
            raise BackendUnavailable(f"{binary.path}: {problem}")
