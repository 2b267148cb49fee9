"""`ibnorm-export evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ibnorm_export.cli import options
from ibnorm_export.cli.console import finish, show_progress
from ibnorm_export.evaluation.options import EvaluationOptions, TaskName
from ibnorm_export.evaluation.sweep_options import AXES, Preference, SweepOptions, parse_sweep
from ibnorm_export.runtimes.runner import Backend, Endpoint, Kernels


def parse_share(text: str) -> float:
    """Parse "0.5%" or "0.005"."""
    number, percent, rest = text.strip().partition("%")
    try:
        if rest:
            raise ValueError(rest)
        return float(number) / (100.0 if percent else 1.0)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not a share such as 0.5% or 0.005") from error


def evaluate_command(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL",
            help="Exported files or folders, checkpoints, which PyTorch runs, and text endpoints "
            "(http://HOST:PORT/v1). MODEL@BACKEND chooses a runtime for one of them, e.g. vit.onnx@openvino. With "
            "--sweep, one checkpoint.",
        ),
    ],
    task: Annotated[TaskName, typer.Option("--task", help="What the models are evaluated on.")],
    data: Annotated[
        Path,
        typer.Option(
            "--data",
            metavar="PATH",
            help="Texts (.txt, .jsonl, .parquet, a folder of datasets) or labelled images (a folder for each class, "
            ".npz, .parquet, .tar shards), or questions with choices (.jsonl), or a folder of lm-eval's tasks and "
            "their data sets. Nothing is downloaded.",
        ),
    ],
    against: Annotated[
        str | None, typer.Option("--against", metavar="MODEL", help="The reference that every model is compared with.")
    ] = None,
    max_drop: Annotated[
        str,
        typer.Option(
            "--max-drop",
            metavar="SHARE",
            help="Largest loss against the reference that passes: of accuracy, or relative of perplexity.",
        ),
    ] = "0.5%",
    sweep_axes: Annotated[
        list[str] | None,
        typer.Option(
            "--sweep",
            metavar="AXIS=VALUES",
            help="Export the checkpoint in every combination, verify, time and evaluate each file, and recommend one: "
            f"{', '.join(AXES)}, as in --sweep dtype=fp32,fp16,int8,int4 block-size=32,128.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="DIR",
            help="Folder for the files and results of --sweep. A sweep that was stopped goes on there.",
        ),
    ] = None,
    prefer: Annotated[
        Preference, typer.Option("--prefer", help="What decides between the files of --sweep that pass.")
    ] = Preference.LATENCY,
    tasks: Annotated[
        str,
        typer.Option(
            "--tasks",
            metavar="NAME,...",
            show_default="all of the folder's own",
            help="Tasks, groups or leaderboards to run, for --task lm-eval, e.g. llm-leaderboard-1.",
        ),
    ] = "",
    backend: Annotated[
        Backend | None,
        typer.Option(
            "--backend",
            metavar="NAME",
            show_default="ort-cpu; onnxruntime-genai for a folder that was exported for it",
            help="Runtime that runs exported files.",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, show_default="all", help="Number of samples.")] = None,
    batch: Annotated[
        int | None, typer.Option("--batch", min=1, show_default="chosen", help="Samples of one pass.")
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            "--max-length",
            min=2,
            show_default="the model's positions, at most 1024",
            help="Tokens of a window, for perplexity.",
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            "--stride", min=1, show_default="half a window", help="Tokens that a window moves by, for perplexity."
        ),
    ] = None,
    max_unreadable: Annotated[
        str, typer.Option("--max-unreadable", metavar="SHARE", help="Share of samples that may be unreadable.")
    ] = "0%",
    results: Annotated[
        Path | None,
        typer.Option(
            "--results",
            metavar="DIR",
            help="Keep the result of each sample there. A run that was stopped goes on, and a model that has been "
            "evaluated is not run again.",
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            "--tokenizer",
            metavar="DIR",
            exists=True,
            show_default="that of a model",
            help="Folder of the tokenizer.",
        ),
    ] = None,
    preprocessing: Annotated[
        Path | None,
        typer.Option(
            "--preprocessing",
            metavar="DIR",
            exists=True,
            show_default="those of a model",
            help="Folder with the settings of the image processor.",
        ),
    ] = None,
    kernels: options.KernelChoice = Kernels.AUTO,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Threads of the runtime.")] = None,
    url: Annotated[
        str | None,
        typer.Option("--url", metavar="HOST:PORT", help="Address of a Triton server; grpc://HOST:PORT for gRPC."),
    ] = None,
    name: Annotated[
        str, typer.Option("--name", help="Name of the model on that server.", rich_help_panel="Runtime")
    ] = "",
    api_key: Annotated[
        str,
        typer.Option(
            "--api-key",
            metavar="KEY",
            help="Key that is sent to text endpoints. Other users of this machine can read it in the list of "
            "processes; --api-key-file keeps it private.",
        ),
    ] = "",
    api_key_file: Annotated[
        Path | None, typer.Option("--api-key-file", metavar="FILE", help="File that holds the key of text endpoints.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed for the resamples of the bootstrap.")] = 0,
    html: Annotated[
        Path | None,
        typer.Option(
            "--report", metavar="FILE.html", callback=options.page, help="Also write a self-contained HTML page."
        ),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Measure accuracy or perplexity of models on the same samples; exit 1 if one is worse than the reference.

    With --sweep, find the file to ship: export a checkpoint in several forms, and compare size, latency and accuracy.

    Example: ibnorm-export evaluate vit.int8.onnx --against checkpoints/vit --task classification --data val
    """
    wanted = EvaluationOptions(
        backend,
        kernels,
        max_drop=parse_share(max_drop),
        limit=limit,
        batch=batch,
        max_length=max_length,
        stride=stride,
        max_unreadable=parse_share(max_unreadable),
        results=results,
        tokenizer=tokenizer,
        preprocessing=preprocessing,
        threads=threads,
        endpoint=None if url is None else Endpoint(url, name),
        api_key=options.one_api_key(api_key, api_key_file),
        tasks=tuple(tasks.split(",")),
        seed=seed,
    )
    if sweep_axes is not None:
        models, axes = _split_axes(models, sweep_axes, backend=backend)
        _check_sweep(models, output=output, against=against, results=results)
        axes_of_sweep = parse_sweep(axes, prefer=prefer)
        _sweep(
            models[0],
            output,
            task=task,
            data=data,
            options=axes_of_sweep,
            evaluation=wanted,
            html=html,
            as_json=as_json,
        )
    elif output is not None:
        raise typer.BadParameter("--output is for --sweep; results of samples go to --results DIR")
    else:
        _evaluate(models, task=task, data=data, against=against, options=wanted, html=html, as_json=as_json)


def _evaluate(
    models: list[str],
    *,
    task: TaskName,
    data: Path,
    against: str | None,
    options: EvaluationOptions,
    html: Path | None,
    as_json: bool,
) -> None:
    from ibnorm_export.evaluation.evaluate import evaluate
    from ibnorm_export.evaluation.html import write_evaluation

    with show_progress() as progress:
        report = evaluate(models, task=task, data=data, against=against, options=options, progress=progress)
        if html is not None:
            progress("writing the report", 0, 0)
            write_evaluation(report, html)
    named = [_file_of(name) for name in (*models, against) if name]
    read = [data if data.is_file() else None, html]
    finish(report, "evaluate", as_json=as_json, files=[*named, *read], then=["check"])


def _file_of(model: str) -> str | None:
    """The file or folder that an argument names, also as FILE@BACKEND; None for a text endpoint."""
    paths = (model, model.rpartition("@")[0])
    return next((path for path in paths if path and Path(path).exists()), None)


def _split_axes(models: list[str], axes: list[str], *, backend: str | None) -> tuple[list[str], list[str]]:
    """Take further axes out of the arguments, where `--sweep dtype=fp32 block-size=32` puts the second one."""
    further = [text for text in models if text.partition("=")[0] in AXES and not Path(text).exists()]
    found = [*axes, *further]
    if backend is not None and not any(item.startswith("runtime=") for text in found for item in text.split()):
        found.append(f"runtime={backend}")
    return [text for text in models if text not in further], found


def _check_sweep(models: list[str], *, output: Path | None, against: str | None, results: Path | None) -> None:
    if len(models) != 1:
        raise typer.BadParameter(f"--sweep takes one checkpoint, not {len(models)}: {', '.join(models)}")
    if output is None:
        raise typer.BadParameter("--sweep writes files; name their folder with --output DIR")
    if against is not None:
        raise typer.BadParameter("--sweep compares every file with the checkpoint; leave out --against")
    if results is not None:
        raise typer.BadParameter("--sweep keeps its results in the folder of --output; leave out --results")


def _sweep(
    checkpoint: str,
    folder: Path | None,
    *,
    task: TaskName,
    data: Path,
    options: SweepOptions,
    evaluation: EvaluationOptions,
    html: Path | None,
    as_json: bool,
) -> None:
    from ibnorm_export.evaluation.sweep import sweep
    from ibnorm_export.evaluation.sweep_html import write_sweep

    assert folder is not None, "checked"
    with show_progress() as progress:
        report = sweep(
            checkpoint, folder, task=task, data=data, options=options, evaluation=evaluation, progress=progress
        )
        if html is not None:
            progress("writing the report", 0, 0)
            write_sweep(report, html)
    files = [checkpoint, data if data.is_file() else None, html]
    finish(report, "evaluate", as_json=as_json, files=files)
