"""`ibnorm-export bench` of a folder that generates text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import typer

from ibnorm_export.artifacts.metadata import Task
from ibnorm_export.benchmark.generation import Opener, TextBenchOptions, TextBenchReport, bench_text
from ibnorm_export.cli.console import out, print_json, print_table, show_progress, table
from ibnorm_export.runtimes.runner import Kernels

#: What `Opener` calls, in any process.
_FOLDER: Final = "ibnorm_export.generation.sessions:open_sessions"
_CHECKPOINT: Final = "ibnorm_export.models.sessions:checkpoint_sessions"


def counts(text: str, option: str) -> tuple[int, ...]:
    """ "128,512" -> (128, 512)."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not a list of numbers such as 128,512", param_hint=option) from error


def generates(path: Path) -> bool:
    """Whether `path` was exported for text generation, here or by GenAI's own builder."""
    from ibnorm_export.artifacts.exported_model import ExportedModel

    return (path / "genai_config.json").is_file() or ExportedModel(path).metadata.task is Task.TEXT_GENERATION


def _vocabulary(folder: Path) -> int:
    from ibnorm_export.artifacts.tokenizer import read_json

    name = "genai_config.json" if (folder / "genai_config.json").is_file() else "config.json"
    config: Any = read_json(folder / name)
    return int(config["model"]["vocab_size"] if name.startswith("genai") else config["vocab_size"])


def bench_generation(
    path: Path,
    checkpoint: Path | None,
    *,
    against: Sequence[str],
    threads: int,
    options: TextBenchOptions,
    kernels: Kernels,
    as_json: bool,
) -> None:
    """Measure, and print the report."""
    folder = path if path.is_dir() else path.parent
    arguments = {"kernels": kernels.value, "threads": threads}
    openers = {str(path): Opener(_FOLDER, {"folder": str(folder), **arguments})}
    for name in against:
        if name == "torch":
            if checkpoint is None:
                raise typer.BadParameter("comparing with torch needs --checkpoint DIR", param_hint="--against")
            openers[name] = Opener(_CHECKPOINT, {"checkpoint": str(checkpoint), "threads": threads})
        elif Path(name).is_dir():
            openers[name] = Opener(_FOLDER, {"folder": name, **arguments})
        else:
            raise typer.BadParameter(
                f"{name!r} is neither torch nor a folder that generates text", param_hint="--against"
            )
    with show_progress() as progress:
        report = bench_text(openers, _vocabulary(folder), threads=threads, options=options, progress=progress)
    if as_json:
        print_json({"verdict": "pass", "model": str(path), **report.to_dict()})
    else:
        print_report(str(path), report)


def print_report(title: str, report: TextBenchReport) -> None:
    """The report for a person."""
    rows = table(
        f"{title}: {report.threads} threads",
        "contender",
        "prompt",
        "batch",
        "first token ms",
        "token p50 ms",
        "p90 ms",
        "p99 ms",
        "prefill tokens/s",
        "decode tokens/s",
        "peak MB",
    )
    for t in report.timings:
        peak = "" if t.peak_memory_mb is None else f"{t.peak_memory_mb:.0f}"
        rows.add_row(
            t.name,
            str(t.prompt),
            str(t.batch),
            f"{t.first_token_ms:.2f}",
            f"{t.inter_token_p50_ms:.2f}",
            f"{t.inter_token_p90_ms:.2f}",
            f"{t.inter_token_p99_ms:.2f}",
            f"{t.prefill_tokens_per_s:.0f}",
            f"{t.decode_tokens_per_s:.1f}",
            peak,
        )
    print_table(rows)
    for r in report.ratios:
        out.print(
            f"{r.stage} at {r.prompt}, batch {r.batch}: time over {r.against} {r.spread.ratio:.2f} (95% interval "
            f"{r.spread.low:.2f} to {r.spread.high:.2f}; below 1 is faster)",
            markup=False,
        )
