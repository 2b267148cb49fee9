"""What people see: tables that fit, progress, the next step, and what they probably meant."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ibnorm_export import doctor
from ibnorm_export.cli import console, main
from ibnorm_export.cli.console import Verbosity, err, first_code, print_next, show_progress
from ibnorm_export.cli.hints import hint_of
from ibnorm_export.doctor import Check
from ibnorm_export.errors import ExitCode
from ibnorm_export.text_report import text_table, text_width
from tests.support.messages import messages

COLUMNS = ("candidate", "p50 ms", "p90 ms", "samples/s")
ROWS = [("ort-cpu", "1.23", "1.31", "813"), ("torch.compile", "4.56", "", "219")]


def test_a_table_that_does_not_fit_is_stacked() -> None:
    wide = text_table("m.onnx", COLUMNS, rows=ROWS)
    assert wide.splitlines()[1].startswith("candidate")
    with text_width(max(map(len, wide.splitlines()))):
        assert text_table("m.onnx", COLUMNS, rows=ROWS) == wide
    with text_width(30):
        assert text_table("m.onnx", COLUMNS, rows=ROWS).splitlines() == [
            "m.onnx",
            "candidate ort-cpu",
            "  p50 ms     1.23",
            "  p90 ms     1.31",
            "  samples/s  813",
            "candidate torch.compile",
            "  p50 ms     4.56",
            "  samples/s  219",
        ]
    assert text_table("m.onnx", COLUMNS, rows=ROWS) == wide, "the width ends with its block"


@pytest.mark.parametrize(("terminal", "stacked"), [(True, True), (False, False)])
def test_only_a_terminal_has_a_width(
    terminal: bool, stacked: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Report:
        def __str__(self) -> str:
            return text_table("", COLUMNS, rows=ROWS)

    monkeypatch.setattr(console.out, "_force_terminal", terminal)
    monkeypatch.setattr(console.out, "_width", 30)
    console.print_report(Report())
    assert ("candidate torch.compile" in capsys.readouterr().out) is stacked


@pytest.mark.parametrize(
    ("verbosity", "shown"),
    [
        (Verbosity.NORMAL, ["   3.0 s  export"]),
        (Verbosity.VERBOSE, ["   0.5 s  read", "   3.0 s  export"]),
        (Verbosity.QUIET, []),
    ],
)
def test_long_steps_have_a_line_where_there_is_no_terminal(
    verbosity: Verbosity, shown: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(console.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(err, "verbosity", verbosity)
    with show_progress() as progress:
        for what, seconds in (("read", 0.5), ("export", 1.0), ("export", 2.0)):
            progress(what, 0, 0)
            clock.now += seconds
    printed = capsys.readouterr().err
    assert printed.splitlines() == shown
    assert messages(f"{printed}a message\n") == ["a message"]


def test_a_terminal_shows_the_time_left(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(err, "_force_terminal", True)
    monkeypatch.setattr(err, "is_interactive", True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(err, "verbosity", Verbosity.NORMAL)
    with show_progress() as progress:
        progress("comparing [gpu]", 1, 4)
    shown = capsys.readouterr().err
    assert "comparing [gpu]" in shown
    assert "1/4" in shown
    assert "left" in shown


@pytest.mark.parametrize(
    ("verbosity", "shown"), [(Verbosity.NORMAL, "next: ibnorm-export bench 'a b.onnx'\n"), (Verbosity.QUIET, "")]
)
def test_the_next_step_is_on_stderr(
    verbosity: Verbosity, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(err, "verbosity", verbosity)
    print_next("bench", "a b.onnx")
    assert capsys.readouterr() == ("", shown)


def test_a_failure_names_the_command_that_explains_it() -> None:
    finding = SimpleNamespace(code="IBN103")
    assert first_code(SimpleNamespace(findings=(finding,), code="IBN999")) == "IBN103"
    assert first_code(SimpleNamespace(red=(SimpleNamespace(code=None), finding))) == "IBN103"
    assert first_code(SimpleNamespace(verdict=SimpleNamespace(code="IBN311"))) == "IBN311"
    assert first_code(SimpleNamespace()) is None


def test_doctor_ends_with_the_next_step(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = [Check("demo", works=works, found="") for works in (True, False)]
    for check, command in zip(checks, ("demo", "export CHECKPOINT -o MODEL.onnx"), strict=True):
        diagnosis = SimpleNamespace(checks=(check,))
        monkeypatch.setattr("ibnorm_export.doctor.diagnose", lambda found=diagnosis, **_: found)
        assert cli("doctor").err.endswith(f"next: ibnorm-export {command}\n")
    monkeypatch.undo()
    assert cli("doctor", "-q").err == ""
    assert cli("doctor", "--json").err == ""


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (("export", "org/model-7B", "-o", "x.onnx"), "`hf download org/model-7B --local-dir model-7B`"),
        (("verify", "FILE", "CK", "--atol", "1e-5"), "max_error in a check.toml"),
        (("verify", "FILE", "--checkpoint", "CK"), "the checkpoint is an argument"),
        (("verify", "FILE", "CK", "--sampels", "3"), "did you mean --samples"),
        (("verify", "CK", "FILE"), "Type: ibnorm-export verify FILE CK"),
        (("verify", "FILE", "CK", "--report", "."), "is a folder; name a file, such as report.html"),
        (("check", "CK"), "ibnorm-export check --init CK"),
        (("exprot", "CK"), "Did you mean 'export'?"),
        (("export", "CK", "-o", "x.onnx", "--fp16"), "write --dtype fp16"),
        (("check", "--confg", "x.toml"), "No such option: --confg (see"),
        (("bench", "no.onnx"), "does not exist; write it first: ibnorm-export export"),
        (
            ("export", "CK", "-o", "x.onnx", "--dtype", "int3"),
            "Invalid value for '--dtype': 'int3' is not one of 'fp32'",
        ),
        (("analyze", "FILE"), "POINT --file FILE"),
        (("-q", "inspect", "FILE"), "write it after the name of the command"),
    ],
)
def test_what_was_probably_meant(cli: Any, words: tuple[str, ...], hint: str, tmp_path: Path) -> None:
    (tmp_path / "ck").mkdir()
    (tmp_path / "m.onnx").touch()
    places = {"FILE": str(tmp_path / "m.onnx"), "CK": str(tmp_path / "ck")}
    result = cli(*(places.get(word, word) for word in words))
    assert result.code == 2
    for name, place in places.items():
        hint = hint.replace(name, place)
    assert hint in result.err
    assert len(messages(result.err)) == 1


def test_a_path_is_not_the_name_of_a_hub() -> None:
    for path in ("runs/model.onnx", "/org/model", "a/b/c", "model", "runs/last.ckpt"):
        assert "hub" not in hint_of(f"path '{path}' does not exist"), path


@pytest.mark.parametrize(
    ("text", "code", "shown"),
    [
        (
            "<function Linear.__init__> returned NULL without setting an exception",
            ExitCode.BAD_INPUT,
            "not enough memory",
        ),
        ("bad argument to internal function", ExitCode.INTERNAL_ERROR, "internal error: SystemError: bad argument"),
    ],
)
def test_a_constructor_that_fails_without_an_exception(
    text: str, code: ExitCode, shown: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """How PyTorch's constructors fail where Python has no memory left."""

    def fail(**_: object) -> None:
        raise SystemError(text)

    monkeypatch.setattr(doctor, "diagnose", fail)
    monkeypatch.setattr(sys, "argv", ["ibnorm-export", "doctor"])
    assert main.main() == code
    assert shown in capfd.readouterr().err
