"""The gate of one file: what it accepts, what its reports say, and that a fault turns it red."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import onnx
import pytest

from ibnorm_export import models
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.stress_inputs import STRESS_DISTRIBUTIONS, draw_stress_inputs
from ibnorm_export.artifacts.tensors import DType
from ibnorm_export.benchmark.report import BenchReport, Latency
from ibnorm_export.cli import main
from ibnorm_export.errors import ConfigError
from ibnorm_export.exporter.export import ExportOptions
from ibnorm_export.gate import run as check
from ibnorm_export.gate.config import CheckConfig, ExportCheck, LatencyBudget, ParityCheck, read_check_config
from ibnorm_export.gate.report import Case, CheckReport, Outcome, write_all
from ibnorm_export.gate.template import write_start
from ibnorm_export.op.spec import DOMAIN

START = '[[export]]\nname = "m"\ncheckpoint = "c"\n'


def written(folder: Path, text: str) -> Path:
    path = folder / "check.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_every_key_is_read(tmp_path: Path) -> None:
    text = """
results = "out"
[[export]]
name = "m"
checkpoint = "c"
dtype = "fp16"
[export.parity]
backends = ["ort-cpu", "present"]
max_error = 1
inputs = ["x.npz"]
[[export.latency]]
against = "n"
max_ratio = 1.5
[[export]]
name = "n"
checkpoint = "/c"
"""
    config = read_check_config(written(tmp_path, text))
    first = ExportCheck(
        "m",
        tmp_path / "c",
        dtype=DType.FP16,
        latency=(LatencyBudget(against="n", max_ratio=1.5),),
        parity=ParityCheck(("ort-cpu", "present"), inputs=(tmp_path / "x.npz",), max_error=1.0),
    )
    assert config == CheckConfig((first, ExportCheck("n", Path("/c"))), tmp_path / "out")


def test_what_is_checked_is_what_export_makes() -> None:
    options, asked = ExportOptions(), ExportCheck("m", Path("c"))
    assert (asked.dtype, asked.opset, asked.inline, asked.fuse_skip) == (
        options.dtype,
        options.opset,
        options.inline,
        options.fuse_skip,
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "export is missing"),
        ("export = []", "nothing to check"),
        ("[[export", "not a TOML file"),
        (START + "tolerance = 1", "unknown keys ['tolerance']"),
        (START + "[export.parity]\nsample = 3", "unknown keys ['sample']"),
        (START + "[export.parity]\nsamples = true", "samples is True; it must be int"),
        (START + "[export.parity]\nsamples = 0", "samples is 0"),
        (START + "[export.parity]\nseed = -1", "parity.seed is -1"),
        (START + "[export.parity]\nmax_error = -1.0", "parity.max_error is -1.0"),
        (START + "[export.parity]\nmax_error = nan", "parity.max_error is nan"),
        (START + '[export.parity]\nbackends = ["gpu"]', "no backend 'gpu'"),
        (START + '[export.parity]\nbackends = ["triton"]', "no backend 'triton'"),
        (START + 'dtype = "fp8"', "'fp8'; it must be one of ['fp32', 'fp16', 'bf16']"),
        (START + 'task = "dream"', "'dream'"),
        (START + "[[export.latency]]\nrounds = 3", "names []; it must name exactly one"),
        (START + '[[export.latency]]\nmax_ms = 1\nagainst = "torch"', "exactly one"),
        (START + '[[export.latency]]\nagainst = "other"', "'other'"),
        (START + "[[export.latency]]\nmax_ms = -1", "above 0"),
        (START + "[[export.latency]]\nmax_ms = nan", "above 0"),
        (START + "[[export.latency]]\nmax_ms = 1\nthreads = -3", "latency[0]: threads is -3"),
        (START + "[[export.latency]]\nmax_ms = 1\nmax_rounds = 3", "max_rounds at least rounds"),
        (START + START, "there 2 times"),
        ('[[export]]\nname = "../m"\ncheckpoint = "c"', "names a file"),
        ("format = 2\n" + START, "reads 1"),
        ('[[export]]\nname = "m"', "checkpoint is missing"),
        ("export = 3", "must be a list"),
    ],
)
def test_what_is_not_legal_is_named(tmp_path: Path, text: str, said: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as raised:
        read_check_config(path)
    assert said in str(raised.value)
    assert str(path) in str(raised.value)


def test_a_missing_file_says_how_to_begin(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--init"):
        read_check_config(tmp_path / "none.toml")


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


def test_a_fault_turns_a_green_gate_red_and_junit_names_the_layer(
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
    code, out = run(monkeypatch, capfd, "check", path)
    assert code == 0, out
    results = tmp_path / "check-results"
    suites = ET.parse(results / "junit.xml").getroot()
    assert not suites.findall(".//failure")
    assert len(suites.findall(".//testcase")) > 8
    assert "✅" in (results / "report.md").read_text(encoding="utf-8")

    name = wrong_lambda(exported_vit, tmp_path / "vit.onnx")
    code, out = run(monkeypatch, capfd, "check", path, "--json")
    assert code == 1
    assert json.loads(out)["verdict"] == "fail"
    failed = [case for case in ET.parse(results / "junit.xml").iter("testcase") if case.find("failure") is not None]
    layers = [case for case in failed if case.get("classname") == "vit.ort-cpu.layers"]
    assert [case.get("name") for case in layers] == [f"norm {name}"]
    assert any(name in str(case.get("name")) for case in failed if case.get("classname") == "vit.static")
    for report in ("report.md", "report.html"):
        assert name in (results / report).read_text(encoding="utf-8")


def test_what_cannot_be_tried_is_an_error_and_the_rest_goes_on(tmp_path: Path) -> None:
    config = read_check_config(written(tmp_path, START + START.replace('"m"', '"n"')))
    report = check.run_check(config, "check.toml")
    assert not report
    assert [case.outcome for case in report.cases] == [Outcome.ERROR, Outcome.ERROR]
    assert "does not exist" in report.cases[0].says
    write_all(report, config.results)
    assert len(ET.parse(config.results / "junit.xml").findall(".//error")) == 2
    assert not CheckReport("check.toml", (), parity={}, environment={}, seconds=0.0)


@pytest.mark.parametrize("raised", [RuntimeError("generator raised StopIteration"), KeyError("x"), OSError(28, "full")])
def test_whatever_an_export_trips_over_the_rest_goes_on(
    vit_checkpoint: Path,
    exported_vit: ExportedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    raised: Exception,
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise raised

    text = "\n".join(
        f'[[export]]\nname = "{name}"\ncheckpoint = "{vit_checkpoint}"\nfile = "{exported_vit.path}"\n'
        f"parity = {{layers = false, exposing = false, samples = 1}}\n[[export.latency]]\nmax_ms = 1000"
        for name in ("bad", "good")
    )
    config = read_check_config(written(tmp_path, text))
    first = check._compared
    monkeypatch.setattr(
        check,
        "_compared",
        lambda asked, *rest, **named: fail() if asked.name == "bad" else first(asked, *rest, **named),
    )
    monkeypatch.setattr(check, "bench_forward", fail)
    report = check.run_check(config, "check.toml")
    found = {(case.suite, case.name): case for case in report.cases}
    bad, slow = found["bad", "export and parity"], found["good.ort-cpu.latency", "at most 1000 ms"]
    assert (bad.outcome, slow.outcome) == (Outcome.ERROR, Outcome.ERROR)
    assert bad.says == slow.says == f"{type(raised).__name__}: {raised}"
    assert {case.outcome for case in report.cases if case.suite == "good.ort-cpu"} == {Outcome.PASS}
    write_all(report, config.results)
    assert len(ET.parse(config.results / "junit.xml").findall(".//error")) == 2


def test_an_interrupt_ends_the_gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(check, "_made", interrupt)
    with pytest.raises(KeyboardInterrupt):
        check.run_check(read_check_config(written(tmp_path, START)), "check.toml")


@pytest.mark.parametrize(
    ("own", "rival", "limit", "outcome"),
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
    own: list[float],
    rival: list[float],
    limit: float,
    outcome: Outcome,
) -> None:
    taken: list[int] = []

    def bench_forward(*_: Any, **__: Any) -> BenchReport:
        taken.append(1)
        latencies = [
            Latency("a", 1, p50_ms=1.0, p90_ms=1.0, p99_ms=1.0, throughput_per_s=1.0, round_ms=tuple(own)),
            Latency("b", 1, p50_ms=1.0, p90_ms=1.0, p99_ms=1.0, throughput_per_s=1.0, round_ms=tuple(rival)),
        ]
        return BenchReport({}, 1, threads=1, rounds=len(own), latencies=tuple(latencies), ratios=(), environment={})

    monkeypatch.setattr(check, "bench_forward", bench_forward)
    budget = LatencyBudget(against="torch", max_ratio=limit, max_rounds=60)
    asked = ExportCheck("vit", vit_checkpoint)
    case = check._timed(
        asked, budget, model=models.load(vit_checkpoint), made={"vit": exported_vit}, progress=lambda *_: None
    )
    assert case.outcome is outcome, case.says
    assert (len(taken) > 1) == (outcome is Outcome.CANNOT_TELL)
    report = CheckReport("c", (case,), parity={}, environment={}, seconds=0.0)
    assert bool(report) == (outcome is not Outcome.FAIL)


def test_cannot_tell_is_skipped_in_junit_with_its_reason(tmp_path: Path) -> None:
    case = Case("m.latency", "at most 1 ms", outcome=Outcome.CANNOT_TELL, says="about 90 rounds would decide")
    write_all(CheckReport("c", (case,), parity={}, environment={"processor": "x"}, seconds=0.0), tmp_path)
    skipped = ET.parse(tmp_path / "junit.xml").find(".//skipped")
    assert skipped is not None
    assert skipped.get("message") == "cannot tell: about 90 rounds would decide"


@pytest.mark.parametrize("mark", ["\x00", "\x1b", "\ud800", "\uffff"])
def test_what_xml_cannot_hold_is_escaped(tmp_path: Path, mark: str) -> None:
    case = Case(f"m{mark}", f"node {mark}", outcome=Outcome.ERROR, says=f"é 😀 {mark}")
    write_all(CheckReport(f"c{mark}", (case,), parity={}, environment={"processor": "x"}, seconds=0.0), tmp_path)
    error = ET.parse(tmp_path / "junit.xml").find(".//error")
    assert error is not None
    assert error.text == f"é 😀 {ascii(mark)[1:-1]}"


def test_the_starting_file_is_legal_and_is_not_overwritten(llama_checkpoint: Path, tmp_path: Path) -> None:
    path = write_start(llama_checkpoint, tmp_path / "check.toml")
    config = read_check_config(path)
    assert [export.dtype for export in config.export] == [DType.FP32, DType.FP16]
    assert config.export[0].checkpoint.resolve() == llama_checkpoint.resolve()
    assert config.export[0].latency[0].sequence == 64
    with pytest.raises(ConfigError, match="exists already"):
        write_start(llama_checkpoint, path)


def test_exposing_inputs_are_what_they_are_called(vit_checkpoint: Path, llama_checkpoint: Path) -> None:
    import numpy as np
    from scipy.stats import kurtosis

    found = draw_stress_inputs(models.load(vit_checkpoint), np.random.default_rng(0))
    assert set(found) == set(STRESS_DISTRIBUTIONS)
    pixels = {name: arrays["pixel_values"] for name, arrays in found.items()}
    assert kurtosis(STRESS_DISTRIBUTIONS["heavy tails"](np.random.default_rng(0), (4, 10_000)), axis=None) > 3
    assert abs(pixels["large means"].mean() / pixels["large means"].std() - 10) < 2
    assert all(np.ptp(image.ravel()[: image.size // 2]) == 0 for image in pixels["constant rows"])
    assert pixels["near-zero rows"].std() < 2e-4
    assert 1 in {len(array) for array in pixels.values()}
    (longest,) = draw_stress_inputs(models.load(llama_checkpoint), np.random.default_rng(0)).values()
    assert longest["input_ids"].shape == longest["attention_mask"].shape == (1, 64)
    assert np.ptp(longest["input_ids"][0, :32]) == 0


def test_no_more_positions_are_timed_than_there_are(
    llama_checkpoint: Path, exported_llama: ExportedModel, tmp_path: Path
) -> None:
    """Without a sequence 128 tokens, of which this model has 64."""
    text = (
        f'[[export]]\nname = "m"\ncheckpoint = "{llama_checkpoint}"\nfile = "{exported_llama.path}"\n'
        "parity = {layers = false, exposing = false, samples = 1}\n"
        "[[export.latency]]\nmax_ms = 60000\nrounds = 2\n"
        "[[export.latency]]\nmax_ms = 60001\nrounds = 2\nsequence = 65\n"
    )
    report = check.run_check(read_check_config(written(tmp_path, text)), "check.toml")
    default, beyond = (case for case in report.cases if case.suite.endswith("latency"))
    assert default.outcome is not Outcome.ERROR
    assert "has 64 positions, fewer than a sequence of 65" in beyond.says


def test_what_one_backend_trips_over_ends_no_other(
    vit_checkpoint: Path, exported_vit: ExportedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def verify_or_fail(*models: Any, options: Any, **rest: Any) -> Any:
        if options.backend == "reference":
            raise RuntimeError("planted")
        return first(*models, options=options, **rest)

    text = (
        f'[[export]]\nname = "m"\ncheckpoint = "{vit_checkpoint}"\nfile = "{exported_vit.path}"\n'
        'parity = {backends = ["reference", "ort-cpu"], layers = false, exposing = false, samples = 1}\n'
    )
    first = check.verify
    monkeypatch.setattr(check, "verify", verify_or_fail)
    report = check.run_check(read_check_config(written(tmp_path, text)), "check.toml")
    assert not report
    outcomes = {
        suite: {case.outcome for case in report.cases if case.suite == suite}
        for suite in ("m.reference", "m.static", "m.ort-cpu")
    }
    assert outcomes == {"m.reference": {Outcome.ERROR}, "m.static": {Outcome.PASS}, "m.ort-cpu": {Outcome.PASS}}
