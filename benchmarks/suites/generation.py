"""LLaMA-60M with random weights in fp32: IBNorm-L beside the RMSNorm model that GenAI's own builder makes.

    python -m benchmarks.suites.generation --json

The models of one stage and context take turns on two threads each, resting between turns until the threads of the one
before have stopped spinning; a value is the median of the paired ratios of time, `upper` its one-sided 95% bound
(bootstrap). A turn of decoding is the mean of 8 steps of one token behind an untimed one, always at the same context.

Physical limit of a decode step: every weight but the embedding is read once. The bandwidth of reading is measured in
the same run, between turns of decoding, by a product of a matrix of 512 MB and a vector on two threads.

The C library's own settings (GLIBC_TUNABLES), which hold for all candidates alike, are recorded with the result.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
import transformers
from onnxruntime_genai.models.builders.llama import LlamaModel

from benchmarks import publish
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
    """One row of the table: `ours` over `theirs`, names of folders."""

    what: str
    stage: str
    context: int
    ours: str
    theirs: str
    bar: float
    upper_bar: float | None = None


CASES = (
    *(Case(WITH_LIBRARY, "decode", n, "library", "rms", 1.0, 1.03) for n in (128, 1500)),
    *(Case(WITH_LIBRARY, "first token", n, "library", "rms", 1.0, 1.03) for n in (128, 512, 1500)),
    *(Case(FUNCTION, "decode", n, "function", "rms", 1.05) for n in (128, 1500)),
    *(Case(FUNCTION, "first token", n, "function", "rms", 1.05) for n in (128, 512, 1500)),
    Case("portable, dynamic cache", "decode", 1500, "portable", "rms", 1.35),
    Case("portable, static cache", "decode", 1500, "static", "rms", 1.10),
    Case("int4 over fp32 of the same model", "decode", 128, "int4", "library", 0.45),
)


@dataclass(frozen=True)
class Row:
    """One comparison; a second bound on `upper`, where the bar has one, suffices too."""

    case: str
    measure: str
    value: float
    bar: float
    ours_ms: float
    theirs_ms: float
    upper: float | None = None
    upper_bar: float | None = None
    at_most: bool = True

    def __bool__(self) -> bool:
        if self.upper is not None and self.upper_bar is not None and self.upper <= self.upper_bar:
            return True
        return self.value <= self.bar if self.at_most else self.value >= self.bar

    def __str__(self) -> str:
        sign = "<=" if self.at_most else ">="
        bound = f", upper {self.upper:.3f}" if self.upper is not None else ""
        return (
            f"{'met   ' if self else 'MISSED'} {self.case:56} {self.measure} {self.value:.3f}{bound} ({sign} "
            f"{self.bar:.2f}); {self.ours_ms:.2f} ms beside {self.theirs_ms:.2f}"
        )

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": "met" if self else "missed"}


def compare(case: Case, of_ours: Times, of_theirs: Times) -> Row:
    ours, theirs = of_ours.mean(axis=1), of_theirs.mean(axis=1)
    ratios = ours / theirs
    drawn = np.random.default_rng(0).choice(ratios, (4000, len(ratios)))
    upper = float(np.quantile(np.median(drawn, axis=1), 0.95))
    return Row(
        f"{case.what}: {case.stage} at {case.context}",
        f"time over {case.theirs}",
        round(float(np.median(ratios)), 4),
        case.bar,
        round(float(np.median(ours)) * 1e3, 3),
        round(float(np.median(theirs)) * 1e3, 3),
        round(upper, 4),
        case.upper_bar,
    )


@contextlib.contextmanager
def quiet() -> Any:
    """The builders print, log and warn."""
    logging.disable(logging.WARNING)
    transformers.logging.disable_progress_bar()
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


def build_rms(config: dict[str, Any], folder: Path) -> None:
    """GenAI's builder, as it is, on transformers' LLaMA of the same shape."""
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
    """Every form of the model under `folder`; gives the bytes that a decode step of fp32 reads."""
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
    """Weights per second of decoding over bytes per second of reading, in turns; the best of each, as limits are."""
    torch.set_num_threads(THREADS)
    matrix, vector = torch.ones(1 << 16, 1 << 11), torch.ones(1 << 11)
    tokens = np.random.default_rng(1).integers(0, 32000, (1, 128))
    steps, reads = [], []
    for _ in range(rounds):
        steps.append(float(time_stage([source], "decode", tokens=tokens, rounds=1)[0].min()))
        for _ in range(4):
            begin = time.perf_counter()
            torch.mv(matrix, vector)
            reads.append(time.perf_counter() - begin)
    limit = read / (matrix.nbytes / min(reads))
    return Row(
        f"{WITH_LIBRARY}: decode at 128",
        "bandwidth over read bandwidth",
        round(limit / min(steps), 4),
        0.85,
        round(min(steps) * 1e3, 3),
        round(limit * 1e3, 3),
        at_most=False,
    )


def measure(folder: Path, read: int, rounds: int) -> list[Row]:
    sources: dict[str, SessionSource] = {}

    def source(name: str) -> SessionSource:
        if name not in sources:
            sources[name] = open_sessions(folder / name, Kernels.AUTO, threads=THREADS)
        return sources[name]

    rows = []
    rng = np.random.default_rng(0)
    for stage, context in dict.fromkeys((case.stage, case.context) for case in CASES):
        cases = [case for case in CASES if (case.stage, case.context) == (stage, context)]
        names = list(dict.fromkeys(name for case in cases for name in (case.theirs, case.ours)))
        # a first token of a long prompt takes seconds
        kept = rounds if stage == "decode" or context < 500 else max(9, rounds // 3)
        tokens = rng.integers(0, 32000, (1, context))
        times = dict(
            zip(names, time_stage([source(name) for name in names], stage, tokens=tokens, rounds=kept), strict=True)
        )
        for case in cases:
            rows.append(compare(case, times[case.ours], times[case.theirs]))
            print(rows[-1], file=sys.stderr, flush=True)
    rows.append(bandwidth(source("library"), read, max(3, rounds // 4)))
    print(rows[-1], file=sys.stderr, flush=True)
    return rows


def main() -> int:
    parser = publish.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=30, help="pairs of turns; fewer of long prompts")
    parser.add_argument("--models", type=Path, help="a folder to build the models in once; those there are taken")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder: Path = options.models or Path(temporary)
        size = folder / "bytes"
        if not size.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            size.write_text(str(build(folder)), encoding="ascii")
        read = int(size.read_text(encoding="ascii"))
        rows = measure(folder, read, options.rounds)
    content = {
        "threads": THREADS,
        "rounds": options.rounds,
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
        "limit": "a decode step reads every weight but the embedding once: time >= bytes / read bandwidth",
        "bytes": read,
        "rows": [row.to_json() for row in rows],
    }
    return publish.publish("generation", content, all(rows), rows, options)


if __name__ == "__main__":
    sys.exit(main())
