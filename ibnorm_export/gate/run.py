"""`check`: export, compare and time what a check.toml names, and write the reports."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.metadata import Task
from ibnorm_export.artifacts.npz import read_npz
from ibnorm_export.artifacts.tensors import Arrays
from ibnorm_export.choices import choice
from ibnorm_export.environment import environment
from ibnorm_export.errors import IBNormError
from ibnorm_export.evaluation.report import EvaluationReport
from ibnorm_export.exporter.export import ExportOptions, export
from ibnorm_export.gate.attempt import attempt
from ibnorm_export.gate.case import Case, Outcome
from ibnorm_export.gate.config import CheckConfig, ExportCheck, read_check_config
from ibnorm_export.gate.evaluations import evaluate_export
from ibnorm_export.gate.latency import Prepared, latency_case
from ibnorm_export.gate.parity import compare_on_backends
from ibnorm_export.gate.report import CheckReport
from ibnorm_export.gate.report_files import check_report_files, write_report_files
from ibnorm_export.gate.summary import parity_key
from ibnorm_export.models.loading import load
from ibnorm_export.progress import Progress, silent
from ibnorm_export.verifier.options import InputCoverage
from ibnorm_export.verifier.report import ParityReport

__all__ = ["check"]


def check(
    path_or_config: CheckConfig | str | Path,
    *,
    coverage: InputCoverage | str | None = None,
    progress: Progress = silent,
    on_case: Callable[[Case], None] | None = None,
) -> CheckReport:
    """Do everything that a check.toml requests, and write the reports into its results folder.

    A failure becomes a case of the report, and the rest continues.

    Args:
        path_or_config: the file, or the result of `read_check_config`.
        coverage: "full" or "fast" for every comparison; None takes it from the file.
        progress: receives the progress of the work.
        on_case: called once with each case when it is decided, while the others are still running.

    Returns:
        A report that is true if no case is red; it lists the files that were written.

    Raises:
        ConfigError: the file is missing or not legal.
        IBNormError: there is no such coverage, the results folder cannot be created, a report cannot be written, or a
            file of another kind is in its place.
    """
    config = path_or_config if isinstance(path_or_config, CheckConfig) else read_check_config(path_or_config)
    if coverage is not None:
        config = _with_coverage(config, choice(InputCoverage, coverage, name="coverage"))
    start = time.perf_counter()
    try:
        config.results.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise IBNormError(f"cannot create the folder {config.results}: {error.strerror or error}") from error
    check_report_files(config.results)
    cases = _Cases(on_case)
    parity: dict[str, ParityReport] = {}
    prepared: dict[str, Prepared] = {}
    for entry in config.export:
        with attempt(cases, suite=entry.name, name="export and parity"):
            ready = _prepare(entry, config.results, cases=cases, progress=progress)
            for compared in compare_on_backends(entry, ready.model, exported=ready.exported, progress=progress):
                for case in compared.cases:
                    cases.append(case)
                if compared.report is not None:
                    parity[parity_key(entry.name, compared.backend)] = compared.report
            prepared[entry.name] = ready
    for ready in prepared.values():
        for budget in ready.entry.latency:
            cases.append(latency_case(ready, budget, others=prepared, progress=progress))
    evaluations: dict[str, EvaluationReport] = {}
    for ready in prepared.values():
        for wanted in ready.entry.evaluate:
            evaluated = evaluate_export(ready, wanted, results=config.results / "evaluate", progress=progress)
            cases.append(evaluated.case)
            if evaluated.report is not None:
                evaluations[f"{ready.entry.name}, {evaluated.case.name}"] = evaluated.report
    report = CheckReport(
        "check.toml" if isinstance(path_or_config, CheckConfig) else str(path_or_config),
        tuple(cases),
        parity=parity,
        evaluations=evaluations,
        exported={name: _path_of(ready.exported) for name, ready in prepared.items()},
        environment=environment(),
        seconds=time.perf_counter() - start,
    )
    return write_report_files(report, config.results)


def _path_of(exported: ExportedModel) -> str:
    """The path that other commands take: the folder of a model that generates text, or the file."""
    of_text = exported.metadata.task is Task.TEXT_GENERATION
    return str(exported.path.parent if of_text else exported.path)


class _Cases(list[Case]):
    """Cases that are reported when they are added.

    Args:
        on_case: called with each; None reports nothing.
    """

    def __init__(self, on_case: Callable[[Case], None] | None) -> None:
        super().__init__()
        self._on_case = on_case

    def append(self, case: Case) -> None:
        super().append(case)
        if self._on_case is not None:
            self._on_case(case)


def _with_coverage(config: CheckConfig, coverage: InputCoverage) -> CheckConfig:
    exports = (replace(entry, parity=replace(entry.parity, coverage=coverage)) for entry in config.export)
    return replace(config, export=tuple(exports))


def _prepare(entry: ExportCheck, folder: Path, *, cases: list[Case], progress: Progress) -> Prepared:
    """Load the checkpoint, and export it unless the check names a file."""
    start = time.perf_counter()
    inputs: ExportedModel | Arrays | None = None if entry.file is None else ExportedModel(entry.file)
    if inputs is None and entry.model is not None and entry.parity.inputs:
        inputs = read_npz(entry.parity.inputs[0], "an .npz file of plain arrays")
    model = load(entry.checkpoint, entry.model, task=entry.task, weights=entry.weights, inputs=inputs)
    options = ExportOptions(entry.dtype, entry.opset, inline=entry.inline, fuse_skip=entry.fuse_skip)
    if entry.file is not None:
        exported = ExportedModel(entry.file)
    else:
        name = entry.name if entry.task is Task.TEXT_GENERATION else f"{entry.name}.onnx"
        exported = export(model, folder / name, options=options, progress=progress)
    message = f"{exported.size_bytes / 1e6:.1f} MB, {exported.dtype}, {len(exported.norms)} norm nodes"
    seconds = time.perf_counter() - start
    figures = {"size_bytes": exported.size_bytes}
    cases.append(Case(entry.name, "export", outcome=Outcome.PASS, message=message, seconds=seconds, figures=figures))
    return Prepared(entry, model, exported)
