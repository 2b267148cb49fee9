"""`check` as a whole: a fault makes it fail, and an error in one part does not stop the others."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import onnx
import pytest

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.cli import main
from ibnorm_export.gate import latency, parity
from ibnorm_export.gate import run as gate
from ibnorm_export.gate.case import Outcome
from ibnorm_export.gate.run import check
from ibnorm_export.op.spec import DOMAIN
from tests.support.json_documents import read_document

START = '[[export]]\nname = "m"\ncheckpoint = "c"\n'


def written(folder: Path, text: str) -> Path:
    path = folder / "check.toml"
    path.write_text(text, encoding="utf-8")
    return path


def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["ibnorm-export", *map(str, words)])
    capfd.readouterr()
    code = main.main()
    found = capfd.readouterr()
    return code, found.out + found.err


def wrong_lambda(exported: ExportedModel, path: Path) -> str:
    proto = onnx.load(exported.path)
    node = [n for n in proto.graph.node if n.domain == DOMAIN][2]
    next(a for a in node.attribute if a.name == "lambd").f *= 1.05
    onnx.save(proto, path)
    return node.name


def test_a_fault_turns_a_green_check_red_and_junit_names_the_layer(
    vit_checkpoint: Path,
    exported_vit: ExportedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    text = f"""
[[export]]
name = "vit"
checkpoint = "{vit_checkpoint}"
file = "vit.onnx"
[[export.latency]]
max_ms = 1000
rounds = 8
"""
    path = written(tmp_path, text)
    (tmp_path / "vit.onnx").write_bytes(exported_vit.path.read_bytes())
    code, out = run(monkeypatch, capfd, "check", path, "--coverage", "fast")
    assert code == 0, out
    assert f"next: ibnorm-export package {tmp_path / 'vit.onnx'} -o repository\n" in out
    assert " ms (95% interval " in out, "an absolute limit is compared in ms"
    results = tmp_path / "check-results"
    suites = ET.parse(results / "junit.xml").getroot()
    assert not suites.findall(".//failure")
    skipped = [case.get("name") for case in suites.iter("testcase") if case.find("skipped") is not None]
    assert skipped == ["all inputs"], "fast coverage names what it leaves out"
    assert len(suites.findall(".//testcase")) > 8
    assert "✅" in (results / "report.md").read_text(encoding="utf-8")
    times = {(case.get("classname"), case.get("name")): float(case.get("time", "")) for case in suites.iter("testcase")}
    assert all(seconds > 0.0 for seconds in times.values()), "every case has its own time"
    assert sum(times.values()) == pytest.approx(float(suites.get("time", "")), rel=0.1)
    assert times["vit.ort-cpu.latency", "at most 1000 ms"] >= 0.1, "what took long is where it happened"

    name = wrong_lambda(exported_vit, tmp_path / "vit.onnx")
    code, out = run(monkeypatch, capfd, "check", path, "--json", "--quiet")
    assert code == 1
    assert read_document(out, "check")["verdict"] == "fail"
    failed = [case for case in ET.parse(results / "junit.xml").iter("testcase") if case.find("failure") is not None]
    layers = [case for case in failed if case.get("classname") == "vit.ort-cpu.layers"]
    assert [case.get("name") for case in layers] == [f"norm {name}"]
    assert any(name in str(case.get("name")) for case in failed if case.get("classname") == "vit.static")
    for report in ("report.md", "report.html"):
        assert name in (results / report).read_text(encoding="utf-8")


def test_an_export_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    path = written(tmp_path, START + START.replace('"m"', '"n"'))
    seen: list[str] = []
    report = check(path, on_case=lambda case: seen.append(case.suite))
    assert seen == ["m", "n"], "each case is told once"
    assert not report.passed
    assert report.config == str(path)
    assert [case.outcome for case in report.cases] == [Outcome.ERROR, Outcome.ERROR]
    assert "does not exist" in report.cases[0].message
    assert len(ET.parse(tmp_path / "check-results" / "junit.xml").findall(".//error")) == 2


@pytest.mark.parametrize("raised", [RuntimeError("generator raised StopIteration"), KeyError("x"), OSError(28, "full")])
def test_any_exception_becomes_a_red_case_and_the_rest_goes_on(
    vit_checkpoint: Path,
    exported_vit: ExportedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    raised: Exception,
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise raised

    def load_or_fail(checkpoint: Path, *rest: Any, **more: Any) -> Any:
        return fail() if checkpoint.name == "bad" else load(checkpoint, *rest, **more)

    text = "\n".join(
        f'[[export]]\nname = "{name}"\ncheckpoint = "{checkpoint}"\nfile = "{exported_vit.path}"\n'
        f"parity = {{layers = false, stress = false, samples = 1}}\n[[export.latency]]\nmax_ms = 1000"
        for name, checkpoint in (("bad", "bad"), ("good", vit_checkpoint))
    )
    load = gate.load
    monkeypatch.setattr(gate, "load", load_or_fail)
    monkeypatch.setattr(latency, "bench_forward", fail)
    report = check(written(tmp_path, text))
    found = {(case.suite, case.name): case for case in report.cases}
    bad, slow = found["bad", "export and parity"], found["good.ort-cpu.latency", "at most 1000 ms"]
    assert (bad.outcome, slow.outcome) == (Outcome.ERROR, Outcome.ERROR)
    assert bad.message == slow.message == f"{type(raised).__name__}: {raised}"
    assert {case.outcome for case in report.cases if case.suite == "good.ort-cpu"} == {Outcome.PASS}
    assert len(ET.parse(tmp_path / "check-results" / "junit.xml").findall(".//error")) == 2


def test_an_interrupt_ends_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(gate, "load", interrupt)
    with pytest.raises(KeyboardInterrupt):
        check(written(tmp_path, START))


def test_an_exception_on_one_backend_does_not_stop_the_others(
    vit_checkpoint: Path, exported_vit: ExportedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def verify_or_fail(*models: Any, options: Any, **rest: Any) -> Any:
        if options.backend == "reference":
            raise RuntimeError("planted")
        return first(*models, options=options, **rest)

    text = (
        f'[[export]]\nname = "m"\ncheckpoint = "{vit_checkpoint}"\nfile = "{exported_vit.path}"\n'
        'parity = {backends = ["reference", "ort-cpu"], layers = false, stress = false, samples = 1}\n'
    )
    first = parity.verify
    monkeypatch.setattr(parity, "verify", verify_or_fail)
    report = check(written(tmp_path, text))
    assert not report
    outcomes = {
        suite: {case.outcome for case in report.cases if case.suite == suite}
        for suite in ("m.reference", "m.static", "m.ort-cpu")
    }
    assert outcomes == {"m.reference": {Outcome.ERROR}, "m.static": {Outcome.PASS}, "m.ort-cpu": {Outcome.PASS}}
