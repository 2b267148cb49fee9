"""Speed of generation: time to first token and latency between tokens, contenders taking turns.

As in `bench`, ratios are taken within each round. Before its turn a contender rests, so that the threads of the
other one have stopped spinning, and runs one untimed step. Of a single row the cache then goes back to the prompt,
so every turn is timed at the same context.
"""

from __future__ import annotations

import importlib
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ibnorm_export.benchmark.statistics import Spread, paired
from ibnorm_export.environment import environment
from ibnorm_export.errors import IBNormError
from ibnorm_export.generation.sessions import Session, SessionSource
from ibnorm_export.progress import Progress, silent

__all__ = ["Opener", "TextBenchOptions", "TextBenchReport", "TextRatio", "TextTiming", "bench_text", "race"]

#: Of contenders whose sessions live side by side, the worker threads spin for so long after a pass.
REST_S = 0.06


@dataclass(frozen=True, slots=True)
class TextBenchOptions:
    """What to measure.

    Args:
        prompts: tokens before the first one that is generated.
        batches: rows, all of a prompt's length.
        rounds: turns of each contender.
        steps: timed tokens in one turn of decoding.
        seed: of the prompts.
    """

    prompts: tuple[int, ...] = (128, 512)
    batches: tuple[int, ...] = (1,)
    _: KW_ONLY
    rounds: int = 10
    steps: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("prompts", "batches"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise IBNormError(f"{name} are {getattr(self, name)}; each must be at least 1")
        if self.rounds < 1 or self.steps < 1:
            raise IBNormError(f"{self.rounds} rounds of {self.steps} steps measure nothing; both must be at least 1")


@dataclass(frozen=True, slots=True)
class Opener:
    """How any process opens a candidate: `function` ("module:name"), called with JSON arguments by name."""

    function: str
    arguments: Mapping[str, Any]

    def __call__(self) -> SessionSource:
        module, _, name = self.function.partition(":")
        source: SessionSource = getattr(importlib.import_module(module), name)(**self.arguments)
        return source


@dataclass(frozen=True, slots=True)
class TextTiming:
    """One contender at one prompt length and batch; latencies in ms, tokens of all rows together."""

    name: str
    prompt: int
    _: KW_ONLY
    batch: int
    first_token_ms: float
    inter_token_p50_ms: float
    inter_token_p90_ms: float
    inter_token_p99_ms: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    peak_memory_mb: float | None


@dataclass(frozen=True, slots=True)
class TextRatio:
    """Time of `name` over time of `against`, in one stage ("first token" or "decode")."""

    name: str
    against: str
    _: KW_ONLY
    stage: str
    prompt: int
    batch: int
    spread: Spread


@dataclass(frozen=True, slots=True)
class TextBenchReport:
    """All contenders at every prompt length and batch; ratios of the first one to each other."""

    threads: int
    options: TextBenchOptions
    _: KW_ONLY
    timings: tuple[TextTiming, ...]
    ratios: tuple[TextRatio, ...]
    environment: Mapping[str, Any]

    def __bool__(self) -> bool:
        return bool(self.timings)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


Times = NDArray[np.float64]


class _Turns:
    """One contender's turns at one prompt and batch."""

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
        """Seconds of each step; of one row at the same context in every turn, of several at a growing one."""
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
        begin = time.perf_counter()
        session.feed(self._tokens)
        return [time.perf_counter() - begin]


def race(
    sources: Sequence[SessionSource], stage: str, *, tokens: NDArray[np.int64], rounds: int, steps: int = 8
) -> list[Times]:
    """Seconds (rounds, steps of a turn) of each contender; the first round is not kept.

    Args:
        sources: that take turns, the order changing from round to round.
        stage: "first token" or "decode".
        tokens: the prompt (batch, n).
        rounds: that are kept.
        steps: of one turn of decoding.
    """
    turns = [_Turns(source, tokens, rounds=rounds + 1, steps=steps) for source in sources]
    times: list[list[list[float]]] = [[] for _ in sources]
    for index in range(rounds + 1):
        order = range(len(turns)) if index % 2 == 0 else reversed(range(len(turns)))
        for which in order:
            if len(turns) > 1:
                time.sleep(REST_S)
            turn = turns[which]
            times[which].append(turn.decode() if stage == "decode" else turn.first_token())
    return [np.array(rows[1:]) for rows in times]


def bench_text(
    contenders: Mapping[str, Opener],
    vocabulary: int,
    *,
    threads: int,
    options: TextBenchOptions | None = None,
    progress: Progress = silent,
) -> TextBenchReport:
    """Measure generation.

    Args:
        contenders: by the name that is reported; the first is what is judged.
        vocabulary: prompts are drawn from it.
        threads: that every contender was set up with (recorded, not set here).
        options: see `TextBenchOptions`.
        progress: called as the work goes on.

    Raises:
        IBNormError: there is nothing to measure, or a contender cannot run a prompt.
    """
    options = TextBenchOptions() if options is None else options
    if not contenders:
        raise IBNormError("nothing to measure: no contender")
    sources = [opener() for opener in contenders.values()]
    names = list(contenders)
    rng = np.random.default_rng(options.seed)
    timings: list[TextTiming] = []
    ratios: list[TextRatio] = []
    cases = [(prompt, batch) for batch in options.batches for prompt in options.prompts]
    for index, (prompt, batch) in enumerate(cases):
        tokens = rng.integers(0, vocabulary, (batch, prompt), dtype=np.int64)
        progress(f"prompt {prompt}, batch {batch}", index, len(cases))
        found = {
            stage: race(sources, stage, tokens=tokens, rounds=options.rounds, steps=options.steps)
            for stage in ("first token", "decode")
        }
        for which, (name, opener) in enumerate(contenders.items()):
            first = float(np.median(found["first token"][which]))
            steps = found["decode"][which].ravel()
            p50, p90, p99 = (float(p) * 1e3 for p in np.percentile(steps, (50, 90, 99)))
            peak = _peak_memory_mb(opener, prompt, batch=batch, steps=options.steps)
            timings.append(
                TextTiming(
                    name,
                    prompt,
                    batch=batch,
                    first_token_ms=first * 1e3,
                    inter_token_p50_ms=p50,
                    inter_token_p90_ms=p90,
                    inter_token_p99_ms=p99,
                    prefill_tokens_per_s=batch * prompt / first,
                    decode_tokens_per_s=batch * len(steps) / float(steps.sum()),
                    peak_memory_mb=peak,
                )
            )
        for stage, times in found.items():
            for which in range(1, len(names)):
                spread = paired(times[0].mean(axis=1).tolist(), times[which].mean(axis=1).tolist())
                ratios.append(TextRatio(names[0], names[which], stage=stage, prompt=prompt, batch=batch, spread=spread))
    progress("measured", len(cases), len(cases))
    return TextBenchReport(threads, options, timings=tuple(timings), ratios=tuple(ratios), environment=environment())


def _peak_memory_mb(opener: Opener, prompt: int, *, batch: int, steps: int) -> float | None:
    """Growth of the peak of a fresh process from before it opens the model to behind the last step; Linux only."""
    if not Path("/proc/self/status").is_file():
        return None
    task = json.dumps([opener.function, opener.arguments, prompt, batch, steps])
    code = "import sys; from ibnorm_export.benchmark.generation import report_memory; report_memory(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, task], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise IBNormError(f"the process that measures memory failed: {last}")
    return float(done.stdout.split()[-1])


def _resident_mb(field: str) -> float:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise IBNormError(f"/proc/self/status has no {field}")


def report_memory(task: str) -> None:
    """Open a contender, run a prompt and its steps, and print what memory they took at most, in MB."""
    function, arguments, prompt, batch, steps = json.loads(task)
    opener = Opener(function, arguments)
    importlib.import_module(function.partition(":")[0])
    before = _resident_mb("VmRSS")
    session = opener().start(batch, prompt + steps + 1)
    session.feed(np.ones((batch, prompt), dtype=np.int64))
    for _ in range(steps + 1):  # a token is chosen first and computed with when the next is asked for
        session.step()
    print(_resident_mb("VmHWM") - before)
