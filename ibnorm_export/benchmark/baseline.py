"""A baseline: saved times of a model, to compare with times that are measured on another day.

The speed of a machine changes from day to day. So each round also times the reference load, a fixed matrix product
with the same number of threads, and what is compared is the time of the model over the time of the reference load.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from ibnorm_export.benchmark.options import Difference
from ibnorm_export.benchmark.report import BenchReport
from ibnorm_export.benchmark.statistics import Decision, LatencyVerdict, judge, unpaired
from ibnorm_export.choices import choice
from ibnorm_export.errors import IBNormError, ModelFileError, quoted, shortened
from ibnorm_export.files import Kind, new_file
from ibnorm_export.findings.code import FindingCode
from ibnorm_export.parsing import parse_json, read_text
from ibnorm_export.runtimes.runner import Backend
from ibnorm_export.text_report import Report, text_table, three_digits

__all__ = [
    "REFERENCE_LOAD",
    "Baseline",
    "BaselineComparison",
    "baseline_of",
    "compare_baselines",
    "read_baseline",
    "write_baseline",
]

#: Name of the reference load among the candidates of a benchmark.
REFERENCE_LOAD: Final = "reference-load"

_FORMAT: Final = 3
_OLDER_FORMATS: Final = (1, 2)


#: The packages whose versions decide how fast a backend is.
_RUNTIMES: Final[Mapping[str, tuple[str, ...]]] = {
    Backend.ORT_CPU: ("onnxruntime", "onnxruntime-gpu"),
    Backend.ORT_CUDA: ("onnxruntime-gpu",),
    Backend.TENSORRT: ("tensorrt",),
    Backend.TENSORRT_RTX: ("tensorrt-rtx",),
    Backend.OPENVINO: ("openvino",),
    Backend.REFERENCE: ("onnx",),
}


@dataclass(frozen=True, slots=True)
class Baseline:
    """Times of one model and of the reference load, in ms, one per round.

    Args:
        model: the file that was measured.
        backend: what ran it.
        inputs: shapes by name.
        threads: number of threads of the model and of the reference load.
        times_ms, reference_ms: medians of the rounds.
        environment: machine and package versions.
        precision, kernels: types of the model, and how its norms ran; empty if that was not recorded.
    """

    model: str
    backend: str
    _: KW_ONLY
    inputs: Mapping[str, Sequence[int]]
    threads: int
    times_ms: tuple[float, ...]
    reference_ms: tuple[float, ...]
    environment: Mapping[str, Any]
    precision: str = ""
    kernels: str = ""

    @property
    def ratios(self) -> tuple[float, ...]:
        """Time over the time of the reference load, round by round."""
        return tuple(a / b for a, b in zip(self.times_ms, self.reference_ms, strict=True))


def baseline_of(report: BenchReport) -> Baseline:
    """The baseline of a benchmark whose candidates include the reference load.

    Raises:
        IBNormError: the reference load was not measured.
    """
    reference = next((latency for latency in report.latencies if latency.name == REFERENCE_LOAD), None)
    if reference is None:
        raise IBNormError(
            f"a baseline needs {REFERENCE_LOAD!r} among the candidates: run `ibnorm-export bench --save-baseline`, or "
            f"bench(..., against=[{REFERENCE_LOAD!r}])"
        )
    first = report.latencies[0]
    return Baseline(
        report.model,
        first.name,
        inputs=report.inputs,
        threads=report.threads,
        times_ms=first.round_ms,
        reference_ms=reference.round_ms,
        environment=report.environment,
        precision=report.precision,
        kernels=report.kernels,
    )


def write_baseline(baseline: Baseline, path: str | Path) -> Path:
    """Write a baseline as JSON, whole or not at all.

    Raises:
        IBNormError: the file cannot be written, or would replace a file of another kind.
    """
    path = Path(path)
    with new_file(path, IBNormError, kind=Kind("a baseline", _is_baseline)) as folder:
        text = json.dumps({"format": _FORMAT, **asdict(baseline)}, indent=1)
        (folder / path.name).write_text(f"{text}\n", encoding="utf-8")
    return path


def _require_types(baseline: Baseline) -> None:
    shapes = baseline.inputs.values() if isinstance(baseline.inputs, dict) else (None,)
    legal = {
        "model": isinstance(baseline.model, str),
        "backend": isinstance(baseline.backend, str),
        "inputs": all(isinstance(s, list) and all(isinstance(size, int) for size in s) for s in shapes),
        "threads": isinstance(baseline.threads, int),
        "environment": isinstance(baseline.environment, dict),
        "precision": isinstance(baseline.precision, str),
        "kernels": isinstance(baseline.kernels, str),
    }
    wrong = [name for name, holds in legal.items() if not holds]
    if wrong:
        raise TypeError(f"wrong type: {', '.join(wrong)}")


def _parse(text: str) -> Baseline:
    """Read a baseline from JSON text; raise one of several built-in errors if the text is not a baseline."""
    content = parse_json(text)
    if not isinstance(content, dict):
        raise TypeError("it does not hold a JSON object")
    if (found := content.pop("format")) not in (*_OLDER_FORMATS, _FORMAT):
        raise ValueError(f"its format is {quoted(found)}; this version reads formats 1 to {_FORMAT}")
    if found == 1:
        content["reference_ms"] = content.pop("yardstick_ms")  # its name in format 1
    baseline = Baseline(**content)
    _require_types(baseline)
    times, reference = (tuple(float(v) for v in values) for values in (baseline.times_ms, baseline.reference_ms))
    if not times or len(times) != len(reference) or not all(0.0 < v < float("inf") for v in (*times, *reference)):
        raise ValueError("times_ms and reference_ms must each hold one positive time per round")
    return replace(baseline, times_ms=times, reference_ms=reference)


def read_baseline(path: str | Path) -> Baseline:
    """Read a file that `write_baseline` wrote.

    Raises:
        ModelFileError: the file is missing, damaged, or not a baseline.
    """
    try:
        return _parse(read_text(Path(path)))
    except FileNotFoundError as error:
        raise ModelFileError(f"{path} does not exist; write it with `ibnorm-export bench --save-baseline`") from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise ModelFileError(
            f"{path} is not a baseline of `ibnorm-export bench --save-baseline`: {shortened(str(error))}"
        ) from error


def _is_baseline(path: Path) -> bool:
    try:
        read_baseline(path)
    except ModelFileError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class BaselineComparison(Report):
    """Two baselines, A and B, and whether B is slower; `notes` are differences other than time."""

    before: Baseline
    after: Baseline
    _: KW_ONLY
    verdict: LatencyVerdict
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.verdict)

    @property
    def decided(self) -> bool:
        """Whether the rounds were enough to tell a pass from a failure."""
        return self.verdict.decision is not Decision.CANNOT_TELL

    def __str__(self) -> str:
        rows = [
            (
                f"{letter}: {baseline.model}",
                three_digits(float(np.median(baseline.times_ms))),
                three_digits(float(np.median(baseline.ratios))),
                str(len(baseline.times_ms)),
            )
            for letter, baseline in (("A", self.before), ("B", self.after))
        ]
        table = text_table("", ("baseline", "median ms", "median over reference load", "rounds"), rows=rows)
        return "\n".join((table, *(f"note: {note}" for note in self.notes), f"B over A: {self.verdict}"))

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"verdict": self.verdict.decision.value, **self.verdict.to_dict(), "notes": self.notes}


def compare_baselines(
    before: Baseline | str | Path,
    after: Baseline | str | Path,
    *,
    max_ratio: float = 1.0,
    allow: Sequence[Difference | str] = (),
) -> BaselineComparison:
    """Decide whether B (`after`) is slower than A (`before`).

    Args:
        before, after: baselines or their files.
        max_ratio: the largest ratio of B to A that passes.
        allow: differences that do not keep the two from being compared; each that is found becomes a note.

    Raises:
        ModelFileError: a file is missing, damaged, or not a baseline.
        IBNormError: the two were not measured under the same conditions; the message names each and what to do.
    """
    a, b = (baseline if isinstance(baseline, Baseline) else read_baseline(baseline) for baseline in (before, after))
    allowed = {choice(Difference, name, name="allow") for name in ([allow] if isinstance(allow, str) else allow)}
    found = _differences(a, b)
    if refused := [difference for difference in found if difference not in allowed]:
        lines = "; ".join(f"{difference}: {found[difference][0]} ({found[difference][1]})" for difference in refused)
        raise IBNormError(
            f"A and B are not comparable. {lines}. If a difference is what you measure, allow it: "
            f"--allow {','.join(refused)}"
        )
    code = FindingCode.CONDITIONS_DIFFER
    notes = [f"{difference} differs: {what} [{code}]" for difference, (what, _) in found.items()]
    notes += [
        f"{name} does not record its precision and kernels: a newer version writes them"
        for name, baseline in (("A", a), ("B", b))
        if not baseline.precision
    ]
    if a.environment.get("packages") != b.environment.get("packages") and Difference.RUNTIME not in found:
        notes.append(f"the versions of other packages differ [{code}]")
    return BaselineComparison(a, b, verdict=judge(unpaired(b.ratios, a.ratios), max_ratio), notes=tuple(notes))


def _runtime(baseline: Baseline) -> dict[str, Any]:
    """Versions of the packages that may have run a baseline's model."""
    packages = baseline.environment.get("packages")
    names = _RUNTIMES.get(baseline.backend, ())
    return {name: packages[name] for name in names if isinstance(packages, dict) and name in packages}


def _differences(a: Baseline, b: Baseline) -> dict[Difference, tuple[str, str]]:
    """What makes times of `a` and `b` incomparable: the values of both, and what to do about it."""

    def both(one: object, other: object) -> str:
        return f"{shortened(str(one))} in A, {shortened(str(other))} in B"

    found: dict[Difference, tuple[str, str]] = {}
    shapes_a, shapes_b = ({name: list(shape) for name, shape in x.inputs.items()} for x in (a, b))
    if shapes_a != shapes_b:
        found[Difference.INPUTS] = both(shapes_a, shapes_b), "measure B with the --batch and --seq of A"
    if a.backend != b.backend:
        found[Difference.BACKEND] = both(a.backend, b.backend), f"measure B with --backend {shortened(a.backend)}"
    if a.threads != b.threads:
        found[Difference.THREADS] = both(a.threads, b.threads), f"measure B with --threads {a.threads}"
    if a.precision and b.precision and a.precision != b.precision:
        remedy = "measure both files together: bench B.onnx --against A.onnx"
        found[Difference.PRECISION] = both(a.precision, b.precision), remedy
    if a.kernels and b.kernels and a.kernels != b.kernels:
        found[Difference.KERNELS] = both(a.kernels, b.kernels), "measure both with the same --kernels"
    machines = [x.environment.get("processor") for x in (a, b)]
    if machines[0] != machines[1]:
        remedy = "measure both on one machine: the reference load corrects only for the speed of one processor"
        found[Difference.PROCESSOR] = both(*machines), remedy
    versions = [_runtime(x) for x in (a, b)]
    if versions[0] != versions[1] and a.backend == b.backend:
        found[Difference.RUNTIME] = both(*versions), "measure A again with the version that is installed now"
    return found
