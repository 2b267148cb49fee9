"""Compare an export with its checkpoint on every backend that a check names, and turn the reports into cases."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.input_files import read_inputs
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.tensors import Arrays
from ibnorm_export.errors import BackendUnavailable
from ibnorm_export.findings.code import FindingCode
from ibnorm_export.gate.attempt import attempt
from ibnorm_export.gate.case import Case, Outcome
from ibnorm_export.gate.config import PRESENT, ExportCheck
from ibnorm_export.gate.step_times import StepTimes
from ibnorm_export.progress import Progress
from ibnorm_export.runtimes.registry import BACKENDS
from ibnorm_export.runtimes.runner import Backend
from ibnorm_export.verifier.checkpoint.samples import FAST_LEAVES_OUT
from ibnorm_export.verifier.options import InputCoverage
from ibnorm_export.verifier.report import LayerParity, ParityReport
from ibnorm_export.verifier.verify import VerifyOptions, verify

__all__ = ["BackendParity", "compare_on_backends", "parity_cases"]

#: The backends that "present" stands for; those that cannot run here are skipped.
#: Triton is left out: it needs the address of a server.
_MAY_BE_PRESENT: Final = tuple(backend for backend in Backend if backend is not Backend.TRITON)

#: What precedes the way of running the norms, in names of cases and in steps of `verify`.
_NORMS: Final = ", norms "


@dataclass(frozen=True, slots=True)
class BackendParity:
    """The result on one backend: cases, and the report if there is one."""

    backend: str
    cases: tuple[Case, ...]
    report: ParityReport | None = None


def compare_on_backends(
    entry: ExportCheck, model: LoadedModel, *, exported: ExportedModel, progress: Progress
) -> Iterator[BackendParity]:
    """Compare on every backend in turn; the static verdict is given with the first one that runs.

    Raises:
        ModelFileError: a file of inputs cannot be read.
    """
    inputs = [read_inputs(path, model) for path in entry.parity.inputs] or None
    static = True
    for name in entry.parity.backends:
        for backend in _MAY_BE_PRESENT if name == PRESENT else (name,):
            cases: list[Case] = []
            report, start = None, time.perf_counter()
            with attempt(cases, suite=f"{entry.name}.{backend}", name="parity"):
                try:
                    report, compared = _compare(
                        entry,
                        model,
                        exported=exported,
                        backend=backend,
                        static=static,
                        inputs=inputs,
                        progress=progress,
                    )
                    cases += compared
                    static = False
                except BackendUnavailable as error:
                    outcome = Outcome.SKIPPED if name == PRESENT else Outcome.ERROR
                    cases.append(
                        Case(
                            f"{entry.name}.{backend}",
                            "backend",
                            outcome=outcome,
                            message=str(error),
                            seconds=time.perf_counter() - start,
                            code=FindingCode.BACKEND_MISSING,
                        )
                    )
            yield BackendParity(backend, tuple(cases), report)


def _compare(
    entry: ExportCheck,
    model: LoadedModel,
    *,
    exported: ExportedModel,
    backend: str,
    static: bool,
    inputs: list[Arrays] | None,
    progress: Progress,
) -> tuple[ParityReport, list[Case]]:
    parity = entry.parity
    options = VerifyOptions(
        backend,
        parity.samples,
        seed=parity.seed,
        static=static,
        kernels=parity.kernels,
        require_fused=parity.require_fused,
        layers=parity.layers,
        coverage=parity.coverage,
        stress=parity.stress,
        npm=parity.npm if BACKENDS[backend].takes_npm else None,
        expected=parity.expected,
        expected_dtype=parity.expected_dtype,
    )
    times = StepTimes(progress)
    report = verify(exported, model, options=options, inputs=inputs, progress=times)
    cases = parity_cases(entry.name, backend, report=report, max_error=parity.max_error)
    return report, list(times.share(cases, of_case=_part_of_case, of_step=_part_of_step))


def _part_of_case(case: Case) -> str:
    """The part of a comparison that decides a case: reading the file, one way of running the norms, or the layers."""
    for suffix in (".static", ".layers"):
        if case.suite.endswith(suffix):
            return suffix
    _, found, norms = case.name.rpartition(_NORMS)
    return norms if found else ""


def _part_of_step(step: str) -> str:
    """The part of a comparison that a step of its progress belongs to."""
    if step == "reading the file":
        return ".static"
    if "layer" in step:
        return ".layers"
    _, found, norms = step.rpartition(_NORMS)
    return norms if found else ""


def parity_cases(name: str, backend: str, *, report: ParityReport, max_error: float | None) -> list[Case]:
    """Turn one comparison into cases, without their times.

    Args:
        name: name of the export.
        backend: what ran it.
        report: the result of `verify`.
        max_error: limit on the relative error of every output, or None.
    """
    suite = f"{name}.{backend}"
    return [
        *_static_cases(f"{name}.static", report),
        *_expected_cases(suite, report),
        *_numeric_cases(suite, report, max_error=max_error),
    ]


def _static_cases(suite: str, report: ParityReport) -> list[Case]:
    static = report.static
    if static is None:
        return []
    failed = [Case(suite, f.where, outcome=Outcome.FAIL, message=f.what, code=f.code) for f in static.findings]
    compared = f"{static.norms} norms and {static.weights} weights compared"
    return failed or [Case(suite, "norms, functions and weights", outcome=Outcome.PASS, message=compared)]


def _expected_cases(suite: str, report: ParityReport) -> list[Case]:
    expected = report.expected
    if expected is None:
        return []
    failed = [Case(suite, f.where, outcome=Outcome.FAIL, message=f.what, code=f.code) for f in expected.findings]
    what = f"values of the training code, {expected.path}"
    return failed or [Case(suite, what, outcome=Outcome.PASS, message=f"{len(expected.rows)} comparisons")]


def _numeric_cases(suite: str, report: ParityReport, *, max_error: float | None) -> list[Case]:
    numeric = report.numeric
    if numeric is None:
        return []
    cases = []
    for output in numeric.outputs:
        above = max_error is not None and not output.error <= max_error
        message = f"relative error {output.error:.3g}, tolerance {output.tolerance:.3g}"
        if above:
            message += f", max_error {max_error:.3g}"
        figures = {"error": output.error, "baseline": output.baseline_error, "tolerance": output.tolerance}
        outcome = Outcome.PASS if output.passed and not above else Outcome.FAIL
        what = f"output {output.name}{_NORMS}{output.norms}"
        code = None if outcome is Outcome.PASS else FindingCode.ABOVE_MAX_ERROR
        code = code if output.passed else FindingCode.OUTPUT_ERROR
        cases.append(Case(suite, what, outcome=outcome, message=message, figures=figures, code=code))
    covered = {"layer"} | {f"output {output.name}" for output in numeric.outputs if not output.passed}
    cases += [
        Case(suite, f.where, outcome=Outcome.FAIL, message=f.what, code=f.code)
        for f in numeric.findings
        if f.where not in covered
    ]
    if not numeric and not any(case.red for case in cases):
        reason = "nothing was compared" if not numeric.outputs else "; ".join(f.what for f in numeric.findings)
        nothing = FindingCode.NOTHING_COMPARED
        cases.append(Case(suite, "outputs", outcome=Outcome.FAIL, message=reason, code=nothing))
    if numeric.coverage is InputCoverage.FAST:
        cases.append(
            Case(
                suite,
                "all inputs",
                outcome=Outcome.SKIPPED,
                message=f"not run: {FAST_LEAVES_OUT}",
                code=FindingCode.NOT_RUN,
            )
        )
    if numeric.layers is not None:
        layers = numeric.layers
        cases += _layer_cases(f"{suite}.layers", layers.layers, first=layers.first_failure, failed=not numeric)
    return cases


def _layer_cases(suite: str, layers: Iterable[LayerParity], *, first: str, failed: bool) -> Iterator[Case]:
    """One case per norm and block. If the outputs fail, the first layer beyond its tolerance is the failure, and
    the layers after it are skipped: their errors follow from it."""
    source = ""
    for layer in layers:
        name = f"{layer.kind} {layer.module}"
        figures = {variant.norms: variant.error for variant in layer.variants} | {"baseline": layer.baseline_error}
        if source:
            why = f"after {source}, which failed"
            yield Case(suite, name, outcome=Outcome.SKIPPED, message=why, figures=figures, code=FindingCode.NOT_RUN)
        elif failed and not layer.passed:
            source = name
            yield Case(suite, name, outcome=Outcome.FAIL, message=first, figures=figures, code=FindingCode.FIRST_LAYER)
        else:
            yield Case(suite, name, outcome=Outcome.PASS, figures=figures)
