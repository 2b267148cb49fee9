"""Findings by cause: what differs only in names and numbers is one cause, and every step has something to do."""

from __future__ import annotations

from ibnorm_export.findings.code import FindingCode
from ibnorm_export.verifier.causes import causes, next_steps, reasons
from ibnorm_export.verifier.finding import Finding
from ibnorm_export.verifier.html import page_verdict, percent
from ibnorm_export.verifier.report import ParityReport, StaticReport


def finding(where: str, what: str, code: FindingCode = FindingCode.NORM_DIFFERS) -> Finding:
    return Finding(where, what, code=code)


LAMBDAS = [
    finding(f"norm layers.{i}.norm", f"attribute lambd is {i + 3.5}; the checkpoint has {i + 3}") for i in range(6)
]
WEIGHT = finding("weight head.weight", "differs in 3 of 4 values", FindingCode.WEIGHT_DIFFERS)


def parity(*findings: Finding) -> ParityReport:
    return ParityReport("m.onnx", "ckpt", static=StaticReport(6, 40, findings=findings), numeric=None)


def test_findings_that_differ_in_names_and_numbers_are_one_cause() -> None:
    first, second = causes([WEIGHT, *LAMBDAS])
    assert first.findings == tuple(LAMBDAS), "the most frequent cause is first"
    assert second.findings == (WEIGHT,)
    assert str(first) == (
        "norm layers.0.norm: attribute lambd is 3.5; the checkpoint has 3. The same at 5 other places: "
        "norm layers.1.norm, norm layers.2.norm, norm layers.3.norm and 2 more."
    )
    assert str(second) == str(WEIGHT)


def test_another_statement_or_code_is_another_cause() -> None:
    other = finding("norm layers.0.norm", "attribute epsilon is 3.5; the checkpoint has 3")
    coded = finding("norm layers.0.norm", "attribute lambd is 1; the checkpoint has 3", FindingCode.NORM_UNKNOWN)
    assert len(causes([LAMBDAS[0], other, coded])) == 3


def test_a_failure_has_reasons_and_steps_and_a_pass_has_none() -> None:
    failed = parity(*LAMBDAS, WEIGHT)
    assert reasons(failed) == tuple(map(str, causes([*LAMBDAS, WEIGHT])))
    steps = "\n".join(next_steps(failed))
    assert "`ibnorm-export export ckpt -o m.onnx`" in steps
    assert "`ibnorm-export explain IBN103`" in steps
    assert page_verdict(failed).summary == "7 findings on 6 norms and 40 weights."
    passed = parity()
    assert reasons(passed) == next_steps(passed) == ()
    assert page_verdict(passed).summary == "6 norms and 40 weights agree with the checkpoint."


def test_percent_has_three_digits_and_no_exponent() -> None:
    shown = [percent(share) for share in (0.0, 1.23456e-7, 0.00123456, 0.5, 0.999, 1.0, 147.34, float("inf"))]
    assert shown == ["0%", "0.0000123%", "0.123%", "50.0%", "99.9%", "100%", "14700%", "inf%"]
