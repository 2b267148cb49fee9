"""An engine on disk: a plan with its description, checked before it is used."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.errors import EngineError
from ibnorm_export.runtimes.tensorrt.bindings import bindings
from ibnorm_export.runtimes.tensorrt.description import EngineDescription, check_plan, read_description
from ibnorm_export.runtimes.tensorrt.norm_kernels import NormLayers
from ibnorm_export.runtimes.tensorrt.options import Runtime
from ibnorm_export.text_report import text_table

__all__ = ["Engine", "gpu_name", "read_engine"]


@dataclass(frozen=True, slots=True)
class Engine:
    """A plan on disk, and its description.

    Args:
        path: path of the plan.
        description: what is written next to it.
    """

    path: Path
    description: EngineDescription

    @property
    def norms(self) -> tuple[NormLayers, ...]:
        """What each norm became."""
        return self.description.norms

    def to_dict(self) -> dict[str, Any]:
        """Return the path and the description, for JSON."""
        return {"path": str(self.path), **self.description.to_dict()}

    def __str__(self) -> str:
        about = self.description
        lines = [
            f"{self.path}: {about.size_bytes / 1e6:.1f} MB, {about.runtime} {about.runtime_version}, built in "
            f"{about.build_s:.3g} s",
            f"norms: {about.norm} ({about.why})",
        ]
        for profile in about.profiles:
            sizes = [f"{r.axis} {r.smallest} to {r.largest}, optimised for {r.optimal}" for r in profile.ranges]
            lines.append(f"profile {profile.name}: {'; '.join(sizes)}")
        if self.norms:
            rows = [(n.module, n.op_type, n.realised, ", ".join(n.kernels)) for n in self.norms]
            lines.append(text_table("norms", ("module", "op", "result", "kernels"), rows=rows))
        return "\n".join(lines)


def gpu_name() -> str | None:
    """Return the name of the current GPU, or None if torch finds none."""
    import torch

    return str(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def _compute_capability() -> str | None:
    import torch

    return "sm_{}{}".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else None


def read_engine(path: str | Path, model: ExportedModel | None = None, *, wanted: Runtime | None = None) -> Engine:
    """Read an engine that `build_engine` wrote, and check that it can run on this machine.

    Args:
        path: path of the plan.
        model: the file from which it must have been built; None accepts any.
        wanted: the runtime for which it must have been built; None accepts any.

    Raises:
        EngineError: the plan or its description is missing, truncated or changed, or was built for another version,
            GPU, file or runtime.
        BackendUnavailable: the runtime is not installed.
    """
    path = Path(path)
    description = read_description(path)
    runtime = description.runtime
    if wanted is not None and runtime is not wanted:
        check_plan(path, description, source=None)
        raise EngineError(f"{path} is an engine for {runtime}, not for {wanted}: use --backend {runtime}")
    check_plan(path, description, source=None if model is None else model.path)
    installed = str(bindings(runtime).__version__)
    if installed != description.runtime_version:
        raise EngineError(
            f"{path} was built by {runtime} {description.runtime_version}; {installed} is installed: build it again"
        )
    _check_gpu(path, description)
    return Engine(path, description)


def _check_gpu(path: Path, description: EngineDescription) -> None:
    name, target = gpu_name(), _compute_capability()
    if description.gpu is not None and name is not None and name != description.gpu:
        raise EngineError(f"{path} was built for {description.gpu}; this machine has {name}: build it again")
    targets = description.compute_capabilities
    if targets and target is not None and target not in targets:
        raise EngineError(
            f"{path} was built for {', '.join(targets)}; this machine has {target} ({name}): build it again"
        )
