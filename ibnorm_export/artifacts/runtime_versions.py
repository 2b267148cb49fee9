"""The oldest runtimes that run a file: one table of what their versions lack, and checks against it.

Every row was seen by running files of LLaMA and ViT on ONNX Runtime 1.18.1, 1.20.1, 1.22.1, 1.23.2, 1.24.4, 1.25.1,
1.27.0 and 1.31.1.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Collection, Iterator
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Final

from ibnorm_export.environment import version_of
from ibnorm_export.errors import BackendUnavailable

if TYPE_CHECKING:
    from ibnorm_export.artifacts.exported_model import ExportedModel

__all__ = [
    "EIGHT_BITS",
    "GENAI",
    "ONNX_RUNTIME",
    "STATIC_CACHE",
    "Requirement",
    "RuntimeName",
    "check_installed",
    "newest_opset",
    "oldest_versions",
    "required_versions",
    "requirements",
    "version_numbers",
    "version_problem",
]


class RuntimeName(enum.StrEnum):
    """A runtime that a file can be exported for."""

    ORT = "ort"
    """ONNX Runtime in any language; "ort>=1.18" names the oldest version that must run the file."""
    WEB = "web"
    """ONNX Runtime in a browser or in Node, and transformers.js."""
    OPENVINO = "openvino"
    TENSORRT = "tensorrt"
    LITERT = "litert"
    IREE = "iree"
    TVM = "tvm"
    MNN = "mnn"
    TRACT = "tract"


ONNX_RUNTIME: Final = "onnxruntime"
GENAI: Final = "onnxruntime-genai"

#: Packages that are ONNX Runtime: the same module with other execution providers.
_DISTRIBUTIONS: Final = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-openvino",
    "onnxruntime-directml",
    "onnxruntime-qnn",
)

#: The oldest version that any file is for.
_OLDEST: Final = (1, 18)

#: The first version with TensorScatter, which writes a static cache.
STATIC_CACHE: Final = (1, 25)

#: The first version of ONNX Runtime that was seen to load an opset, and the newest one that it loads.
_OPSETS: Final = (((1, 18), 21), ((1, 22), 22), ((1, 23), 23), ((1, 24), 25), ((1, 25), 26))

#: The first version in which an operator is right, by op type and the opset from which that holds. In 1.23, Attention
#: gives NaN in rows that are padded on the left.
_OPERATORS: Final = {("Attention", 23): (1, 24), ("TensorScatter", 24): STATIC_CACHE}

#: The first version with MatMulNBits of 8 bits.
EIGHT_BITS: Final = (1, 22)

#: The version of onnxruntime-genai whose builder writes the folders, and the ONNX Runtime that it requires.
_GENAI_FOLDER: Final = {GENAI: (0, 18), ONNX_RUNTIME: (1, 31)}

_VERSION: Final = re.compile(r"[0-9]{1,6}(?:\.[0-9]{1,6}){0,3}")


@dataclass(frozen=True, slots=True)
class Requirement:
    """One reason why a file needs a version of a runtime.

    Args:
        package: "onnxruntime" or "onnxruntime-genai".
        version: the oldest version, as numbers.
        why: what older versions lack.
    """

    package: str
    version: tuple[int, ...]
    _: KW_ONLY
    why: str


def version_numbers(text: str) -> tuple[int, ...]:
    """Return the numbers at the start of a version, e.g. (1, 24, 0) for "1.24.0rc1"; empty if there are none."""
    match = _VERSION.match(text)
    return tuple(map(int, match[0].split("."))) if match else ()


def _text(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def newest_opset(version: tuple[int, ...], operators: Collection[str] = ("Attention",)) -> int:
    """Return the newest opset that a version of ONNX Runtime takes, with operators that are right in it; 0 if none.

    Args:
        version: the version, as numbers.
        operators: op types that the file may have.
    """
    if version < _OLDEST:
        return 0
    newest = max(opset for first, opset in _OPSETS if version >= first)
    broken = [opset for (name, opset), first in _OPERATORS.items() if name in operators and version < first]
    return min([newest, *(opset - 1 for opset in broken)])


def requirements(
    opset: int, operators: Collection[str], *, bits: Collection[int], genai: bool
) -> Iterator[Requirement]:
    """Find what a file requires.

    Args:
        opset: version of its default domain.
        operators: its op types of that domain.
        bits: bits of its quantised matrices.
        genai: whether it is a folder for onnxruntime-genai.
    """
    yield Requirement(ONNX_RUNTIME, _OLDEST, why="older versions were not tried")
    for first, newest in _OPSETS:
        if newest >= opset:
            yield Requirement(ONNX_RUNTIME, first, why=f"opset {opset}")
            break
    for (name, since), first in _OPERATORS.items():
        if name in operators and opset >= since:
            yield Requirement(ONNX_RUNTIME, first, why=f"the operator {name} of opset {opset}")
    if 8 in bits:
        yield Requirement(ONNX_RUNTIME, EIGHT_BITS, why="matrices in 8 bits")
    if genai:
        for package, first in _GENAI_FOLDER.items():
            yield Requirement(package, first, why="folders of its model builder")


def oldest_versions(found: Collection[Requirement]) -> dict[str, str]:
    """Return the oldest version of each package that meets all requirements."""
    packages = sorted({item.package for item in found})
    return {name: _text(max(item.version for item in found if item.package == name)) for name in packages}


def _of_file(model: ExportedModel) -> tuple[Requirement, ...]:
    """What a file requires, whether or not its metadata states it: an earlier version wrote none."""
    from ibnorm_export.artifacts.metadata import Target

    operators = {node.op_type for node in model.proto.graph.node if node.domain in ("", "ai.onnx")}
    quantized = [node for node in model.proto.graph.node if node.op_type == "MatMulNBits"]
    bits = {attribute.i for node in quantized for attribute in node.attribute if attribute.name == "bits"}
    genai = model.metadata.target is Target.ORT_GENAI
    return tuple(requirements(model.opset, operators, bits=bits, genai=genai))


def required_versions(model: ExportedModel) -> dict[str, str]:
    """Return the oldest version that runs a file, by runtime, whether or not its metadata states it."""
    return oldest_versions(_of_file(model))


def installed_runtime(package: str) -> tuple[str, str]:
    """Return the name and version of a runtime that is installed, under any of its names; empty if it is not."""
    names = _DISTRIBUTIONS if package == ONNX_RUNTIME else (package,)
    return next(((name, version) for name in names if (version := version_of(name)) is not None), ("", ""))


def installed_version(package: str) -> str:
    """Return the version of a runtime that is installed, under any of its names; empty if it is not."""
    return installed_runtime(package)[1]


def version_problem(model: ExportedModel, package: str, *, version: str, install: str = "") -> str:
    """What is wrong with running a file on a version of a runtime, and what to do; empty if nothing is.

    Args:
        model: the file.
        package: "onnxruntime" or "onnxruntime-genai".
        version: the version.
        install: the command that installs the package, with {version} for the oldest; "" is pip's.
    """
    numbers = version_numbers(version)
    missing = [item for item in _of_file(model) if item.package == package and numbers and numbers < item.version]
    if not missing:
        return ""
    worst = max(missing, key=lambda item: item.version)
    oldest = _text(worst.version)
    what = f"{model.path} needs {package} {oldest} or later ({worst.why}), but {version} is installed"
    from ibnorm_export.artifacts.metadata import Target

    advised = newest_opset(numbers) > 0 and model.metadata.target is not Target.ORT_GENAI  # which takes no --for
    again = f", or export with --for 'ort>={_text(numbers[:2])}'" if advised else ""
    command = install.format(version=oldest) if install else f"pip install '{package}>={oldest}'"
    return f"{what}: {command}{again}"


def check_installed(model: ExportedModel, *packages: str) -> None:
    """Raise BackendUnavailable if an installed runtime is too old for a file; one that is missing passes.

    Args:
        model: the file.
        packages: "onnxruntime", "onnxruntime-genai", or both.
    """
    for package in packages:
        name, version = installed_runtime(package)
        install = f"pip install '{name}>={{version}}'"
        if version and (problem := version_problem(model, package, version=version, install=install)):
            raise BackendUnavailable(problem)
