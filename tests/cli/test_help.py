"""The help at 80 columns: every word whole, every choice listed, every option in a group; what every command takes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from ibnorm_export.cli import help_page, main
from ibnorm_export.cli.console import Verbosity, err

START = [sys.executable, "-m", "ibnorm_export"]


def help_text(*words: str) -> str:
    """What the process prints where there is no terminal of 80 columns."""
    environment = {**os.environ, "COLUMNS": "80"}
    done = subprocess.run([*START, *words, "--help"], capture_output=True, text=True, check=True, env=environment)
    return done.stdout


@pytest.fixture
def commands() -> Iterator[dict[str, Any]]:
    yield {name: main._load_command(name) for name in main.COMMANDS}


@pytest.mark.parametrize("command", ["", *main.COMMANDS])
def test_help_at_80_columns(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", ["ibnorm-export", *([command] if command else []), "--help"])
    assert main.main() == 0
    text = capsys.readouterr().out
    too_long = [line for line in text.splitlines() if len(line) > 80]
    assert not too_long
    assert "…" not in text, "nothing is cut off"
    assert "\x1b" not in text, "no colours where there is no terminal"
    flat = " ".join(text.split())
    if not command:
        assert all(f"{name} {about.split()[0]}" in flat for name, about in main.COMMANDS.items())
        return
    loaded = main._load_command(command)
    for parameter in loaded.params:
        assert " ".join((parameter.help or "").split()) in flat, "every word of every help text, unbroken"
        assert all(re.search(rf"(^|\s){re.escape(name)}(,|\s|$)", text) for name in parameter.opts if "-" in name)
        kind = loaded.types.get(parameter.name, str)
        for choice in (member.value for member in kind) if hasattr(kind, "__members__") else ():
            assert re.search(rf"(?<![\w-]){re.escape(choice)}(?![\w-])", text)
    assert f"Example: ibnorm-export {command}" in flat
    assert re.search(r"-q, --quiet.*-v, --verbose.*-h, --help", flat)


def test_no_help_imports_what_takes_long() -> None:
    """Each of these takes longer than the help itself."""
    slow = {"matplotlib", "ml_dtypes", "numpy", "onnx", "onnx_ir", "onnxruntime", "scipy", "torch", "transformers"}
    code = (
        "import sys\n"
        "from ibnorm_export.cli import main\n"
        "for command in ([], *([name] for name in main.COMMANDS)):\n"
        "    sys.argv = ['ibnorm-export', *command, '--help']\n"
        "    assert main.main() == 0\n"
        f"    assert not {slow!r} & sys.modules.keys(), (command, {slow!r} & sys.modules.keys())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_option_is_in_a_group(commands: dict[str, Any]) -> None:
    general = {"--quiet", "--verbose", "--help"}
    for name, command in commands.items():
        for option in (p for p in command.params if p.param_type_name == "option"):
            assert help_page._panel(option) != "General" or general & set(option.opts), f"{name} {option.opts}"


def test_every_help_text_is_a_sentence(commands: dict[str, Any]) -> None:
    for name, command in commands.items():
        for parameter in command.params:
            text = parameter.help or ""
            assert text.endswith((".", "...")), f"{name} {parameter.name}: {text}"
            assert not re.match(r"(Of|For|In|With) ", text), f"{name} {parameter.name}: {text}"


def test_an_example_can_be_copied(monkeypatch: pytest.MonkeyPatch, commands: dict[str, Any]) -> None:
    """A line that goes on ends in a backslash, and an option stays with its value."""
    monkeypatch.setenv("COLUMNS", "60")
    text = "ibnorm-export bench llama.onnx --checkpoint checkpoints/llama --against torch,torch.compile --seq 128"
    lines = [line.plain for line in help_page._example(text)][1:]
    assert len(lines) > 1
    assert all(line.endswith(" \\") for line in lines[:-1])
    assert " ".join(line.rstrip("\\").strip() for line in lines) == text
    assert not any(re.search(r"--\w+( \\)?$", line) for line in lines)


def test_colours_only_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal:
        is_terminal, no_color, is_dumb_terminal = True, False, False

    class Formatter:
        text = ""

        def write(self, text: str) -> None:
            self.text += text

    for no_color, styled in ((False, True), (True, False)):
        Terminal.no_color = no_color
        monkeypatch.setattr(help_page, "out", Terminal)
        formatter = Formatter()
        main._load_command("inspect").format_help(_Context(), formatter)
        assert ("\x1b[" in formatter.text) is styled
        assert "Usage:" in re.sub(r"\x1b\[[\d;]*m", "", formatter.text)


class _Context:
    command_path = "ibnorm-export inspect"
    help_option_names = ("-h", "--help")


def test_python_m_is_the_command() -> None:
    done = subprocess.run([*START, "-V"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"ibnorm-export \d+\.\d+\.\d+\n", done.stdout)


def test_help_is_fast() -> None:
    """It needs neither torch nor numpy; how long it takes depends on the machine, so the modules are checked."""
    code = (
        "import sys; from ibnorm_export.cli.main import main\n"
        "main()\n"
        "sys.exit(' '.join({'torch', 'onnx', 'onnxruntime', 'transformers'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_offered(shell: str) -> None:
    """The script of a shell asks the command, which answers with its commands and the options of one of them."""
    named = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    words = [*START, "--show-completion", shell]
    shown = subprocess.run(words, capture_output=True, text=True, check=False, env=named)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert f"complete_{shell}" in shown.stdout


@pytest.mark.parametrize(
    ("words", "offered"), [("ibnorm-export ex", "export"), ("ibnorm-export verify --num", "--numeric-only")]
)
def test_completion_answers(words: str, offered: str) -> None:
    asked = {
        "_IBNORM_EXPORT_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    done = subprocess.run(START, capture_output=True, text=True, check=False, env={**os.environ, **asked})
    assert (done.returncode, done.stderr) == (0, "")
    assert offered in done.stdout.split()


@pytest.mark.parametrize(
    ("option", "verbosity"), [("-q", Verbosity.QUIET), ("-v", Verbosity.VERBOSE), (None, Verbosity.NORMAL)]
)
def test_quiet_and_verbose(
    option: str | None, verbosity: Verbosity, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []
    monkeypatch.setattr("ibnorm_export.cli.doctor.finish", lambda *a, **b: seen.append(err.verbosity))
    monkeypatch.setattr("ibnorm_export.doctor.diagnose", lambda **_: SimpleNamespace(checks=()))
    monkeypatch.setattr(sys, "argv", ["ibnorm-export", "doctor", *([option] if option else [])])
    assert main.main() == 0, capsys.readouterr().err
    assert seen == [verbosity]


@pytest.mark.parametrize("spelling", ["fp16", "float16", "half"])
def test_spellings_of_a_type(spelling: str) -> None:
    command = main._load_command("export")
    context = command.make_context("export", [".", "-o", "x.onnx", "--dtype", spelling])
    assert [kind.value for kind in context.params["dtype"]] == ["fp16"]


def test_a_command_to_type_keeps_its_extra(capsys: pytest.CaptureFixture[str]) -> None:
    """rich would read [gpu] as a style."""
    from ibnorm_export.cli import console

    text = "pip install 'ibnorm-export[gpu]'"
    console.out.print(text)
    console.err.print(text)
    console.print_report(text)
    console.print_next("x[cpu]")
    shown = capsys.readouterr()
    assert shown.out.count(text) == 2
    assert text in shown.err
    assert "x[cpu]" in shown.out + shown.err


@pytest.mark.parametrize("words", [[], ["a", "--prompt", "b"]])
def test_generate_takes_one_text(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["ibnorm-export", "generate", ".", *words])
    assert main.main() == 2
    assert 'ibnorm-export generate . "The import statement"' in capsys.readouterr().err
