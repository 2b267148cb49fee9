"""The description of an engine: the JSON file next to a plan, which records what the plan was built from and for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, asdict, dataclass
from pathlib import Path
from typing import Any, Final

from ibnorm_export.errors import EngineError, quoted
from ibnorm_export.files import sha256_of
from ibnorm_export.parsing import read_json
from ibnorm_export.runtimes.tensorrt.norm_kernels import NormLayers
from ibnorm_export.runtimes.tensorrt.options import NormRoute, Runtime
from ibnorm_export.runtimes.tensorrt.profiles import Profile, Range

__all__ = ["EngineDescription", "check_plan", "description_path", "read_description"]

FORMAT: Final = 1
_DEFAULT_TARGET: Final = "the runtime's default"


@dataclass(frozen=True, slots=True)
class EngineDescription:
    """What is written next to a plan.

    Args:
        source: name of the ONNX file.
        source_sha256: sha256 of the ONNX file.
        runtime: the runtime that runs the plan.
        runtime_version: version of the runtime that built the plan.
        ibnorm_export: version of this package.
        gpu: name of the GPU on which the plan was built; None for TensorRT-RTX.
        compute_capabilities: GPUs for which the plan was built, e.g. "sm_89"; empty is the runtime's default.
        profiles: optimisation profiles, in the engine's order.
        norm: how the norms run.
        why: the reason for this choice.
        norms: what each norm became.
        build_s: seconds that the build took.
        size_bytes: size of the plan.
        sha256: sha256 of the plan.
    """

    source: str
    source_sha256: str
    _: KW_ONLY
    runtime: Runtime
    runtime_version: str
    ibnorm_export: str | None
    gpu: str | None
    compute_capabilities: tuple[str, ...]
    profiles: tuple[Profile, ...]
    norm: NormRoute
    why: str
    norms: tuple[NormLayers, ...]
    build_s: float
    size_bytes: int
    sha256: str

    def to_dict(self) -> dict[str, Any]:
        """Return the content of the JSON file."""
        profiles = [{"name": item.name, "ranges": [asdict(one) for one in item.ranges]} for item in self.profiles]
        return {
            "format": FORMAT,
            **{name: getattr(self, name) for name in self.__slots__},
            "compute_capabilities": list(self.compute_capabilities) or _DEFAULT_TARGET,
            "profiles": profiles,
            "norms": [{**asdict(norm), "kernels": list(norm.kernels)} for norm in self.norms],
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> EngineDescription:
        """Read what `to_dict` returns.

        Raises:
            ValueError, KeyError, TypeError, AttributeError: the content is damaged.
        """
        targets = content["compute_capabilities"]
        return cls(
            str(content["source"]),
            str(content["source_sha256"]),
            runtime=Runtime(content["runtime"]),
            runtime_version=str(content["runtime_version"]),
            ibnorm_export=content.get("ibnorm_export"),
            gpu=content["gpu"],
            compute_capabilities=tuple(map(str, targets)) if isinstance(targets, list) else (),
            profiles=tuple(
                Profile(item["name"], tuple(Range(**one) for one in item["ranges"])) for item in content["profiles"]
            ),
            norm=NormRoute(content["norm"]),
            why=str(content["why"]),
            norms=tuple(NormLayers(**{**norm, "kernels": tuple(norm["kernels"])}) for norm in content["norms"]),
            build_s=float(content["build_s"]),
            size_bytes=int(content["size_bytes"]),
            sha256=str(content["sha256"]),
        )


def description_path(plan: Path) -> Path:
    """Return the path of the JSON file next to a plan."""
    return plan.with_name(plan.name + ".json")


def read_description(plan: Path) -> EngineDescription:
    """Read the description next to a plan, without looking at the plan itself.

    Raises:
        EngineError: the plan or its description is missing, or the description is damaged.
    """
    file = description_path(plan)
    for needed in (plan, file):
        if not needed.is_file():
            raise EngineError(f"{needed} does not exist; write it with `ibnorm-export build-engine`")
    try:
        return EngineDescription.from_dict(read_json(file))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise EngineError(f"{file} is damaged: {quoted(error)}; build the engine again") from error


def check_plan(plan: Path, description: EngineDescription, *, source: Path | None) -> None:
    """Check that a plan is the one that was described, and that it was built from `source`.

    Args:
        plan: the plan.
        description: the description next to it.
        source: the ONNX file; None checks only the plan.

    Raises:
        EngineError: the plan is truncated or changed, or was built from another file.
    """
    size = plan.stat().st_size
    if size != description.size_bytes:
        raise EngineError(f"{plan} is truncated: it has {size} bytes, not {description.size_bytes}; build it again")
    if sha256_of(plan) != description.sha256:
        raise EngineError(f"{plan} is not the engine that {description_path(plan).name} describes; build it again")
    if source is not None and sha256_of(source) != description.source_sha256:
        raise EngineError(
            f"{plan} was built from a different file ({description.source}), not from {source}; build it again"
        )
