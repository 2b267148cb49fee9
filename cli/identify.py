"""`ibnorm-export identify`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from ibnorm_export.cli import options
from ibnorm_export.cli.console import finish, show_progress
from ibnorm_export.errors import quoted
from ibnorm_export.parsing import parse_json


def _arguments(text: str | None) -> list[Any] | dict[str, Any]:
    if text is None:
        return []
    try:
        value = parse_json(text)
    except ValueError as error:
        raise typer.BadParameter(f"--args is not valid JSON: {error}; quote it for the shell") from error
    if not isinstance(value, (list, dict)):
        raise typer.BadParameter(f"--args is {quoted(text)}; it must be a JSON list or object")
    return value


def _shape(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    if not re.fullmatch(r"[1-9]\d{0,6}(,[1-9]\d{0,6})+", text.replace(" ", "")):
        raise typer.BadParameter(f"--shape is {quoted(text)}; it must be two sizes or more, the batch first, as in 2,8")
    return tuple(int(size) for size in text.split(","))


def identify_command(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET", help="package.module:Class (or a function, or a norm), or with --model a checkpoint."
        ),
    ],
    arguments: Annotated[
        str | None,
        typer.Option("--args", metavar="JSON", help="Arguments of the class: a JSON list or object."),
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option("--shape", metavar="N,N,...", help="Shape of an input of the norm, the batch first."),
    ] = None,
    model: options.Factory = None,
    weights: options.Weights = None,
    inputs: options.ExampleInputs = None,
    norm_class: Annotated[
        str | None,
        typer.Option(
            "--norm-class",
            metavar="MODULE:CLASS",
            help="Class whose instances are norms, whatever they are called; for --model.",
        ),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Find out which IBNorm a norm of your own code is, by running it; exit 1 if it is not an IBNorm.

    Example: ibnorm-export identify mymodel:IBNorm --args '{"features": 8, "lam": 4.0}'
    """
    built, size = _arguments(arguments), _shape(shape)
    if model is not None and (arguments is not None or shape is not None):
        raise typer.BadParameter("--args and --shape are for a class, not for a checkpoint with --model")
    if model is None and (norm_class is not None or inputs is not None or weights is not None):
        raise typer.BadParameter("--norm-class, --inputs and --weights are for a checkpoint with --model")
    from ibnorm_export.artifacts.npz import read_npz
    from ibnorm_export.models.norm_identities import build_norm, identify_checkpoint
    from ibnorm_export.op.identification.norms import identify

    if model is not None:
        example = None if inputs is None else read_npz(inputs, "an .npz file of plain arrays")
        with show_progress() as progress:
            progress("running the norms", 0, 0)
            report = identify_checkpoint(target, model, inputs=example, norm_class=norm_class, weights=weights)
        checkpoint = Path(target)
        finish(
            report,
            "identify",
            as_json=as_json,
            files=[target, inputs],
            then=[
                "export",
                target,
                "-o",
                f"{checkpoint.resolve().name if checkpoint.is_dir() else checkpoint.stem}.onnx",
                "--model",
                model,
            ],
        )
    else:
        with show_progress() as progress:
            progress("running the norm", 0, 0)
            identity = identify(build_norm(target, built), shape=size)
        finish(
            identity,
            "identify",
            as_json=as_json,
            then=["export", "WEIGHTS", "-o", "MODEL.onnx", "--model", f"{target.partition(':')[0]}:FACTORY"],
        )
