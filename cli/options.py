"""Options that several commands share: one wording, one type."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ibnorm_export.errors import IBNormError
from ibnorm_export.runtimes.registry import BACKENDS
from ibnorm_export.runtimes.runner import Kernels


def _place(path: Path, suffix: str) -> None:
    """Said before the work whose result goes there."""
    if path.suffix.lower() != suffix:
        raise typer.BadParameter(f"{path} does not end in {suffix}")
    if path.is_dir():
        raise typer.BadParameter(f"{path} is a folder")
    if not path.parent.is_dir():
        raise typer.BadParameter(f"the folder {path.parent} does not exist")


def page(path: Path | None) -> Path | None:
    """Callback of an option that names a report: a place where one can be."""
    if path is not None:
        _place(path, ".html")
    return path


def baseline(path: Path | None) -> Path | None:
    """Callback of an option that names a baseline to write: no other file of JSON is replaced by one."""
    from ibnorm_export.benchmark.baseline import read_baseline

    if path is not None:
        _place(path, ".json")
        if path.exists() and not path.is_file():
            raise typer.BadParameter(f"{path} is no regular file")
        if path.exists() and path.stat().st_size:
            try:
                read_baseline(path)
            except IBNormError as error:
                raise typer.BadParameter(f"{path} would be lost: {error}") from error
    return path


Checkpoint = Annotated[
    Path,
    typer.Argument(
        metavar="CHECKPOINT",
        exists=True,  # said before torch is loaded
        help="Hugging Face folder with an ibnorm section in config.json; with --model a .safetensors or .pt file too.",
    ),
]
ModelFile = Annotated[
    Path, typer.Argument(metavar="MODEL.onnx", exists=True, help="A file or folder written by `ibnorm-export export`.")
]
Factory = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="PACKAGE.MODULE:FACTORY",
        help="Your own code: a callable that returns ibnorm_export.models.CustomModel.",
    ),
]
Backend = Annotated[str, typer.Option("--backend", help=f"One of: {', '.join(BACKENDS)}.")]
EngineFile = Annotated[
    Path | None,
    typer.Option(
        "--engine", metavar="MODEL.plan", exists=True, help="Of tensorrt, tensorrt-rtx: built before by build-engine."
    ),
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of the random inputs.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
KernelChoice = Annotated[
    Kernels, typer.Option("--kernels", help="How the norms run: fused where installed (auto), fused, or function.")
]
RequireFused = Annotated[bool, typer.Option("--require-fused", help="Fail when a norm did not run as a fused kernel.")]
