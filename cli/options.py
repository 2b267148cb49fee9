"""Arguments and options that several commands share, each with one type and one help text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ibnorm_export.artifacts import metadata
from ibnorm_export.errors import IBNormError
from ibnorm_export.files import Kind, check_target
from ibnorm_export.runtimes import runner


def _check_target(path: Path, suffix: str, *, kind: Kind | None = None) -> None:
    """Refuse a path that cannot be written, before the work whose result goes there."""
    if path.is_dir():
        raise typer.BadParameter(f"{path} is a folder; name a file, such as {path / f'report{suffix}'}")
    if path.suffix.lower() != suffix:
        raise typer.BadParameter(f"{path} does not end in {suffix}; write {path.with_suffix(suffix)}")
    if not path.parent.is_dir():
        raise typer.BadParameter(f"the folder {path.parent} does not exist; create it first")
    if kind is not None:
        check_target(path, kind, error=typer.BadParameter)


def page(path: Path | None) -> Path | None:
    """Check the path of an HTML report, and that its plots can be drawn."""
    if path is not None:
        from ibnorm_export.html_page import PAGE, demand_plots

        _check_target(path, ".html", kind=PAGE)
        demand_plots()
    return path


def baseline(path: Path | None) -> Path | None:
    """Check the path of a baseline to write, so that no JSON file of another kind is replaced."""
    if path is None:
        return None
    from ibnorm_export.benchmark.baseline import read_baseline

    _check_target(path, ".json")
    if path.exists() and not path.is_file():
        raise typer.BadParameter(f"{path} is not a regular file; name another")
    if path.exists() and path.stat().st_size:
        try:
            read_baseline(path)
        except IBNormError as error:
            raise typer.BadParameter(f"{path} would be lost: {error}; name another file, or move it away") from error
    return path


def one_api_key(key: str, file: Path | None) -> str:
    """The key of --api-key or of --api-key-file; empty if neither is given."""
    if key and file is not None:
        raise typer.BadParameter("give --api-key or --api-key-file, not both", param_hint="--api-key")
    if file is None:
        return key
    from ibnorm_export.serving.text_settings import read_api_key

    return read_api_key(file)


Checkpoint = Annotated[
    Path,
    typer.Argument(
        metavar="CHECKPOINT",
        exists=True,  # checked before torch is imported
        help="Hugging Face folder with an ibnorm section in config.json; with --model also a file or "
        "folder of weights, such as .safetensors, .pt or .ckpt.",
    ),
]
ModelFile = Annotated[
    Path,
    typer.Argument(metavar="MODEL.onnx", exists=True, help="File or folder that `ibnorm-export export` wrote."),
]
Factory = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODULE:FACTORY",
        help="Your own model: a function in your own module that returns it, an nn.Module or a CustomModel.",
    ),
]
Weights = Annotated[
    metadata.Weights | None,
    typer.Option(
        "--weights",
        show_default="the only ones in the checkpoint",
        help="Weights of the last step (raw) or their moving average (ema), if the checkpoint has both.",
    ),
]
ExampleInputs = Annotated[
    Path | None,
    typer.Option(
        "--inputs",
        metavar="FILE.npz",
        exists=True,
        help="Example inputs by argument name, for a --model factory that returns a plain module.",
    ),
]
Backend = Annotated[
    runner.Backend,
    typer.Option(
        "--backend",
        metavar="NAME",
        help="Runtime that runs the file.",
    ),
]
EngineFile = Annotated[
    Path | None,
    typer.Option(
        "--engine",
        metavar="MODEL.plan",
        exists=True,
        help="Engine that build-engine wrote, for tensorrt and tensorrt-rtx.",
    ),
]
Provider = Annotated[
    str | None,
    typer.Option(
        "--provider",
        metavar="NAME",
        help="Execution provider of the installed ONNX Runtime, such as OpenVINOExecutionProvider, for ort-cpu.",
    ),
]
Npm = Annotated[
    Path | None,
    typer.Option(
        "--npm",
        metavar="DIR",
        exists=True,
        file_okay=False,
        show_default="the current folder or one above it",
        help="Folder of npm install --prefix DIR, for ort-web and ort-node.",
    ),
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed for the random inputs.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
KernelChoice = Annotated[
    runner.Kernels,
    typer.Option("--kernels", help="How the norms run: fused if the library is installed (auto), fused, or function."),
]
RequireFused = Annotated[bool, typer.Option("--require-fused", help="Fail if a norm does not run as a fused kernel.")]
