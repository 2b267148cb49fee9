"""The benchmark of generation: turns, rewinding and arithmetic with known times, and the command."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ibnorm_export.benchmark import generation as text_bench
from ibnorm_export.benchmark.fresh_process import SessionOpener
from ibnorm_export.benchmark.generation import measure_generation, time_stage
from ibnorm_export.benchmark.options import BenchOptions, GenerationOptions
from ibnorm_export.errors import IBNormError
from ibnorm_export.generation.sessions import SessionSource
from tests.support.json_documents import read_document


class Clock:
    """Moves when a session works or rests."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Metronome:
    """Takes 1 ms for each token of a call, and `per_cached` more for each that is in the cache."""

    def __init__(self, clock: Clock, per_cached: float, batch: int, room: int) -> None:
        self.clock, self.per_cached, self.batch, self.room, self.length = clock, per_cached, batch, room, 0
        self.steps = 0

    def feed(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        assert len(tokens) == self.batch
        self.clock.now += 1e-3 * tokens.shape[1] + self.per_cached * self.length
        self.length += tokens.shape[1]
        assert self.length <= self.room
        return np.zeros((self.batch, 5), dtype=np.float32)

    def step(self) -> NDArray[np.integer]:
        self.steps += 1
        self.feed(np.zeros((self.batch, 1), dtype=np.int64))
        return np.zeros(self.batch, dtype=np.int64)

    def rewind(self, length: int) -> None:
        assert self.batch == 1
        self.length = min(length, self.length)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(text_bench, "time", fake)
    return fake


def source(clock: Clock, per_cached: float) -> SessionSource:
    return SessionSource("metronome", lambda batch, room: Metronome(clock, per_cached, batch, room))


def test_every_turn_is_at_the_same_context(clock: Clock) -> None:
    tokens = np.zeros((1, 10), dtype=np.int64)
    slow, fast = time_stage([source(clock, 1e-4), source(clock, 0.0)], "decode", tokens=tokens, rounds=3, steps=2)
    # the cache holds the prompt of 10 and one untimed step: 11, then 12
    np.testing.assert_allclose(slow, [[2.1e-3, 2.2e-3]] * 3)
    np.testing.assert_allclose(fast, [[1e-3, 1e-3]] * 3)
    (first,) = time_stage([source(clock, 1e-4)], "first token", tokens=tokens, rounds=2)
    np.testing.assert_allclose(first, [[10e-3]] * 2)


def test_several_rows_continue_with_their_own_tokens(clock: Clock) -> None:
    begun: list[Metronome] = []

    def start(batch: int, room: int) -> Metronome:
        begun.append(Metronome(clock, 0.0, batch, room))
        return begun[-1]

    time_stage([SessionSource("many", start)], "decode", tokens=np.zeros((3, 4), dtype=np.int64), rounds=2, steps=5)
    assert (begun[0].steps, begun[0].length) == (3 * 6, 4 + 3 * 6)


def opened(per_cached: float) -> SessionSource:
    """For `SessionOpener`; without the fixture the clock is a new one."""
    clock = text_bench.time if isinstance(text_bench.time, Clock) else Clock()
    return source(clock, per_cached)


def test_the_report_adds_up(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_bench, "peak_memory_mb", lambda *_, **__: 12.5)
    candidates = {
        "a": SessionOpener(f"{__name__}:opened", {"per_cached": 0.0}),
        "b": SessionOpener(f"{__name__}:opened", {"per_cached": 1e-4}),
    }
    options = BenchOptions(threads=2, rounds=8, generation=GenerationOptions((10,), (1, 2), steps=4))
    report = measure_generation(candidates, 100, options=options)
    assert [(t.name, t.prompt, t.batch) for t in report.timings] == [(n, 10, b) for b in (1, 2) for n in "ab"]
    a, b, a2, _ = report.timings
    assert (a.first_token_ms, a.prefill_tokens_per_s, a.peak_memory_mb) == pytest.approx((10.0, 1000.0, 12.5))
    assert (a.inter_token_p50_ms, a.decode_tokens_per_s) == pytest.approx((1.0, 1000.0))
    assert (a2.prefill_tokens_per_s, a2.decode_tokens_per_s) == pytest.approx((2000.0, 2000.0))
    assert b.inter_token_p50_ms == pytest.approx(2.25)
    assert b.inter_token_p99_ms == pytest.approx(2.4)
    decode = next(r for r in report.ratios if r.stage == "decode" and r.batch == 1)
    assert (decode.against, decode.spread.ratio) == ("b", pytest.approx(1.0 / 2.25))
    json.dumps(report.to_dict())
    lines = str(report).splitlines()
    assert lines[1].startswith("candidate  prompt  batch  first token ms")
    assert len(lines) == 2 + 4 + 4
    assert lines[-4].startswith("first token, prompt of 10, batch of 1: time over time of b: 1.00")


@pytest.mark.parametrize("values", [{"prompts": ()}, {"batches": (0,)}, {"steps": 0}])
def test_nothing_to_measure_is_rejected(values: dict[str, Any]) -> None:
    with pytest.raises(IBNormError, match=next(iter(values))):
        GenerationOptions(**values)
    with pytest.raises(IBNormError, match="rounds is 0"):
        BenchOptions(rounds=0)


def test_the_command_measures_every_form(genai_checkpoint: Path, text_folder: Callable[[str], Path]) -> None:
    folders = [text_folder("portable"), genai_checkpoint, text_folder("genai-function")]
    code = "from ibnorm_export.cli.__main__ import run; run()"
    command = [
        sys.executable,
        "-c",
        code,
        "bench",
        str(folders[0]),
        "--checkpoint",
        str(folders[1]),
        "--prompts",
        "12",
        "--batches",
        "1,2",
        "--rounds",
        "2",
        "--threads",
        "1",
        "--against",
    ]
    done = subprocess.run([*command, f"torch,{folders[2]}", "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = read_document(done.stdout, "bench")
    assert [t["name"].rpartition("/")[2] for t in found["timings"]] == [folders[0].name, "torch", folders[2].name] * 2
    assert all(1.0 < t["peak_memory_mb"] < 3000.0 for t in found["timings"])
    assert all(t["first_token_ms"] > 0.0 and t["decode_tokens_per_s"] > 0.0 for t in found["timings"])
    stages = [(stage, batch) for batch in (1, 2) for stage in ("first token", "decode") for _ in range(2)]
    assert [(r["stage"], r["batch"]) for r in found["ratios"]] == stages
    bad = subprocess.run([*command, "nothing"], capture_output=True, text=True, check=False)
    assert bad.returncode == 2
    assert "neither torch nor a folder" in bad.stderr
