"""Speed of text generation: time to the first token and time between tokens, with candidates taking turns.

As in `measure`, ratios are taken within each round; a candidate rests before its turn and runs one untimed step.
With one row the cache then goes back to the prompt, so every turn is timed with the same number of cached tokens.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.metadata import Task
from ibnorm_export.artifacts.onnx_file import GENAI_CONFIG_FILE
from ibnorm_export.artifacts.tokenizer import read_json
from ibnorm_export.benchmark.fresh_process import SessionOpener, peak_memory_mb
from ibnorm_export.benchmark.options import BenchOptions, Timing
from ibnorm_export.benchmark.report import GenerationRatio, GenerationReport, GenerationTiming
from ibnorm_export.benchmark.statistics import paired
from ibnorm_export.environment import environment
from ibnorm_export.errors import IBNormError, ModelFileError, listed, quoted
from ibnorm_export.generation.sessions import Session, SessionSource, torch_sessions
from ibnorm_export.progress import Progress, silent

__all__ = ["STAGES", "Times", "bench_generation", "generates_text", "measure_generation", "time_stage"]

#: What is timed: the whole prompt, and single steps after it.
STAGES: Final = ("first token", "decode")

#: Seconds (rounds, steps of a turn).
Times = NDArray[np.float64]

# What a process calls to open a candidate. The second function is named, because `models` imports this package.
_OPEN_FOLDER: Final = "ibnorm_export.generation.sessions:open_sessions"
_OPEN_CHECKPOINT: Final = "ibnorm_export.models.sessions:checkpoint_sessions"


def generates_text(path: str | Path) -> bool:
    """Whether `path` was exported for text generation, by this package or by GenAI's own builder.

    Raises:
        ModelFileError: it is not an exported file or folder.
    """
    path = Path(path)
    return (path / GENAI_CONFIG_FILE).is_file() or ExportedModel(path).metadata.task is Task.TEXT_GENERATION


class _Turns:
    """One candidate's turns at one prompt and batch."""

    def __init__(self, source: SessionSource, tokens: NDArray[np.int64], *, rounds: int, steps: int) -> None:
        self._batch, self._length = tokens.shape
        self._source, self._tokens, self._steps = source, tokens, steps
        turns = 1 if self._batch == 1 else rounds
        self._session: Session = source.start(self._batch, self._length + turns * (steps + 1) + 1)
        self._session.feed(tokens)

    def _step(self) -> None:
        if self._batch == 1:
            self._session.feed(self._tokens[:, :1])
        else:
            self._session.step()

    def decode(self) -> list[float]:
        """Seconds of each step. One row has the same context in every turn; the context of several rows grows."""
        self._step()  # wakes the threads
        times = [time.perf_counter()]
        for _ in range(self._steps):
            self._step()
            times.append(time.perf_counter())
        if self._batch == 1:
            self._session.rewind(self._length)
        return [after - before for before, after in itertools.pairwise(times)]

    def first_token(self) -> list[float]:
        """Seconds from the prompt to its logits, in a new session."""
        session = self._source.start(self._batch, self._length + 1)
        start = time.perf_counter()
        session.feed(self._tokens)
        return [time.perf_counter() - start]


def time_stage(
    sources: Sequence[SessionSource], stage: str, *, tokens: NDArray[np.int64], rounds: int, steps: int = 8
) -> list[Times]:
    """Time one stage of each candidate in interleaved rounds; the first round warms up and is dropped.

    Args:
        sources: the candidates; the order of their turns alternates from round to round.
        stage: one of `STAGES`.
        tokens: the prompt (batch, n).
        rounds: how many rounds are kept.
        steps: steps of one turn of decoding.

    Returns:
        Seconds (rounds, steps of a turn) of each candidate.
    """
    turns = [_Turns(source, tokens, rounds=rounds + 1, steps=steps) for source in sources]
    times: list[list[list[float]]] = [[] for _ in sources]
    rest_s = Timing().rest_ms / 1e3
    for index in range(rounds + 1):
        order = range(len(turns)) if index % 2 == 0 else reversed(range(len(turns)))
        for which in order:
            if len(turns) > 1:
                time.sleep(rest_s)
            turn = turns[which]
            times[which].append(turn.decode() if stage == "decode" else turn.first_token())
    return [np.array(rows[1:]) for rows in times]


def measure_generation(
    candidates: Mapping[str, SessionOpener],
    vocabulary: int,
    *,
    model: str = "",
    options: BenchOptions | None = None,
    progress: Progress = silent,
) -> GenerationReport:
    """Measure text generation at every prompt length and batch.

    Args:
        candidates: by the name that is reported; the first is compared with each other one.
        vocabulary: number of tokens that prompts are drawn from.
        model: name of the model in the report.
        options: threads (recorded, not set here), rounds, seed and `generation` are used.
        progress: receives the progress of the work.

    Raises:
        IBNormError: there is no candidate, or one cannot run a prompt.
    """
    options = BenchOptions() if options is None else options
    wanted = options.generation
    if not candidates:
        raise IBNormError("nothing to measure: there is no candidate")
    sources = {name: opener.open() for name, opener in candidates.items()}
    rng = np.random.default_rng(options.seed)
    timings: list[GenerationTiming] = []
    ratios: list[GenerationRatio] = []
    cases = [(prompt, batch) for batch in wanted.batches for prompt in wanted.prompts]
    for index, (prompt, batch) in enumerate(cases):
        progress(f"prompt {prompt}, batch {batch}", index, len(cases))
        tokens = rng.integers(0, vocabulary, (batch, prompt), dtype=np.int64)
        times = {
            stage: dict(
                zip(
                    sources,
                    time_stage([*sources.values()], stage, tokens=tokens, rounds=options.rounds, steps=wanted.steps),
                    strict=True,
                )
            )
            for stage in STAGES
        }
        for name, opener in candidates.items():
            peak = peak_memory_mb(opener, prompt, batch=batch, steps=wanted.steps)
            timings.append(_timing(name, tokens, times=times, peak_memory_mb=peak))
        ratios += _ratios(tokens, times)
    progress("measured", len(cases), len(cases))
    return GenerationReport(
        model,
        wanted,
        threads=options.thread_count,
        rounds=options.rounds,
        timings=tuple(timings),
        ratios=tuple(ratios),
        environment=environment(),
    )


def _timing(
    name: str, tokens: NDArray[np.int64], *, times: Mapping[str, Mapping[str, Times]], peak_memory_mb: float | None
) -> GenerationTiming:
    batch, prompt = tokens.shape
    first = float(np.median(times["first token"][name]))
    steps = times["decode"][name].ravel()
    p50, p90, p99 = (float(p) * 1e3 for p in np.percentile(steps, (50, 90, 99)))
    return GenerationTiming(
        name,
        prompt,
        batch=batch,
        first_token_ms=first * 1e3,
        inter_token_p50_ms=p50,
        inter_token_p90_ms=p90,
        inter_token_p99_ms=p99,
        prefill_tokens_per_s=batch * prompt / first,
        decode_tokens_per_s=batch * len(steps) / float(steps.sum()),
        peak_memory_mb=peak_memory_mb,
    )


def _ratios(tokens: NDArray[np.int64], times: Mapping[str, Mapping[str, Times]]) -> list[GenerationRatio]:
    """The first candidate over each other one, by stage."""
    batch, prompt = tokens.shape
    ratios = []
    for stage, by_name in times.items():
        first, *others = by_name
        for other in others:
            spread = paired(by_name[first].mean(axis=1).tolist(), by_name[other].mean(axis=1).tolist())
            ratios.append(GenerationRatio(first, other, stage=stage, prompt=prompt, batch=batch, spread=spread))
    return ratios


def _vocabulary(folder: Path) -> int:
    """Number of tokens that the model of a folder knows.

    Raises:
        ModelFileError: the folder does not state it.
    """
    genai = folder / GENAI_CONFIG_FILE
    file = genai if genai.is_file() else folder / "config.json"
    config: Any = read_json(file)
    stated = config.get("model") if file == genai else config
    size = stated.get("vocab_size") if isinstance(stated, dict) else None
    if not isinstance(size, int) or size < 1:
        raise ModelFileError(f"{file}: vocab_size is {quoted(size)}; it must be the number of tokens: export again")
    return size


def bench_generation(
    path: Path,
    *,
    model: LoadedModel | None,
    against: Sequence[str | Path | ExportedModel],
    options: BenchOptions,
    progress: Progress = silent,
) -> GenerationReport:
    """Measure a folder that generates text; arguments and errors as in `ibnorm_export.benchmark.bench.bench`."""
    if options.engine is not None or options.require_fused:
        raise IBNormError(
            f"--engine and --require-fused do not apply to {path}, a folder that generates text: leave them out "
            "(`verify --require-fused` reports how its norms run)"
        )
    if options.loading:
        raise IBNormError(f"loading (--loading) does not apply to {path}, a folder that generates text: leave it out")
    if options.sizes:
        raise IBNormError(
            f"{listed(options.sizes)}: sizes (--batch, --seq, --shape) do not apply to {path}, a folder that generates "
            "text: use --prompts and --batches (BenchOptions.generation)"
        )
    folder = path if path.is_dir() else path.parent
    arguments = {"kernels": options.kernels.value, "threads": options.thread_count}
    candidates = {str(path): SessionOpener(_OPEN_FOLDER, {"folder": str(folder), **arguments})}
    for other in against:
        name = str(other.path.parent) if isinstance(other, ExportedModel) else str(other)
        if other == "torch":
            candidates[name] = _torch_opener(model, options.thread_count)
        elif Path(name).is_dir():
            candidates[name] = SessionOpener(_OPEN_FOLDER, {"folder": name, **arguments})
        else:
            raise IBNormError(f"cannot compare with {name!r}: it is neither torch nor a folder that generates text")
    return measure_generation(candidates, _vocabulary(folder), model=str(path), options=options, progress=progress)


def _torch_opener(model: LoadedModel | None, threads: int) -> SessionOpener:
    if model is None:
        raise IBNormError("comparing with torch needs the checkpoint: add --checkpoint DIR (model= in Python)")
    if model.task != Task.TEXT_GENERATION:
        raise IBNormError(f"{model.source} is loaded without a cache: load it with the task {Task.TEXT_GENERATION}")
    arguments = {"checkpoint": model.source, "threads": threads}
    return SessionOpener(_OPEN_CHECKPOINT, arguments, opened=torch_sessions(model))
