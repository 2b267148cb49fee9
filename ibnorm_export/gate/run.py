"""Run a gate: export, compare and time what check.toml names."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.input_files import read_inputs
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.metadata import Task
from ibnorm_export.artifacts.tensors import default_length
from ibnorm_export.benchmark.baseline import REFERENCE_LOAD, baseline_of, compare_baselines, read_baseline
from ibnorm_export.benchmark.bench import TORCH_CANDIDATES, bench_forward
from ibnorm_export.benchmark.options import BenchOptions, Timing
from ibnorm_export.benchmark.report import BenchReport
from ibnorm_export.benchmark.statistics import Decision, LatencyVerdict, judge, paired
from ibnorm_export.environment import environment
from ibnorm_export.errors import BackendUnavailable, IBNormError
from ibnorm_export.exporter.export import ExportOptions, export
from ibnorm_export.exporter.text_folder import export_folder
from ibnorm_export.gate.config import PRESENT, CheckConfig, ExportCheck, LatencyBudget
from ibnorm_export.gate.report import Case, CheckReport, Outcome, parity_cases
from ibnorm_export.models.loading import load
from ibnorm_export.progress import Progress, silent
from ibnorm_export.runtimes.registry import BACKENDS
from ibnorm_export.verifier.report import ParityReport
from ibnorm_export.verifier.verify import VerifyOptions, verify

__all__ = ["run_check"]

_OUTCOMES = {Decision.PASS: Outcome.PASS, Decision.FAIL: Outcome.FAIL, Decision.CANNOT_TELL: Outcome.CANNOT_TELL}

#: Triton needs an address, so it is never simply present.
_MAY_BE_PRESENT = tuple(name for name in BACKENDS if name != "triton")


def _said(error: Exception) -> str:
    """What a case says of it; an error that nobody raised on purpose is named by its type too."""
    return str(error) if isinstance(error, IBNormError) else f"{type(error).__name__}: {error}"


def _made(asked: ExportCheck, folder: Path, *, progress: Progress) -> tuple[LoadedModel, ExportedModel]:
    model = load(asked.checkpoint, asked.model, task=asked.task)
    if asked.file is not None:
        return model, ExportedModel(asked.file)
    options = ExportOptions(asked.dtype, asked.opset, inline=asked.inline, fuse_skip=asked.fuse_skip)
    if asked.task == "text-generation":
        return model, export_folder(model, folder / asked.name, options=options, progress=progress)
    return model, export(model, folder / f"{asked.name}.onnx", options=options, progress=progress)


def _compared(
    asked: ExportCheck, model: LoadedModel, *, exported: ExportedModel, progress: Progress
) -> Iterator[tuple[str, ParityReport | None, list[Case]]]:
    """(backend, report, cases) of every backend; no report where it cannot run."""
    parity = asked.parity
    static = True
    own = [read_inputs(path, model) for path in parity.inputs] or None
    for named in parity.backends:
        for backend in _MAY_BE_PRESENT if named == PRESENT else (named,):
            options = VerifyOptions(
                backend,
                parity.samples,
                seed=parity.seed,
                static=static,
                kernels=parity.kernels,
                require_fused=parity.require_fused,
                layers=parity.layers,
                exposing=parity.exposing,
            )
            start = time.perf_counter()
            try:
                report = verify(exported, model, options=options, inputs=own, progress=progress)
            except BackendUnavailable as error:
                outcome = Outcome.SKIPPED if named == PRESENT else Outcome.ERROR
                yield backend, None, [Case(f"{asked.name}.{backend}", "backend", outcome=outcome, says=str(error))]
                continue
            except Exception as error:  # noqa: BLE001  # as in `run_check`
                seconds = time.perf_counter() - start
                yield (
                    backend,
                    None,
                    [
                        Case(
                            f"{asked.name}.{backend}",
                            "parity",
                            outcome=Outcome.ERROR,
                            says=_said(error),
                            seconds=seconds,
                        )
                    ],
                )
                continue
            static = False
            seconds = time.perf_counter() - start
            yield (
                backend,
                report,
                parity_cases(asked.name, backend, report=report, max_error=parity.max_error, seconds=seconds),
            )


def _judged(budget: LatencyBudget, race: Callable[[int], BenchReport]) -> tuple[LatencyVerdict, tuple[str, ...]]:
    """The verdict, with more rounds while it cannot tell and more are allowed."""
    report = race(budget.rounds)
    before = None if budget.baseline is None else read_baseline(budget.baseline)
    times = report.latencies[0].round_ms
    beside = report.latencies[1].round_ms if len(report.latencies) > 1 else ()
    while True:
        notes: tuple[str, ...] = ()
        if budget.max_ms is not None:
            verdict = judge(paired(times, [budget.max_ms] * len(times)), 1.0, resolution=0.0)
        elif before is not None:
            now = dataclasses.replace(baseline_of(report), times_ms=times, reference_ms=beside)
            comparison = compare_baselines(before, now, max_ratio=budget.max_ratio)
            verdict, notes = comparison.verdict, comparison.notes
        else:
            verdict = judge(paired(times, beside), budget.max_ratio)
        more = min(verdict.rounds_needed or 0, budget.max_rounds) - len(times)
        if verdict.decision is not Decision.CANNOT_TELL or more < 1:
            return verdict, notes
        report = race(more)
        times += report.latencies[0].round_ms
        beside += report.latencies[1].round_ms if len(report.latencies) > 1 else ()


def _timed(
    asked: ExportCheck, budget: LatencyBudget, *, model: LoadedModel, made: dict[str, ExportedModel], progress: Progress
) -> Case:
    longest = made[asked.name].metadata.max_positions
    if asked.task is Task.TEXT_GENERATION:  # one cached step
        past = budget.sequence or default_length(max(longest - 1, 0))
        sizes = {"batch": budget.batch, "sequence": 1, "past": past, "total": past + 1}
    else:
        sizes = {"batch": budget.batch, "sequence": budget.sequence or default_length(longest)}
    rival = budget.against
    what = (
        f"at most {budget.max_ms:g} ms"
        if budget.max_ms is not None
        else (f"at most {budget.max_ratio:g} times {rival or budget.baseline}")
    )
    suite, start = f"{asked.name}.{budget.backend}.latency", time.perf_counter()
    if rival is not None and rival not in (*TORCH_CANDIDATES, *made):
        return Case(suite, what, outcome=Outcome.SKIPPED, says=f"{rival} was not exported")

    def race(rounds: int) -> BenchReport:
        against = [] if rival is None else [made.get(rival, rival)]
        options = BenchOptions(
            budget.backend, sizes=sizes, threads=budget.threads or None, rounds=rounds, timing=Timing(warmup_ms=200.0)
        )
        return bench_forward(
            made[asked.name],
            model=model,
            against=against if budget.baseline is None else [REFERENCE_LOAD],
            options=options,
            progress=progress,
        )

    try:
        verdict, notes = _judged(budget, race)
    except Exception as error:  # noqa: BLE001  # as in `run_check`
        return Case(suite, what, outcome=Outcome.ERROR, says=_said(error), seconds=time.perf_counter() - start)
    says = "; ".join((str(verdict), *notes))
    return Case(
        suite,
        what,
        outcome=_OUTCOMES[verdict.decision],
        says=says,
        seconds=time.perf_counter() - start,
        figures=verdict.to_dict(),
    )


def run_check(config: CheckConfig, source: str, *, progress: Progress = silent) -> CheckReport:
    """Everything that a file asks for; what fails is a case, and the rest goes on.

    Args:
        config: see `check_config`.
        source: name of its file.
        progress: called as the work goes on.

    Raises:
        IBNormError: the folder of the results cannot be made.
    """
    begin = time.perf_counter()
    try:
        config.results.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise IBNormError(f"cannot make the folder {config.results}: {error.strerror or error}") from error
    cases: list[Case] = []
    parity: dict[str, ParityReport] = {}
    loaded: dict[str, LoadedModel] = {}
    made: dict[str, ExportedModel] = {}
    for asked in config.export:
        start = time.perf_counter()
        try:
            loaded[asked.name], made[asked.name] = _made(asked, config.results, progress=progress)
            exported = made[asked.name]
            says = f"{exported.size_bytes / 1e6:.1f} MB, {exported.dtype}, {len(exported.norms)} norm nodes"
            cases.append(
                Case(asked.name, "export", outcome=Outcome.PASS, says=says, seconds=time.perf_counter() - start)
            )
            for backend, report, found in _compared(asked, loaded[asked.name], exported=exported, progress=progress):
                cases += found
                if report is not None:
                    parity[f"{asked.name}, {backend}"] = report
        # Broad on purpose: whatever one export trips over, a defect of this program too, the others are still checked
        # and the reports written. The case is red, and an interrupt is no Exception.
        except Exception as error:  # noqa: BLE001
            seconds = time.perf_counter() - start
            cases.append(
                Case(asked.name, "export and parity", outcome=Outcome.ERROR, says=_said(error), seconds=seconds)
            )
            made.pop(asked.name, None)
    for asked in config.export:
        for budget in asked.latency if asked.name in made else ():
            cases.append(_timed(asked, budget, model=loaded[asked.name], made=made, progress=progress))
    return CheckReport(
        source, tuple(cases), parity=parity, environment=environment(), seconds=time.perf_counter() - begin
    )
