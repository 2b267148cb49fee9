"""Which file to ship: sweeps over the demo's two models, and over a model of SmolLM's size for its speed.

The part "demo" runs `ibnorm-export demo` in a new folder, where it finds no results of an earlier run, and measures
what its sweeps add to its time; the parts "text" and "digits" sweep its models. The model of SmolLM's size (135 M
parameters, hidden size 576, 30 layers) has random weights: its size and speed are those of a trained one. Its
perplexity means nothing, and is not recorded.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.report import Report
from benchmarks.rows import Figure, Row, Target, Unavailable
from benchmarks.suites.evaluation import write_large_tokenizer
from ibnorm_export import EvaluationOptions, IBNormSpec, SweepOptions, SweepReport, sweep
from ibnorm_export.evaluation.options import TaskName
from ibnorm_export.evaluation.sweep_html import write_sweep

#: Tokens of SmolLM's vocabulary.
_VOCABULARY = 49_152

#: Source: config.json of SmolLM-135M.
_SMOLLM = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": _VOCABULARY,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}

#: Largest loss that passes, as in the demo.
_MAX_DROP = 0.02

_PARTS = ("demo", "text", "digits", "smollm")


def _rows(name: str, report: SweepReport, *, accuracy: bool) -> Iterator[Row]:
    """One row for each file that ran, and one for the recommendation."""
    for file in report.files:
        if file.problem:
            continue
        figures = {
            "size": Figure(file.size_bytes / 1e6, "MB"),
            "latency": Figure(file.latency_ms, "ms"),
            "time over fp32": Figure(file.ratio),
        }
        result, comparison = report.result_of(file.name), report.comparison_of(file.name)
        assert result is not None
        assert comparison is not None
        if accuracy:
            metric = result.metrics[0]
            unit, factor = ("%", 100.0) if metric.share else ("", 1.0)
            for word, value in (("", metric.value), (", low", metric.low), (", high", metric.high)):
                figures[metric.name + word] = Figure(factor * value, unit)
            for word, value in (("", comparison.drop), (", low", comparison.low), (", high", comparison.high)):
                figures[comparison.metric + word] = Figure(100.0 * value, "%")
        verdict = "" if file.decision is None or not accuracy else f", {file.decision.value}"
        note = f"{'verified' if file.verified else 'does not pass verification'}{verdict}"
        yield Row(f"{name}: {file.name}", figures, note=note)
    problems = tuple(report.problems())
    seconds = {
        "time of the sweep": Figure(report.seconds, "s"),
        "files": Figure(sum(not f.problem for f in report.files)),
    }
    recommended = f"recommended: {report.recommendation.name or 'none'}; {report.recommendation.why}"
    note = recommended if accuracy else "random weights: size and speed only"
    yield Row(
        f"{name}: sweep", seconds, targets=(Target("files", 1, at_least=True),), note="; ".join((note, *problems))
    )


def _demo_row(folder: Path) -> Row:
    """Run the demo, and state what its sweeps add to its time."""
    from ibnorm_export.cli.demo_app.app import run_demo

    start = time.perf_counter()
    result = run_demo(folder)
    figures = {
        "sweeps": Figure(sum(report.seconds for report in result.sweeps), "s"),
        "demo": Figure(time.perf_counter() - start, "s"),
    }
    return Row("demo: what the sweeps add", figures, targets=(Target("sweeps", 30.0),))


def _demo(folder: Path, name: str, place: Path) -> SweepReport:
    text = name == "text"
    checkpoint, data = folder / ("llama" if text else "vit"), folder / f"evaluation.{'txt' if text else 'npz'}"
    if not checkpoint.is_dir() or not data.is_file():
        raise Unavailable(f"{folder} has no {checkpoint.name} and {data.name}: run `ibnorm-export demo --out {folder}`")
    return sweep(
        checkpoint,
        place / name,
        task=TaskName.PERPLEXITY if text else TaskName.CLASSIFICATION,
        data=data,
        options=SweepOptions(block_sizes=(32, 128) if text else (32,)),
        evaluation=EvaluationOptions(max_drop=_MAX_DROP, max_length=256 if text else None),
    )


def _smollm(place: Path) -> SweepReport:
    import pydoc_data.topics

    from ibnorm_export.models.new_models import new_model, save

    checkpoint, data = place / "smollm", place / "text.txt"
    save(new_model(_SMOLLM, IBNormSpec("L", 4.0, epsilon=1e-5, bias=False)), checkpoint)
    write_large_tokenizer(checkpoint, _VOCABULARY)
    data.write_text("\n".join(pydoc_data.topics.topics.values())[:600], encoding="utf-8")
    return sweep(
        checkpoint,
        place / "smollm-sweep",
        task=TaskName.PERPLEXITY,
        data=data,
        options=SweepOptions(rounds=10, coverage="fast"),  # type: ignore[arg-type]  # names of members are legal
        evaluation=EvaluationOptions(max_drop=1e9, max_length=64, batch=1),
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this suite."""
    parser.add_argument("--parts", default=",".join(_PARTS), help=f"What to sweep ({','.join(_PARTS)}).")
    parser.add_argument("--demo", type=Path, default=Path("demo"), help="Folder of `ibnorm-export demo --out` (demo).")
    parser.add_argument("--pages", type=Path, help="Also write the page of each sweep into this folder.")


def measure(options: argparse.Namespace, report: Report) -> None:
    """Sweep the parts that are named; of others, what the record has stays in it."""
    parts = options.parts.split(",")
    before = [] if set(parts) >= set(_PARTS) else report.recorded_rows()
    with tempfile.TemporaryDirectory() as place:
        for part in parts:
            for row in _measured(part, options, Path(place)):
                report.add(row)
            names = {row.name for row in report.rows}
            report.recorded = [row for row in before if row["name"] not in names]
            report.save()


def _measured(part: str, options: argparse.Namespace, place: Path) -> Iterator[Row]:
    if part == "demo":
        yield _demo_row(place / "demo")
        return
    found = _smollm(place) if part == "smollm" else _demo(options.demo, part, place)
    if options.pages is not None:
        options.pages.mkdir(parents=True, exist_ok=True)
        write_sweep(found, options.pages / f"{part}.html")
    yield from _rows(part, found, accuracy=part != "smollm")
