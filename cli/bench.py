"""`ibnorm-export bench`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ibnorm_export.artifacts.axes import BATCH, SEQUENCE
from ibnorm_export.benchmark.options import TableFormat
from ibnorm_export.cli import options
from ibnorm_export.cli.console import err, finish, out, show_progress
from ibnorm_export.errors import ExitCode
from ibnorm_export.runtimes.runner import Backend, Kernels

if TYPE_CHECKING:
    from ibnorm_export.artifacts.loaded_model import LoadedModel
    from ibnorm_export.benchmark.options import BenchOptions
    from ibnorm_export.benchmark.report import BenchReport, GenerationReport


def _counts(text: str, option: str) -> tuple[int, ...]:
    """Parse a list such as "128,512"."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not a list of numbers such as 128,512", param_hint=option) from error


def _sizes(shape: dict[str, int], *, batch: int | None, seq: int | None) -> dict[str, int]:
    """The sizes of --shape, --batch and --seq together."""
    for option, axis, size in (("--batch", BATCH, batch), ("--seq", SEQUENCE, seq)):
        if size is not None and axis in shape:
            raise typer.BadParameter(f"{option} and --shape both give {axis}: give it once", param_hint=option)
        shape = shape if size is None else {**shape, axis: size}
    return shape


def _following(model_file: Path, checkpoint: Path | None, baseline: Path | None) -> list[object]:
    """The command after a measurement: compare it with PyTorch, or with a later measurement; or generate text."""
    from ibnorm_export.benchmark.generation import generates_text

    if baseline is not None:
        return ["compare", baseline, "LATER.json"]
    if checkpoint is None:
        return ["bench", model_file, "--checkpoint", "CHECKPOINT", "--against", "torch"]
    if generates_text(model_file):
        return ["generate", model_file, "PROMPT"]
    return ["bench", model_file, "--save-baseline", f"{model_file.stem}.json"]


def bench_command(
    model_file: options.ModelFile,
    backend: options.Backend = Backend.ORT_CPU,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            "--checkpoint", metavar="DIR", exists=True, help="The checkpoint, which --against torch runs in PyTorch."
        ),
    ] = None,
    batch: Annotated[
        int | None, typer.Option("--batch", min=1, show_default="1", help="Size of the batch axis.")
    ] = None,
    seq: Annotated[
        int | None,
        typer.Option(
            "--seq",
            min=1,
            show_default="128, or the model's positions if fewer",
            help="Size of the sequence axis, if the model has one.",
        ),
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            "--shape",
            metavar="AXIS=SIZE,...",
            show_default="those of the examples that the export was given",
            help="Sizes of other axes of your own model, as in time=64.",
        ),
    ] = None,
    prompts: Annotated[
        str,
        typer.Option("--prompts", metavar="LIST", help="Lengths of the prompts in tokens, for text generation."),
    ] = "128,512",
    batches: Annotated[
        str, typer.Option("--batches", metavar="LIST", help="Numbers of rows, for text generation.")
    ] = "1",
    against: Annotated[
        str,
        typer.Option(
            "--against",
            metavar="LIST",
            help="Compare with these: torch, torch.compile, other backends such as openvino, other exports. For text "
            "generation: torch, other folders.",
        ),
    ] = "",
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads",
            min=1,
            show_default="physical cores that this process may use",
            help="Number of threads of every candidate.",
        ),
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Number of turns of each candidate.")] = 34,
    table: Annotated[
        TableFormat | None,
        typer.Option("--format", show_default="text", help="Print the table of latencies in this form only."),
    ] = None,
    loading: Annotated[
        bool,
        typer.Option("--loading", help="Also report what it takes to load the file: session, first pass and memory."),
    ] = False,
    seed: options.Seed = 0,
    kernels: options.KernelChoice = Kernels.AUTO,
    require_fused: options.RequireFused = False,
    save_baseline: Annotated[
        Path | None,
        typer.Option(
            "--save-baseline",
            metavar="FILE.json",
            callback=options.baseline,
            help="Save the times, for `compare` and `check`.",
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            "--report", metavar="FILE.html", callback=options.page, help="Also write a self-contained HTML page."
        ),
    ] = None,
    engine: options.EngineFile = None,
    provider: options.Provider = None,
    npm: options.Npm = None,
    model: options.Factory = None,
    weights: options.Weights = None,
    as_json: options.AsJson = False,
) -> None:
    """Measure latency in interleaved rounds, with the same threads for all candidates.

    A folder that generates text is measured by its time to the first token and between tokens.

    Example: ibnorm-export bench llama.onnx --checkpoint checkpoints/llama --against torch,torch.compile
    """
    from ibnorm_export.api import bench
    from ibnorm_export.benchmark.baseline import REFERENCE_LOAD
    from ibnorm_export.benchmark.options import BenchOptions, GenerationOptions
    from ibnorm_export.exporter.options import parse_shape

    wanted = BenchOptions(
        backend,
        kernels,
        sizes=_sizes({} if shape is None else parse_shape(shape), batch=batch, seq=seq),
        threads=threads,
        rounds=rounds,
        seed=seed,
        engine=engine,
        provider=provider,
        npm=npm,
        require_fused=require_fused,
        loading=3 if loading else 0,
        generation=GenerationOptions(_counts(prompts, "--prompts"), _counts(batches, "--batches")),
    )
    others = [name.strip() for name in against.split(",") if name.strip()]
    _check_options(
        model_file,
        against=others,
        options=wanted,
        for_files=(save_baseline is not None or model is not None) and backend == Backend.ORT_CPU,
    )
    with show_progress() as progress:
        report = bench(
            model_file,
            None if checkpoint is None else _load(checkpoint, model_file, factory=model, weights=weights),
            against=others if save_baseline is None else [*others, REFERENCE_LOAD],
            options=wanted,
            progress=progress,
        )
    _write(report, baseline=save_baseline, html=html)
    if table is not None and not as_json and _print_table(report, table):
        return
    finish(
        report,
        "bench",
        as_json=as_json,
        files=[model_file, checkpoint, save_baseline],
        then=_following(model_file, checkpoint, save_baseline),
    )


def _check_options(model_file: Path, *, against: list[str], options: BenchOptions, for_files: bool) -> None:
    """Refuse what cannot be measured before the checkpoint is read, and options for files where a folder has text."""
    from ibnorm_export.benchmark.bench import check_candidates
    from ibnorm_export.benchmark.generation import generates_text

    of_text = generates_text(model_file)
    check_candidates(() if of_text else against, options=options)
    if options.loading and of_text:
        raise typer.BadParameter(
            f"--loading does not apply to {model_file}, a folder that generates text: leave it out"
        )
    if for_files and of_text:
        raise typer.BadParameter(
            f"--save-baseline and --model do not apply to {model_file}, a folder that generates text: leave them out"
        )


def _load(checkpoint: Path, model_file: Path, *, factory: str | None, weights: str | None) -> LoadedModel:
    """Load the checkpoint for the task of the exported file, with the file's inputs for a model of the user's own."""
    from ibnorm_export.artifacts.exported_model import ExportedModel
    from ibnorm_export.artifacts.metadata import Task
    from ibnorm_export.benchmark.generation import generates_text
    from ibnorm_export.models.loading import load

    task = Task.TEXT_GENERATION if factory is None and generates_text(model_file) else Task.FORWARD
    inputs = None if factory is None else ExportedModel(model_file)
    return load(checkpoint, factory, task=task, weights=weights, inputs=inputs)


def _write(report: BenchReport | GenerationReport, *, baseline: Path | None, html: Path | None) -> None:
    from ibnorm_export.benchmark.baseline import baseline_of, write_baseline
    from ibnorm_export.benchmark.report import BenchReport

    if baseline is not None and isinstance(report, BenchReport):
        write_baseline(baseline_of(report), baseline)
    if html is not None:
        from ibnorm_export.benchmark.html import write_bench

        write_bench(report, html)


def _print_table(report: BenchReport | GenerationReport, form: TableFormat) -> bool:
    """Print only the table of latencies, and return whether the report has one."""
    from ibnorm_export.benchmark.report import BenchReport
    from ibnorm_export.benchmark.table import bench_table

    if not isinstance(report, BenchReport):
        return False
    out.print(bench_table(report, form))
    for warning in report.warnings:
        err.print(f"warning: {warning}", style="yellow")
    if not report:
        raise typer.Exit(ExitCode.CHECK_FAILED)
    return True
