"""Find a tritonserver, and prepare the one from the package nvidia-pytriton.

The server is NVIDIA's own binary: the one on PATH with its own backends, otherwise the one in the package
nvidia-pytriton. The packaged one has no ONNX Runtime backend, so `onnxruntime_backend/model.py` replaces it and reads
the same config.
"""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import os
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ibnorm_export.errors import BackendUnavailable

__all__ = ["TritonBinary", "backend_folder", "find_triton", "python_environment"]

_INSTALL: Final = (
    "pip install --no-deps nvidia-pytriton==0.7.0 (the binary, 150 MB), or put tritonserver on PATH, or start the "
    "container that README.md names in the folder of `ibnorm-export package`"
)
_PACKAGE: Final = "nvidia-pytriton"


@dataclass(frozen=True, slots=True)
class TritonBinary:
    """A tritonserver.

    Args:
        path: path of the executable.
        root: folder of the package that contains it, with its Python backend; None for one on PATH.
    """

    path: Path
    root: Path | None


def find_triton() -> TritonBinary:
    """Find the server on PATH, otherwise the one in the package nvidia-pytriton.

    Raises:
        BackendUnavailable: there is none; the message explains how to get one.
    """
    if found := shutil.which("tritonserver"):
        return TritonBinary(Path(found), None)
    try:
        package = importlib.metadata.distribution(_PACKAGE)
    except importlib.metadata.PackageNotFoundError as error:
        raise BackendUnavailable(f"no tritonserver on PATH, and {_PACKAGE} is not installed: {_INSTALL}") from error
    root = Path(str(package.locate_file("pytriton/tritonserver")))
    binary = root / "bin" / "tritonserver"
    if not binary.is_file():
        raise BackendUnavailable(f"{binary} is missing from the installed {_PACKAGE}: {_INSTALL}")
    return TritonBinary(binary, root)


def backend_folder(root: Path, folder: Path) -> Path:
    """Fill a folder with backends for the packaged binary: its Python backend, and ours as "onnxruntime".

    Raises:
        BackendUnavailable: the package does not support this version of Python.
    """
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = root / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.is_file():
        raise BackendUnavailable(f"{_PACKAGE} has no Python backend for Python {version}: {_INSTALL}")
    (folder / "python").mkdir(parents=True)
    for file in (*(root / "backends" / "python").glob("*.*"), stub):
        shutil.copy(file, folder / "python" / file.name)  # the server rejects links to files outside the folder
    ours = importlib.resources.files("ibnorm_export.serving.triton").joinpath("onnxruntime_backend", "model.py")
    (folder / "onnxruntime").mkdir()
    shutil.copyfile(str(ours), folder / "onnxruntime" / "model.py")
    return folder


def python_environment(root: Path) -> dict[str, str]:
    """Return environment variables that make the backend's processes use this Python and its packages.

    Raises:
        BackendUnavailable: this Python has no shared library.
    """
    library = sysconfig.get_config_var("INSTSONAME") or ""
    places = [sysconfig.get_config_var("LIBDIR") or "", "/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu"]
    place = next((place for place in places if place and (Path(place) / str(library)).is_file()), None)
    if place is None or ".so" not in str(library):
        raise BackendUnavailable(
            f"the Python backend of {_PACKAGE} needs a Python with a shared library, which {sys.executable} does not "
            "have; install libpython (Debian: libpython3-dev), use such a Python, or put a tritonserver on PATH"
        )
    paths = [place, str(root.parent.parent / "nvidia_pytriton.libs"), os.environ.get("LD_LIBRARY_PATH", "")]
    return {
        "LD_LIBRARY_PATH": os.pathsep.join(path for path in paths if path),
        # the stub ignores PYTHONPATH and runs the first Python on PATH with its packages
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath))),
    }
