"""The page of a check: failures are grouped by cause, and an undecided case is not a pass."""

from __future__ import annotations

from ibnorm_export.findings.code import FindingCode
from ibnorm_export.gate.case import Case, Outcome
from ibnorm_export.gate.html import page_verdict
from ibnorm_export.gate.report import CheckReport
from ibnorm_export.html_page import State


def report_of(*cases: Case) -> CheckReport:
    return CheckReport("check.toml", cases, parity={}, environment={}, seconds=0.0)


def case(name: str, outcome: Outcome, message: str = "") -> Case:
    return Case("m.ort-cpu", name, outcome=outcome, message=message)


PASSED = case("a", Outcome.PASS)


def test_failures_that_differ_in_numbers_are_one_reason() -> None:
    failed = [case(f"output {i}", Outcome.FAIL, f"relative error {i}e-3, tolerance 1e-6") for i in range(3)]
    verdict = page_verdict(report_of(PASSED, case("x", Outcome.ERROR, "no such file"), *failed))
    assert verdict.state is State.FAIL
    assert verdict.summary == "4 of 5 cases failed, for 2 reasons."
    assert verdict.reasons == (
        "m.ort-cpu, output 0: relative error 0e-3, tolerance 1e-6. The same in 2 other cases.",
        "m.ort-cpu, x: no such file",
    )


def test_what_is_wrong_in_the_file_comes_first() -> None:
    outputs = [case(f"output {i}", Outcome.FAIL, "relative error 1, tolerance 1e-6") for i in range(3)]
    static = Case("m.static", "norm a", outcome=Outcome.FAIL, message="lambd is 2", code=FindingCode.NORM_DIFFERS)
    reasons = page_verdict(report_of(*outputs, static)).reasons
    assert reasons[0] == f"m.static, norm a: lambd is 2 [{FindingCode.NORM_DIFFERS}]"


def test_a_case_that_is_undecided_is_shown_as_such() -> None:
    verdict = page_verdict(report_of(PASSED, case("at most 1 ms", Outcome.CANNOT_TELL, "about 90 rounds would decide")))
    assert verdict.state is State.CANNOT_TELL
    assert verdict.reasons == ("m.ort-cpu, at most 1 ms: about 90 rounds would decide",)
    assert verdict.next_steps


def test_a_pass_and_nothing() -> None:
    assert page_verdict(report_of(PASSED)).state is State.PASS
    assert page_verdict(report_of()).state is State.FAIL
