"""A benchmark kept for later: times of a model beside a yardstick, round by round, so that days can be compared.

The machine of tomorrow is not that of today, even where it is the same: so what is kept is the time
over that of a fixed matrix product, run in the same rounds with the same threads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from ibnorm_export.benchmark.measure import BenchReport
from ibnorm_export.benchmark.statistics import LatencyVerdict, judge, unpaired
from ibnorm_export.errors import IBNormError, ModelFileError
from ibnorm_export.files import new_file

__all__ = ["YARDSTICK", "Baseline", "baseline_of", "compare", "read_baseline", "write_baseline"]

#: What the times of `ibnorm_export.benchmark.reference_load` are called in a report.
YARDSTICK: Final = "yardstick"

_FORMAT: Final = 1


@dataclass(frozen=True, slots=True)
class Baseline:
    """Times of one model and of the yardstick, in ms, one a round."""

    model: str
    backend: str
    _: KW_ONLY
    inputs: Mapping[str, Sequence[int]]
    threads: int
    times_ms: tuple[float, ...]
    yardstick_ms: tuple[float, ...]
    environment: Mapping[str, Any]

    @property
    def ratios(self) -> tuple[float, ...]:
        """Time over the yardstick's, round by round."""
        return tuple(a / b for a, b in zip(self.times_ms, self.yardstick_ms, strict=True))


def baseline_of(model: str, report: BenchReport) -> Baseline:
    """What a benchmark with the yardstick among its contenders says of its first one.

    Raises:
        IBNormError: the yardstick was not measured.
    """
    beside = next((latency for latency in report.latencies if latency.name == YARDSTICK), None)
    if beside is None:
        raise IBNormError("a baseline needs the yardstick among the contenders; run bench with --save-baseline")
    first = report.latencies[0]
    return Baseline(
        model,
        first.name,
        inputs=report.inputs,
        threads=report.threads,
        times_ms=first.round_ms,
        yardstick_ms=beside.round_ms,
        environment=report.environment,
    )


def write_baseline(baseline: Baseline, path: str | Path) -> Path:
    """Write it as JSON, whole or not at all."""
    path = Path(path)
    with new_file(path, IBNormError) as folder:
        text = json.dumps({"format": _FORMAT, **asdict(baseline)}, indent=1)
        (folder / path.name).write_text(f"{text}\n", encoding="utf-8")
    return path


def _demand_types(found: Baseline) -> None:
    shapes = found.inputs.values() if isinstance(found.inputs, dict) else (None,)
    legal = {
        "model": isinstance(found.model, str),
        "backend": isinstance(found.backend, str),
        "inputs": all(isinstance(s, list) and all(isinstance(size, int) for size in s) for s in shapes),
        "threads": isinstance(found.threads, int),
        "environment": isinstance(found.environment, dict),
    }
    wrong = [name for name, holds in legal.items() if not holds]
    if wrong:
        raise TypeError(f"{', '.join(wrong)}: of another type than `bench` writes")


def read_baseline(path: str | Path) -> Baseline:
    """Read what `write_baseline` wrote.

    Raises:
        ModelFileError: the file is missing or is no baseline.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise TypeError("it holds no JSON object")
        if found.pop("format") != _FORMAT:
            raise ValueError(f"its format is not {_FORMAT}")
        made = Baseline(**found)
        _demand_types(made)
        times, beside = (tuple(float(v) for v in values) for values in (made.times_ms, made.yardstick_ms))
        sound = np.array([times, beside]) if len(times) == len(beside) else np.zeros(1)
        if not times or not bool(np.all(np.isfinite(sound) & (sound > 0.0))):
            raise ValueError("its rounds are not pairs of positive times")
    except FileNotFoundError as error:
        raise ModelFileError(f"{path} does not exist; write it with `ibnorm-export bench --save-baseline`") from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise ModelFileError(f"{path} is not a baseline of `ibnorm-export bench --save-baseline`: {error}") from error
    return Baseline(
        made.model,
        made.backend,
        inputs=made.inputs,
        threads=made.threads,
        times_ms=times,
        yardstick_ms=beside,
        environment=made.environment,
    )


def compare(now: Baseline, before: Baseline, *, budget: float = 1.0) -> tuple[LatencyVerdict, tuple[str, ...]]:
    """Whether `now` is slower than `before`, and what makes the two differ in more than time."""
    notes = []
    if dict(now.inputs) != {k: tuple(v) for k, v in before.inputs.items()} and now.inputs != before.inputs:
        notes.append(f"inputs differ: {dict(now.inputs)} now, {dict(before.inputs)} before")
    if now.threads != before.threads:
        notes.append(f"threads differ: {now.threads} now, {before.threads} before")
    for key in ("processor", "packages"):
        if now.environment.get(key) != before.environment.get(key):
            notes.append(f"{key} differ: the yardstick cancels the machine's speed, not its kind")
    return judge(unpaired(now.ratios, before.ratios), budget), tuple(notes)
