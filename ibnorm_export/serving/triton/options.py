"""Options of `package`: which software reads the repository, what runs the model, and the limits of the server."""

from __future__ import annotations

import enum
import re
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Final

from ibnorm_export.artifacts.tensors import Arrays
from ibnorm_export.choices import choice
from ibnorm_export.errors import ExportError, quoted
from ibnorm_export.serving.triton.config import TritonLimits

__all__ = ["PackageOptions", "PackagedNorms", "RepositoryFormat", "TritonBackend"]

#: Folder in which the container of each format finds the repository. Source: NVIDIA's and KServe's documentation.
MOUNTS: Final = {"triton": "/models", "kserve": "/mnt/models"}

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class RepositoryFormat(enum.StrEnum):
    """The software that reads the repository."""

    TRITON = "triton"
    KSERVE = "kserve"


class PackagedNorms(enum.StrEnum):
    """How the norms run on the server."""

    AUTO = "auto"  # fused if the library is installed on this machine, otherwise portable
    FUSED = "fused"  # with the library of fused kernels
    PORTABLE = "portable"  # as functions, without a library
    BOTH = "both"  # two models: NAME is fused, NAME-portable is portable


class TritonBackend(enum.StrEnum):
    """What runs the model inside Triton."""

    ONNXRUNTIME = "onnxruntime"
    TENSORRT = "tensorrt"


@dataclass(frozen=True, slots=True)
class PackageOptions:
    """Options of `package`.

    Args:
        format: KSERVE adds an InferenceService.
        name: name of the model; None takes it from the file.
        backend: TENSORRT needs `plan`.
        variant: how the norms run; with TensorRT the plan decides.
        plan: a plan that `build-engine --runtime tensorrt` built from the same model.
        mount: absolute path of the repository on the server; None means the default of the format.
        storage_uri: address from which KServe fetches the repository.
        gpu: run on GPUs.
        limits: batching, queue and instances.
        warmup: inputs by name for the warm-up, or an .npz file with them; None draws random inputs.

    Raises:
        ExportError: a value is outside its range, or the options do not fit together.
    """

    format: RepositoryFormat = RepositoryFormat.TRITON
    name: str | None = None
    _: KW_ONLY
    backend: TritonBackend = TritonBackend.ONNXRUNTIME
    variant: PackagedNorms = PackagedNorms.AUTO
    plan: Path | None = None
    mount: str | None = None
    storage_uri: str = ""
    gpu: bool = False
    limits: TritonLimits = field(default_factory=TritonLimits)
    warmup: Arrays | Path | None = None

    def __post_init__(self) -> None:
        for name, kind in (("format", RepositoryFormat), ("backend", TritonBackend), ("variant", PackagedNorms)):
            object.__setattr__(self, name, choice(kind, getattr(self, name), name=name, error=ExportError))
        for name in ("plan", "warmup"):
            if isinstance(path := getattr(self, name), str):
                object.__setattr__(self, name, Path(path))
        if self.name is not None and (not _NAME.fullmatch(self.name) or self.name.isdigit()):
            raise ExportError(
                f"name is {quoted(self.name)}; it must consist of letters, digits, dots, - and _, begin with a letter "
                "or digit, and not be a number"
            )
        if not re.fullmatch(r"(/[A-Za-z0-9][A-Za-z0-9._-]*)+", self.root):
            raise ExportError(
                f"mount is {quoted(self.root)}; it must be an absolute path on the server, such as /models"
            )
        if (self.backend is TritonBackend.TENSORRT) != (self.plan is not None):
            raise ExportError(
                "--backend tensorrt and --plan MODEL.plan belong together; `build-engine` writes the plan"
            )
        if self.plan is not None and self.variant is not PackagedNorms.AUTO:
            raise ExportError("--variant is for ONNX Runtime only: `build-engine` decides how the norms of a plan run")
        if any(character in self.storage_uri for character in "\"'\\\n"):
            raise ExportError(
                f"storage URI is {quoted(self.storage_uri)}; it must have no quotes, backslashes or newlines"
            )

    @property
    def root(self) -> str:
        """Absolute path of the repository on the server."""
        return MOUNTS[self.format.value] if self.mount is None else self.mount.rstrip("/")
