"""Results of `bench`: latency of one pass, and speed of text generation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field
from typing import Any, Final

from ibnorm_export.benchmark.loading import LOADING_COLUMNS, Loading
from ibnorm_export.benchmark.options import GenerationOptions
from ibnorm_export.benchmark.statistics import Spread
from ibnorm_export.runtimes.norm_executions import NormExecution, norms_summary
from ibnorm_export.text_report import Report, counted, ratio_text, text_table, three_digits

__all__ = [
    "LATENCY_COLUMNS",
    "BenchReport",
    "GenerationRatio",
    "GenerationReport",
    "GenerationTiming",
    "Latency",
    "Ratio",
    "loading_rows",
    "speed_up",
]

#: Heads of the table of latencies.
LATENCY_COLUMNS: Final = ("candidate", "p50 ms", "p90 ms", "p99 ms", "samples/s", "passes")


def speed_up(ratio: Ratio) -> str:
    """A ratio of times in words, e.g. "4.20 times faster (3.90 to 4.40)", with the middle half of the rounds."""
    faster = ratio.median <= 1.0
    values = (ratio.median, ratio.p75, ratio.p25) if faster else (ratio.median, ratio.p25, ratio.p75)
    shown = [three_digits(1.0 / value if faster and value else value) for value in values]
    return f"{shown[0]} times {'faster' if faster else 'slower'} ({shown[1]} to {shown[2]})"


def loading_rows(loadings: Sequence[Loading]) -> list[tuple[str, ...]]:
    """The rows of the table of loading."""
    return [
        (
            x.name,
            *map(three_digits, (x.session_ms, x.first_pass_ms)),
            *("" if mb is None else f"{mb:.0f}" for mb in (x.held_mb, x.peak_mb)),
        )
        for x in loadings
    ]


@dataclass(frozen=True, slots=True)
class Latency:
    """Times of one candidate, in ms: percentiles of single passes, and the median of each round.

    Args:
        name: the candidate.
        passes: number of timed passes.
        p50_ms, p90_ms, p99_ms: percentiles of the passes.
        throughput_per_s: samples per second at the median.
        round_ms: median of each round.
        variation: coefficient of variation of the passes: standard deviation over mean.
    """

    name: str
    passes: int
    _: KW_ONLY
    p50_ms: float
    p90_ms: float
    p99_ms: float
    throughput_per_s: float
    round_ms: tuple[float, ...] = ()
    variation: float = 0.0


@dataclass(frozen=True, slots=True)
class Ratio:
    """Time of one candidate over that of another, in the same rounds. Below 1 is faster.

    Args:
        name: the candidate.
        against: the other one.
        median: median of the ratio over rounds.
        p25, p75: quartiles of the ratio over rounds.
    """

    name: str
    against: str
    _: KW_ONLY
    median: float
    p25: float
    p75: float


@dataclass(frozen=True, slots=True)
class BenchReport(Report):
    """Latency of all candidates on the same inputs, and the ratio of the first candidate to each other one.

    Args:
        inputs: shapes by name.
        batch: samples in one pass.
        threads, rounds: number of threads and of rounds of each candidate.
        latencies, ratios: in the order of the candidates.
        environment: machine and package versions.
        model: the file that was measured.
        norms: how each norm of the first candidate ran.
        warnings: why the times may not be reliable.
        require_fused: whether the report fails unless every norm ran as a fused kernel.
        precision: type of the file's activations and, if they are quantised, of its weights.
        input_types: element type of each input, by name.
        loading: what it takes to load the file, if that was measured.
    """

    inputs: Mapping[str, tuple[int, ...]]
    batch: int
    _: KW_ONLY
    threads: int
    rounds: int
    latencies: tuple[Latency, ...]
    ratios: tuple[Ratio, ...]
    environment: Mapping[str, Any]
    model: str = ""
    norms: tuple[NormExecution, ...] = ()
    warnings: tuple[str, ...] = ()
    require_fused: bool = False
    precision: str = ""
    input_types: Mapping[str, str] = field(default_factory=dict)
    loading: tuple[Loading, ...] = ()

    @property
    def kernels(self) -> str:
        """How the norms of the first candidate ran: "fused", "function", or "mixed"; empty if that is unknown."""
        found = {"function" if norm.problem else "fused" for norm in self.norms}
        return "mixed" if len(found) > 1 else next(iter(found), "")

    @property
    def all_fused(self) -> bool:
        """Whether every norm of the first candidate is known to have run fused, on its device, without a copy."""
        return bool(self.norms) and all(not norm.problem for norm in self.norms)

    def __bool__(self) -> bool:
        return bool(self.latencies) and (self.all_fused or not self.require_fused)

    def __str__(self) -> str:
        shapes = ", ".join(f"{name} {list(shape)}" for name, shape in self.inputs.items())
        title = f"{self.model}: {shapes}, {counted(self.threads, 'thread')}"
        rows = [
            (x.name, *map(three_digits, (x.p50_ms, x.p90_ms, x.p99_ms, x.throughput_per_s)), str(x.passes))
            for x in self.latencies
        ]
        lines = [text_table(title, LATENCY_COLUMNS, rows=rows)]
        if self.loading:
            lines.append(text_table("in a fresh process", LOADING_COLUMNS, rows=loading_rows(self.loading)))
        if "processor" in self.environment:
            lines.append(
                f"machine: {self.environment['processor']}, {self.environment.get('usable_cores')} usable cores"
            )
        if self.norms:
            lines.append(norms_summary(self.norms))
        lines += [f"warning: {warning}" for warning in self.warnings]
        lines += [
            f"{r.name} is {speed_up(r)} than {r.against}; the range is the middle half of "
            f"{counted(self.rounds, 'round')}"
            for r in self.ratios
        ]
        if self.require_fused:
            lines += [f"FAIL {norm.module}: {norm.problem}" for norm in self.norms if norm.problem]
            if not self.norms:
                lines.append("FAIL: it is not known whether a norm ran as a fused kernel")
            lines.append(f"verdict: {'pass' if self else 'fail'}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, with every input as an object."""
        content = asdict(self)
        types = content.pop("input_types")
        content["inputs"] = [
            {"name": name, "dtype": types.get(name), "shape": list(shape)} for name, shape in self.inputs.items()
        ]
        return {"verdict": "pass" if self else "fail", **content}


@dataclass(frozen=True, slots=True)
class GenerationTiming:
    """One candidate at one length of the prompt and one batch size.

    Args:
        name: the candidate.
        prompt: tokens of the prompt.
        batch: number of rows.
        first_token_ms: median time to the first token, in ms.
        inter_token_p50_ms, inter_token_p90_ms, inter_token_p99_ms: percentiles of the time between tokens, in ms.
        prefill_tokens_per_s: tokens of the prompt per second, of all rows together.
        decode_tokens_per_s: generated tokens per second, of all rows together.
        peak_memory_mb: largest memory of the process, in MB; None if it was not measured.
    """

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
class GenerationRatio:
    """Time of one candidate over that of another in one stage. Below 1 is faster.

    Args:
        name: the candidate.
        against: the other one.
        stage: "first token" or "decode".
        prompt: tokens of the prompt.
        batch: number of rows.
        spread: the ratio and its interval.
    """

    name: str
    against: str
    _: KW_ONLY
    stage: str
    prompt: int
    batch: int
    spread: Spread


_GENERATION_COLUMNS = (
    "candidate",
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


@dataclass(frozen=True, slots=True)
class GenerationReport(Report):
    """All candidates at every prompt length and batch, and the ratios of the first candidate to each other one.

    Args:
        model: the model that was measured.
        options: prompts, batches and steps that were timed.
        threads, rounds: number of threads and of rounds of each candidate.
        timings: each candidate at each prompt length and batch.
        ratios: the first candidate against each other one.
        environment: machine and package versions.
    """

    model: str
    options: GenerationOptions
    _: KW_ONLY
    threads: int
    rounds: int
    timings: tuple[GenerationTiming, ...]
    ratios: tuple[GenerationRatio, ...]
    environment: Mapping[str, Any]

    def __bool__(self) -> bool:
        return bool(self.timings)

    def __str__(self) -> str:
        rows = [
            (
                t.name,
                str(t.prompt),
                str(t.batch),
                three_digits(t.first_token_ms),
                three_digits(t.inter_token_p50_ms),
                three_digits(t.inter_token_p90_ms),
                three_digits(t.inter_token_p99_ms),
                three_digits(t.prefill_tokens_per_s),
                three_digits(t.decode_tokens_per_s),
                "" if t.peak_memory_mb is None else f"{t.peak_memory_mb:.0f}",
            )
            for t in self.timings
        ]
        table = text_table(f"{self.model}: {counted(self.threads, 'thread')}", _GENERATION_COLUMNS, rows=rows)
        ratios = [
            f"{r.stage}, prompt of {r.prompt}, batch of {r.batch}: time over time of {r.against}: "
            f"{ratio_text(r.spread.ratio)} ({r.spread.text()}; below 1 is faster)"
            for r in self.ratios
        ]
        return "\n".join((table, *ratios))

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"verdict": "pass" if self else "fail", **asdict(self)}
