"""Latency budgets: judged by their rounds, with more rounds until they decide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ibnorm_export import models
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.benchmark.report import BenchReport, Latency
from ibnorm_export.gate import latency
from ibnorm_export.gate.case import Outcome
from ibnorm_export.gate.config import ExportCheck, LatencyBudget, read_check_config
from ibnorm_export.gate.latency import Prepared, latency_case
from ibnorm_export.gate.report import CheckReport
from ibnorm_export.gate.run import check


def of_rounds(name: str, times: list[float]) -> Latency:
    return Latency(name, 1, p50_ms=1.0, p90_ms=1.0, p99_ms=1.0, throughput_per_s=1.0, round_ms=tuple(times))


@pytest.mark.parametrize(
    ("times", "other_times", "limit", "outcome"),
    [
        ([10.0] * 20, [10.0] * 20, 1.0, Outcome.PASS),
        ([12.0] * 20, [10.0] * 20, 1.0, Outcome.FAIL),
        ([5.0 * 1.0757**n for n in range(20)], [10.0] * 20, 1.0, Outcome.CANNOT_TELL),
        ([12.0] * 20, [10.0] * 20, 1.5, Outcome.PASS),
    ],
)
def test_a_budget_is_judged_by_its_rounds(
    vit_checkpoint: Path,
    exported_vit: ExportedModel,
    monkeypatch: pytest.MonkeyPatch,
    times: list[float],
    other_times: list[float],
    limit: float,
    outcome: Outcome,
) -> None:
    calls: list[int] = []

    def bench_forward(*_: Any, **__: Any) -> BenchReport:
        calls.append(1)
        latencies = (of_rounds("a", times), of_rounds("b", other_times))
        return BenchReport({}, 1, threads=1, rounds=len(times), latencies=latencies, ratios=(), environment={})

    monkeypatch.setattr(latency, "bench_forward", bench_forward)
    budget = LatencyBudget(against="torch", max_ratio=limit, max_rounds=60)
    prepared = Prepared(ExportCheck("vit", vit_checkpoint), models.load(vit_checkpoint), exported_vit)
    case = latency_case(prepared, budget, others={"vit": prepared})
    assert case.outcome is outcome, case.message
    assert (len(calls) > 1) == (outcome is Outcome.CANNOT_TELL)
    report = CheckReport("c", (case,), parity={}, environment={}, seconds=0.0)
    assert report.passed == (outcome is not Outcome.FAIL)
    assert str(case).count("[IBN") == (outcome is not Outcome.PASS)  # the code is there once
    assert "[IBN" not in case.message  # reports have it in a column


def test_a_comparison_with_a_missing_export_is_skipped(vit_checkpoint: Path, exported_vit: ExportedModel) -> None:
    prepared = Prepared(ExportCheck("vit", vit_checkpoint), models.load(vit_checkpoint), exported_vit)
    case = latency_case(prepared, LatencyBudget(against="other"), others={"vit": prepared})
    assert (case.outcome, case.message) == (Outcome.SKIPPED, "other was not exported")


def test_the_default_sequence_is_no_longer_than_the_positions(
    llama_checkpoint: Path, exported_llama: ExportedModel, tmp_path: Path
) -> None:
    """The default is 128 tokens, and this model has 64 positions."""
    path = tmp_path / "check.toml"
    path.write_text(
        f'[[export]]\nname = "m"\ncheckpoint = "{llama_checkpoint}"\nfile = "{exported_llama.path}"\n'
        "parity = {layers = false, stress = false, samples = 1}\n"
        "[[export.latency]]\nmax_ms = 60000\nrounds = 2\n"
        "[[export.latency]]\nmax_ms = 60001\nrounds = 2\nsequence = 65\n",
        encoding="utf-8",
    )
    report = check(read_check_config(path))
    default, beyond = (case for case in report.cases if case.suite.endswith("latency"))
    assert default.outcome is not Outcome.ERROR
    assert "has 64 positions, fewer than a sequence of 65" in beyond.message
