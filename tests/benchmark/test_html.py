"""The page of a benchmark: ratios in words, a verdict only where fused kernels were demanded."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from ibnorm_export.benchmark.html import speed_up, write_bench
from ibnorm_export.benchmark.loading import Loading
from ibnorm_export.benchmark.options import GenerationOptions
from ibnorm_export.benchmark.report import (
    BenchReport,
    GenerationRatio,
    GenerationReport,
    GenerationTiming,
    Latency,
    Ratio,
)
from ibnorm_export.benchmark.statistics import Spread

pytest.importorskip("matplotlib", reason="the extra `plots` is not installed")


def report(*, require_fused: bool) -> BenchReport:
    times = {"p50_ms": 1.0, "p90_ms": 2.0, "p99_ms": 3.0, "throughput_per_s": 1000.0, "round_ms": (1.0, 1.1)}
    return BenchReport(
        {"x": (1, 2)},
        1,
        threads=1,
        rounds=2,
        latencies=(Latency("ort-cpu", 9, **times), Latency("torch", 9, **times)),  # type: ignore[arg-type]  # floats and a tuple
        ratios=(Ratio("ort-cpu", "torch", median=0.25, p25=0.2, p75=0.5),),
        environment={},
        model="m.onnx",
        require_fused=require_fused,
    )


@pytest.mark.parametrize(
    ("median", "p25", "p75", "words"),
    [
        (0.25, 0.2, 0.5, "4.00 times faster (2.00 to 5.00)"),
        (2.0, 1.5, 2.5, "2.00 times slower (1.50 to 2.50)"),
        (1.0, 0.9, 1.25, "1.00 times faster (0.800 to 1.11)"),
    ],
)
def test_a_ratio_in_words(median: float, p25: float, p75: float, words: str) -> None:
    assert speed_up(Ratio("a", "b", median=median, p25=p25, p75=p75)) == words


def test_a_benchmark_judges_nothing_unless_fused_kernels_were_demanded(tmp_path: Path) -> None:
    text = write_bench(report(require_fused=False), tmp_path / "b.html").read_text(encoding="utf-8")
    assert 'class="verdict' not in text
    assert "ort-cpu is 4.00 times faster (2.00 to 5.00) than torch." in text
    assert text.count("<svg") == 1
    text = write_bench(report(require_fused=True), tmp_path / "b.html").read_text(encoding="utf-8")
    assert 'class="verdict fail"' in text
    assert "It is not known whether a norm ran as a fused kernel." in text


def test_loading_has_its_own_table(tmp_path: Path) -> None:
    loading = Loading("ort-cpu", True, session_ms=12.34, first_pass_ms=5.678, held_mb=90.1, peak_mb=None)
    measured = replace(report(require_fused=False), loading=(loading,))
    text = write_bench(measured, tmp_path / "b.html").read_text(encoding="utf-8")
    for shown in ("Loading", "session ms", "12.3", "5.68", "90"):
        assert shown in text
    assert "session ms" not in write_bench(report(require_fused=False), tmp_path / "b.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0.2, 0.5, "4.00 times faster (2.00 to 5.00)"),
        (0.0, math.inf, "4.00 times faster (5 rounds, too few for an interval)"),
    ],
)
def test_generation_has_an_interval_only_where_the_rounds_give_one(
    tmp_path: Path, low: float, high: float, words: str
) -> None:
    times = dict.fromkeys(("first_token_ms", "inter_token_p50_ms", "inter_token_p90_ms", "inter_token_p99_ms"), 1.0)
    rates = {"prefill_tokens_per_s": 9.0, "decode_tokens_per_s": 9.0, "peak_memory_mb": None}
    measured = GenerationReport(
        "llama",
        GenerationOptions((32,), (1,)),
        threads=1,
        rounds=5,
        timings=tuple(GenerationTiming(name, 32, batch=1, **times, **rates) for name in ("llama", "torch")),  # type: ignore[arg-type]  # floats
        ratios=(
            GenerationRatio("llama", "torch", stage="decode", prompt=32, batch=1, spread=Spread(0.25, low, high, 5)),
        ),
        environment={},
    )
    assert words in write_bench(measured, tmp_path / "b.html").read_text(encoding="utf-8")
