"""LLaMA-60M with random weights in fp32: IBNorm-L against the RMSNorm model that GenAI's own builder makes.

The models of one stage and context take turns on two threads each, in the library's own loop for text generation. A
turn of decoding is the mean of 8 steps of one token after one that does not count, always at the same context.

Physical limit of a decode step: every weight except the embedding is read once. The same run measures the bandwidth of
reading, between turns of decoding, by the product of a matrix of 512 MB and a vector on two threads.

The C library's own settings (GLIBC_TUNABLES) hold for all candidates alike and are recorded with the result.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
import transformers
from onnxruntime_genai.models.builders.llama import LlamaModel

from benchmarks.report import Report
from benchmarks.rows import Figure, Row, Target
from benchmarks.turns import compare, ms, pin_threads, take_turns, timed
from ibnorm_export import IBNormSpec, models
from ibnorm_export.benchmark.generation import Times, time_stage
from ibnorm_export.exporter.export import ExportOptions
from ibnorm_export.exporter.genai import export_genai
from ibnorm_export.exporter.text_folder import export_folder
from ibnorm_export.generation.sessions import SessionSource, open_sessions
from ibnorm_export.graph.quantization import Quantization
from ibnorm_export.runtimes.runner import Kernels

THREADS = 2
SPEC = IBNormSpec("L", 4.0, epsilon=1e-5, bias=False)
WITH_LIBRARY = "ort-genai with library"
FUNCTION = "ort-genai, function only"


@dataclass(frozen=True)
class Case:
    """One row: the time of folder `name` over that of folder `over`, in one stage at one context.

    Args:
        max_ratio: the largest ratio that meets the target.
    """

    what: str
    stage: str
    context: int
    _: KW_ONLY
    name: str
    over: str
    max_ratio: float


def _cases() -> tuple[Case, ...]:
    stages = [("decode", n) for n in (128, 1500)] + [("first token", n) for n in (128, 512, 1500)]
    fused = [Case(WITH_LIBRARY, *s, name="library", over="rms", max_ratio=0.97) for s in stages]
    function = [Case(FUNCTION, *s, name="function", over="rms", max_ratio=1.05) for s in stages]
    return (
        *fused,
        *function,
        Case("portable, dynamic cache", "decode", 1500, name="portable", over="rms", max_ratio=1.35),
        Case("portable, static cache", "decode", 1500, name="static", over="rms", max_ratio=1.10),
        Case("int4 over fp32 of the same model", "decode", 128, name="int4", over="library", max_ratio=0.45),
    )


CASES = _cases()


def row_of(case: Case, times: Mapping[str, Times]) -> Row:
    """Compare the mean of each turn of the two candidates of a case."""
    means = {name: times[name].mean(axis=1) for name in (case.name, case.over)}
    figures = compare(means, case.name, over=case.over)
    figures |= {"time": ms(means, case.name), "baseline": ms(means, case.over)}
    target = Target("time over baseline", case.max_ratio)
    return Row(f"{case.what}: {case.stage} at {case.context} over {case.over}", figures, targets=(target,))


@contextlib.contextmanager
def quiet() -> Any:
    """Silence the builders, which print, log and warn."""
    logging.disable(logging.WARNING)
    transformers.logging.disable_progress_bar()
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


def build_rms(config: dict[str, Any], folder: Path) -> None:
    """Run GenAI's builder, unchanged, on transformers' LLaMA of the same shape."""
    source, cache = folder / "checkpoint", folder / "cache"
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).save_pretrained(source)
    read = transformers.LlamaConfig.from_pretrained(source)
    read._name_or_path = str(source)
    fp32 = ir.DataType.FLOAT
    builder = LlamaModel(read, fp32, fp32, "cpu", str(cache), {"hf_token": False, "hf_remote": False})
    builder.make_model(str(source))
    ir.save(builder.model, folder / "model.onnx", external_data="model.onnx.data")
    builder.make_genai_config(read, {}, str(folder))


def build(folder: Path) -> int:
    """Build every form of the model under `folder`; return the bytes that a decode step in fp32 reads."""
    checkpoint = folder / "checkpoint"
    models.save(models.new_model("llama-60m", SPEC), checkpoint)

    def load() -> Any:
        return models.load(checkpoint, task="text-generation")

    loaded = load()
    config = {k: v for k, v in loaded.module.config.to_dict().items() if k not in ("ibnorm", "dtype", "architectures")}
    (folder / "rms").mkdir()
    with quiet():
        build_rms(config, folder / "rms")
        export_genai(load(), folder / "library", kernels=Kernels.FUSED)
        export_genai(load(), folder / "function", kernels=Kernels.FUNCTION)
        export_genai(
            load(), folder / "int4", options=ExportOptions(quantization=Quantization(4, 32, 8)), kernels=Kernels.FUSED
        )
        export_folder(load(), folder / "portable")
        export_folder(load(), folder / "static", options=ExportOptions(cache="static"))
    embedding = config["vocab_size"] * config["hidden_size"]
    return 4 * (sum(p.numel() for p in loaded.module.parameters()) - embedding)


def bandwidth(source: SessionSource, read: int, rounds: int) -> Row:
    """Weights per second of decoding over bytes per second of reading: the best of each, since they are limits."""
    matrix, vector = torch.ones(1 << 16, 1 << 11), torch.ones(1 << 11)
    tokens = np.random.default_rng(1).integers(0, 32000, (1, 128))
    candidates = {
        "step": lambda: float(time_stage([source], "decode", tokens=tokens, rounds=1)[0].min()),
        "read": timed(lambda: torch.mv(matrix, vector)),
    }
    times = take_turns(candidates, rounds=rounds, warmup=1)
    step, limit = float(times["step"].min()), read / (matrix.nbytes / float(times["read"].min()))
    figures = {
        "bandwidth over read bandwidth": Figure(round(limit / step, 4)),
        "step": Figure(round(step * 1e3, 3), "ms"),
        "limit": Figure(round(limit * 1e3, 3), "ms"),
    }
    targets = (Target("bandwidth over read bandwidth", 0.85, at_least=True),)
    return Row(f"{WITH_LIBRARY}: decode at 128, bandwidth", figures, targets=targets)


def rows_of(folder: Path, read: int, rounds: int) -> Iterator[Row]:
    """All rows, stage by stage; a model is opened when it is first needed."""
    sources: dict[str, SessionSource] = {}

    def source(name: str) -> SessionSource:
        if name not in sources:
            sources[name] = open_sessions(folder / name, Kernels.AUTO, threads=THREADS)
        return sources[name]

    rng = np.random.default_rng(0)
    for stage, context in dict.fromkeys((case.stage, case.context) for case in CASES):
        cases = [case for case in CASES if (case.stage, case.context) == (stage, context)]
        names = list(dict.fromkeys(name for case in cases for name in (case.over, case.name)))
        # The first token of a long prompt takes seconds.
        kept_rounds = rounds if stage == "decode" or context < 500 else max(9, rounds // 3)
        tokens = rng.integers(0, 32000, (1, context))
        measured = time_stage([source(name) for name in names], stage, tokens=tokens, rounds=kept_rounds)
        times = dict(zip(names, measured, strict=True))
        yield from (row_of(case, times) for case in cases)
    yield bandwidth(source("library"), read, max(3, rounds // 4))


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rounds", type=int, default=30, help="Turns of each model (%(default)s); fewer of long prompts."
    )
    parser.add_argument("--models", type=Path, help="Folder to build the models in once; those in it are used again.")


def measure(options: argparse.Namespace, report: Report) -> None:
    """Build the models and measure every row."""
    pin_threads(THREADS)  # each session has its own pool, as in the library's loop
    with tempfile.TemporaryDirectory() as temporary:
        folder: Path = options.models or Path(temporary)
        size = folder / "bytes"
        if not size.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            size.write_text(str(build(folder)), encoding="ascii")
        read = int(size.read_text(encoding="ascii"))
        report.facts |= {
            "threads": THREADS,
            "rounds": options.rounds,
            "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
            "limit": "a decode step reads every weight but the embedding once: time >= bytes / read bandwidth",
            "bytes": read,
        }
        for row in rows_of(folder, read, options.rounds):
            report.add(row)
