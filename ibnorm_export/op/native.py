"""Find and check the compiled libraries.

A missing library is not an error, because the package also works with ONNX functions. A library that cannot be used
here (built for another machine or another version of the operator) is reported with the reason and never registered.
"""

from __future__ import annotations

import base64
import ctypes
import importlib.metadata
import importlib.resources
import json
import platform
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, Final

from ibnorm_export.errors import BackendUnavailable
from ibnorm_export.files import machine_of, sha256_of
from ibnorm_export.op.spec import SCHEMA

__all__ = ["NativeLibrary", "availability", "inspect", "ort_library", "plugin_problem", "trt_library"]

_ORT_NAMES: Final = ("libibnorm_ort.so", "libibnorm_ort.dylib")
_TRT_NAME: Final = "libibnorm_trt.so"
#: Major versions of TensorRT whose plugin interfaces have the same layout, as in `custom_ops/tensorrt/register.cc`.
_TRT_MAJORS: Final = (10, 11)
_BUILD_TRT: Final = "build it as custom_ops/tensorrt/README.md describes, and copy it into the package's lib folder"
_BUILD: Final = (
    "run `make native` in a checkout, or install the package again where g++ and ONNX Runtime's headers are available"
)


@dataclass(frozen=True, slots=True)
class NativeLibrary:
    """A compiled library; true if it can be used.

    Args:
        path: the file; None if there is none.
        schema: the operators that the library implements, as it reports; None if it could not be loaded.
        providers: execution providers that it has kernels for: "cpu", "cuda".
        instruction_set: instructions that its CPU kernels use on this machine: "avx512", "avx2" or "generic".
        problem: why the library cannot be used; empty if it can.
        remedy: what to do about the problem; empty if there is none.
    """

    path: Path | None
    schema: dict[str, Any] | None = None
    _: KW_ONLY
    providers: tuple[str, ...] = ()
    instruction_set: str = ""
    problem: str = ""
    remedy: str = ""

    @property
    def available(self) -> bool:
        """Whether the library can be used."""
        return not self.problem

    def __bool__(self) -> bool:
        return self.available

    def __str__(self) -> str:
        if self.problem:
            return f"{self.problem}; {self.remedy}"
        return f"{self.path} (providers {', '.join(self.providers)}; CPU kernels {self.instruction_set})"


def _text(library: ctypes.CDLL, function: str) -> str:
    call = getattr(library, function)
    call.restype = ctypes.c_char_p
    raw = call()
    return raw.decode("utf-8") if isinstance(raw, bytes) else ""


def inspect(path: Path) -> NativeLibrary:
    """Check a library for ONNX Runtime.

    The library is loaded into the process, as ONNX Runtime does, after its hash and its machine have been checked.
    """
    if not path.is_file():
        return NativeLibrary(None, problem=f"{path} does not exist", remedy=_BUILD)
    if problem := _load_problem(path):
        return NativeLibrary(path, problem=problem, remedy=_BUILD)
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return NativeLibrary(
            path,
            problem=f"{path} cannot be loaded, probably because it was built for another machine: {error}",
            remedy=_BUILD,
        )
    try:
        schema = json.loads(_text(library, "ibnorm_schema"))
        build = json.loads(_text(library, "ibnorm_build"))
        _ = library.RegisterCustomOps
    except (AttributeError, ValueError) as error:
        return NativeLibrary(path, problem=f"{path} is not an IBNorm library: {error}", remedy=_BUILD)
    if schema != SCHEMA:
        return NativeLibrary(
            path,
            schema=schema,
            problem=f"{path} implements {json.dumps(schema)}, but this package implements {json.dumps(SCHEMA)}",
            remedy=_BUILD,
        )
    return NativeLibrary(path, schema, providers=tuple(build["providers"]), instruction_set=build["instruction_set"])


def _load_problem(file: Path) -> str:
    """Return why a library must not be loaded: it is for another machine, or was changed; empty if it may be loaded."""
    machine, here = machine_of(file), platform.machine()
    if machine is not None and machine != here:
        return f"{file} is built for {machine}, but this machine is {here}"
    recorded = _recorded_sha256(file)
    if recorded is not None and recorded != sha256_of(file):
        return f"{file} was changed after it was installed: its SHA-256 differs from the one that pip recorded"
    return ""


def _recorded_sha256(file: Path) -> str | None:
    """The SHA-256 of a file that pip recorded, in hexadecimal; None if it recorded none, as in a checkout."""
    try:
        installed = importlib.metadata.distribution("ibnorm-export").files or []
    except importlib.metadata.PackageNotFoundError:
        return None
    for entry in installed:
        if entry.name == file.name and entry.hash is not None and Path(str(entry.locate())).resolve() == file.resolve():
            return base64.urlsafe_b64decode(f"{entry.hash.value}==").hex()
    return None


def availability() -> NativeLibrary:
    """Check the installed library for ONNX Runtime."""
    package = importlib.resources.files("ibnorm_export")  # an editable installation has several folders
    for name in _ORT_NAMES:
        file = package.joinpath("lib", name)
        if file.is_file():
            return inspect(Path(str(file)))
    return NativeLibrary(
        None,
        problem="the fused kernels for ONNX Runtime are not installed (norms run as ONNX functions)",
        remedy=_BUILD,
    )


def ort_library() -> Path:
    """Return the library to register with a session of ONNX Runtime.

    Raises:
        BackendUnavailable: the library is not installed, or cannot be used on this machine.
    """
    library = availability()
    if not library or library.path is None:
        raise BackendUnavailable(str(library))
    return library.path


def plugin_problem(tensorrt: str) -> str:
    """Return why the plugin library must not be loaded into a version of TensorRT; empty if it may."""
    major = tensorrt.partition(".")[0]
    if major in map(str, _TRT_MAJORS):
        return ""
    supported = " and ".join(map(str, _TRT_MAJORS))
    return (
        f"the plugin library does not support TensorRT {tensorrt}; it supports versions {supported}. Use --norm "
        "function, or install one of those versions"
    )


def trt_library(path: Path | None = None) -> Path:
    """Return the plugin library for TensorRT, after checking it.

    Args:
        path: the library; None is the installed one.

    Raises:
        BackendUnavailable: the library is missing, cannot be loaded, or implements another version of the operator.
    """
    resource = importlib.resources.files("ibnorm_export").joinpath("lib", _TRT_NAME) if path is None else path
    file = Path(str(resource))
    if not file.is_file():
        raise BackendUnavailable(f"the TensorRT plugin library {file.name} is not installed; {_BUILD_TRT}")
    if problem := _load_problem(file):
        raise BackendUnavailable(f"{problem}; {_BUILD_TRT}")
    try:
        library = ctypes.CDLL(str(file))
        schema = json.loads(_text(library, "ibnorm_schema"))
        _ = library.getCreators
    except (OSError, AttributeError, ValueError) as error:
        raise BackendUnavailable(
            f"{file} is not an IBNorm plugin library for this machine: {error}; {_BUILD_TRT}"
        ) from error
    if schema != SCHEMA:
        raise BackendUnavailable(
            f"{file} implements {json.dumps(schema)}, but this package implements {json.dumps(SCHEMA)}; {_BUILD_TRT}"
        )
    return file
