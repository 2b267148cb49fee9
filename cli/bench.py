"""`ibnorm-export bench`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import psutil
import typer

from ibnorm_export.cli import options
from ibnorm_export.cli.console import err, out, print_json, print_norms, print_table, show_progress, table
from ibnorm_export.runtimes.runner import Kernels

if TYPE_CHECKING:
    from ibnorm_export.benchmark.measure import BenchReport


def bench_command(
    model_file: options.ModelFile,
    backend: options.Backend = "ort-cpu",
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", metavar="DIR", exists=True, help="Needed by --against.")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Size of the batch axis.")] = 1,
    seq: Annotated[
        int | None,
        typer.Option(
            "--seq",
            min=1,
            show_default="128, or the model's positions where fewer",
            help="Size of the sequence axis, where there is one.",
        ),
    ] = None,
    prompts: Annotated[
        str, typer.Option("--prompts", metavar="LIST", help="Of a folder that generates text: tokens of the prompts.")
    ] = "128,512",
    batches: Annotated[
        str, typer.Option("--batches", metavar="LIST", help="Of a folder that generates text: rows.")
    ] = "1",
    against: Annotated[
        str,
        typer.Option(
            "--against", metavar="LIST", help="Compare with: torch, torch.compile; generating text, torch or folders."
        ),
    ] = "",
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, show_default="physical cores", help="Of every contender.")
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Turns of each contender.")] = 30,
    seed: options.Seed = 0,
    kernels: options.KernelChoice = Kernels.AUTO,
    require_fused: options.RequireFused = False,
    save_baseline: Annotated[
        Path | None,
        typer.Option(
            "--save-baseline",
            metavar="FILE.json",
            callback=options.baseline,
            help="Keep the times, for `compare`, `check`.",
        ),
    ] = None,
    engine: options.EngineFile = None,
    model: options.Factory = None,
    as_json: options.AsJson = False,
) -> None:
    """Measure latency in interleaved rounds, with equal threads; ratios are taken within each round.

    A folder that generates text is measured by its time to the first token and between tokens.

    Example: ibnorm-export bench llama.onnx --checkpoint checkpoints/llama --against torch,torch.compile
    """
    from ibnorm_export import models
    from ibnorm_export.artifacts.exported_model import ExportedModel
    from ibnorm_export.benchmark.baseline import baseline_of, write_baseline
    from ibnorm_export.benchmark.bench import contest
    from ibnorm_export.benchmark.generation import TextBenchOptions
    from ibnorm_export.benchmark.measure import TRTEXEC, BenchOptions
    from ibnorm_export.benchmark.reference_load import Yardstick
    from ibnorm_export.cli import bench_text

    count = threads or psutil.cpu_count(logical=False) or 1
    names = [name.strip() for name in against.split(",") if name.strip()]
    if backend == "ort-cpu" and bench_text.generates(model_file):
        if save_baseline is not None or require_fused or engine is not None or model is not None:
            raise typer.BadParameter(
                f"--save-baseline, --require-fused, --engine and --model are not for {model_file}, a folder that "
                "generates text; leave them out (verify --require-fused says how its norms run)"
            )
        wanted = TextBenchOptions(
            bench_text.counts(prompts, "--prompts"), bench_text.counts(batches, "--batches"), rounds=rounds, seed=seed
        )
        bench_text.bench_generation(
            model_file, checkpoint, against=names, threads=count, options=wanted, kernels=kernels, as_json=as_json
        )
        return
    measuring = replace(TRTEXEC if backend.startswith("tensorrt") else BenchOptions(), rounds=rounds)
    with show_progress() as progress:
        exported = ExportedModel(model_file)
        loaded = None if checkpoint is None else models.load(checkpoint, model)
        sizes = {"batch": batch, "sequence": seq or min(128, exported.metadata.max_positions or 128)}
        report = contest(
            exported,
            backend,
            model=loaded,
            against=names,
            sizes=sizes,
            threads=count,
            options=measuring,
            seed=seed,
            kernels=kernels,
            progress=progress,
            beside=[] if save_baseline is None else [Yardstick()],
            engine=engine,
        )
    if save_baseline is not None:
        write_baseline(baseline_of(str(model_file), report), save_baseline)
    failed = require_fused and not report.all_fused
    if as_json:
        print_json({"verdict": "fail" if failed else "pass", "model": str(model_file), **report.to_dict()})
    else:
        print_report(str(model_file), report)
    if failed:
        err.print(
            "verdict: fail (a norm did not run fused on its device, or beside a memory copy)",
            style="bold red",
            markup=False,
        )
        raise typer.Exit(1)


def print_report(title: str, report: BenchReport) -> None:
    """The report for a person."""
    shapes = ", ".join(f"{name} {list(shape)}" for name, shape in report.inputs.items())
    rows = table(f"{title}: {shapes}, {report.threads} threads", "contender", "p50 ms", "p90 ms", "p99 ms", "samples/s")
    for latency in report.latencies:
        rows.add_row(
            latency.name,
            f"{latency.p50_ms:.3f}",
            f"{latency.p90_ms:.3f}",
            f"{latency.p99_ms:.3f}",
            f"{latency.throughput_per_s:.1f}",
        )
    print_table(rows)
    print_norms(report.norms)
    for warning in report.warnings:
        out.print(f"warning: {warning}", style="yellow", markup=False)
    for ratio in report.ratios:
        out.print(
            f"time of {ratio.name} over {ratio.against}: {ratio.median:.2f} "
            f"(middle half of {report.rounds} rounds: {ratio.p25:.2f} to {ratio.p75:.2f}; below 1 is faster)",
            markup=False,
        )
