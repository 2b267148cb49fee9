"""The command as a process: interrupts at any moment, closed pipes, and streams that cannot be written."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from onnx import helper

from tests.support.held_process import held_process
from tests.support.messages import messages

SIGNALS = [signal.SIGINT, signal.SIGTERM]
START = [sys.executable, "-m", "ibnorm_export.cli"]
INTERRUPTED = "ibnorm-export: interrupted; nothing was left half-written\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file that is read quickly and whose description is longer than the buffer of a stream."""
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    value = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    outputs = [helper.make_tensor_value_info(f"y{i}", onnx.TensorProto.FLOAT, [1]) for i in range(1000)]
    nodes = [helper.make_node("Neg", ["x"], [output.name]) for output in outputs]
    graph = helper.make_graph(nodes, "g", [value], outputs)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), path)
    return str(path)


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command after `code`, which arranges an event in the process."""
    start = "import atexit, json, os, signal, sys, time, weakref\nfrom ibnorm_export.cli.__main__ import run\n"
    return subprocess.run(
        [sys.executable, "-c", f"{start}{code}\nrun()", *arguments],
        capture_output=True,
        text=True,
        timeout=300,  # ends a command that hangs
        check=False,
    )


@pytest.mark.parametrize("signum", SIGNALS)
@pytest.mark.parametrize("callback", ["weakref.ref(last, kill)", "weakref.finalize(last, kill)"])
def test_an_interrupt_in_a_callback_is_not_dropped(signum: signal.Signals, callback: str) -> None:
    """Python prints and discards what a callback raises."""
    done = run(
        "from ibnorm_export.cli import main as commands\n"
        "class Last: pass\n"
        "def kill(*a):\n"
        f"    os.kill(os.getpid(), {signum:d})\n"
        "    time.sleep(0.001)\n"
        "def command():\n"
        "    last = Last()\n"
        f"    held = {callback}\n"
        "    del last\n"
        "    time.sleep(60)\n"
        "commands.main = command\n"
    )
    assert (done.returncode, done.stderr) == (130, INTERRUPTED)


def test_other_exceptions_of_a_callback_are_printed_as_usual() -> None:
    done = run(
        "from ibnorm_export.cli import main as commands\n"
        "class Last:\n"
        "    def __del__(self): raise ValueError('planted')\n"
        "commands.main = lambda: Last() and 0\n"
    )
    assert done.returncode == 0
    assert "ValueError: planted" in done.stderr


@pytest.mark.parametrize("arguments", [[], ["--json"]])
@pytest.mark.parametrize("signum", SIGNALS)
@pytest.mark.parametrize("module", ["typer", "rich.console", "ibnorm_export.cli.inspect"])
def test_an_interrupt_while_the_command_loads(module: str, signum: signal.Signals, arguments: list[str]) -> None:
    done = run(
        "class Import:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {module!r}: os.kill(os.getpid(), {signum:d})\n"
        "sys.meta_path.insert(0, Import())\n",
        *("inspect", "nowhere", *arguments),
    )
    assert (done.returncode, done.stderr) == (130, INTERRUPTED)
    assert not arguments or json.loads(done.stdout)["error"]["kind"] == "interrupted"


@pytest.mark.parametrize("signum", SIGNALS)
@pytest.mark.parametrize("code", [0, 1, 130])
def test_a_command_that_is_ending_keeps_its_exit_code(code: int, signum: signal.Signals) -> None:
    done = run(
        "from ibnorm_export.cli import main as commands\n"
        f"commands.main = lambda: {code}\n"
        f"atexit.register(os.kill, os.getpid(), {signum:d})\n"
    )
    assert (done.returncode, done.stderr) == (code, INTERRUPTED if code == 130 else "")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", ["--version", "inspect --help", "inspect MODEL", "inspect MODEL --json"])
def test_a_closed_pipe_on_stdout(arguments: str, unbuffered: str, model: str) -> None:
    """The command ends silently, as any program in a pipe, and not with 1, which means a failed check."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [*START, *arguments.replace("MODEL", model).split()],
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(("arguments", "code"), [("inspect MODEL --json", 0), ("inspect nowhere --json", 2)])
def test_a_closed_pipe_on_stderr(arguments: str, code: int, unbuffered: str, model: str) -> None:
    """stdout gets everything, and the exit code does not change."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [*START, *arguments.replace("MODEL", model).split()],
            stdout=subprocess.PIPE,
            stderr=writing,
            text=True,
            check=False,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )
    finally:
        os.close(writing)
    assert done.returncode == code
    assert ("error" in json.loads(done.stdout)) is (code != 0)


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", ["", "--json"])
def test_an_interrupt_that_also_ends_the_reader(arguments: str, unbuffered: str) -> None:
    """Ctrl-C does this with `2>&1 | tee`."""
    code = (
        "import os, signal; from ibnorm_export.cli import main as m; from ibnorm_export.cli.__main__ import run\n"
        "m.main = lambda: os.kill(os.getpid(), signal.SIGINT)\n"
        "run()"
    )
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments.split()],
            stdout=writing,
            stderr=writing,
            check=False,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )
    finally:
        os.close(writing)
    assert done.returncode == 130


def test_a_model_that_ends_the_program(tmp_path: Path) -> None:
    """Its message is printed, and the exit code is not that of another error."""
    (tmp_path / "leaves.py").write_text("import sys\ndef build(): sys.exit('set MYDATA first')\n")
    (tmp_path / "weights.pt").touch()
    words = ["export", str(tmp_path / "weights.pt"), "-o", str(tmp_path / "m.onnx"), "--model", "leaves:build"]
    done = subprocess.run([*START, *words], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert messages(done.stderr) == ["ibnorm-export: the model's own code ended the program: set MYDATA first"]


def test_a_shutdown_that_hangs_can_be_interrupted() -> None:
    """The signal arrives when the interpreter has left the main thread and waits for another one.

    Python handles a signal that arrives just before it begins to wait when the next one arrives.
    """
    code = (
        "import threading\n"
        "from ibnorm_export.cli import main as commands\n"
        "from ibnorm_export.cli.__main__ import run\n"
        "def outlive():\n"
        "    threading.main_thread().join()\n"
        "    hold()\n"
        "commands.main = lambda: threading.Thread(target=outlive).start() or 1\n"
        "run()\n"
    )
    with held_process(code) as process:
        for _ in range(60):
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
                break
        assert process.poll() == 1


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", ["--version", "inspect MODEL", "inspect MODEL --json"])
def test_output_on_a_full_disk(arguments: str, unbuffered: str, model: str) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*START, *arguments.replace("MODEL", model).split()],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )
    assert done.returncode == 2
    assert done.stderr.endswith("No space left on device\n")
    assert len(messages(done.stderr)) == 1


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
def test_a_stream_that_the_shell_closed(closed: str, model: str) -> None:
    for path, code in ((model, 0), (f"{model}.missing.onnx", 2)):
        done = subprocess.run(
            ["bash", "-c", f'"$0" -m ibnorm_export.cli inspect "$1" --json {closed}', sys.executable, path],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stderr
        assert (done.stdout == "") == closed.startswith((">&-", "<&- >&-"))
        assert done.stdout == "" or json.loads(done.stdout)
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        "export nowhere -o m.onnx",
        "verify nowhere nowhere",
        "verify MODEL MODEL --inputs nowhere",
        "verify MODEL MODEL --text nowhere",
        "verify MODEL MODEL --engine nowhere",
        "bench nowhere",
        "bench MODEL --checkpoint nowhere",
        "compare nowhere MODEL",
        "check --init nowhere",
        "analyze nowhere",
        "analyze MODEL --file nowhere",
        "analyze MODEL --labels nowhere",
        "build-engine nowhere -o m.plan",
        "generate nowhere --prompt a",
        "package nowhere -o repository",
        "serve nowhere",
        "inspect nowhere",
        "demo --text nowhere",
    ],
)
def test_a_missing_path_is_reported_at_once(arguments: str, model: str) -> None:
    """The error comes before torch is imported, which takes much longer than everything else."""
    words = arguments.replace("MODEL", model).split()
    done = run("sys.modules.update(torch=None, transformers=None, onnxruntime=None)", *words)
    assert done.returncode == 2
    assert re.search("nowhere'? does not exist", done.stderr)
    assert len(messages(done.stderr)) == 1


@pytest.mark.parametrize("arguments", [["export", "MODEL", "-o", "m.onnx"], ["inspect", "MODEL"]])
def test_a_terminal_shows_something_before_anything_slow_is_imported(arguments: list[str], model: str) -> None:
    """Importing torch or onnx takes seconds on a busy machine."""
    code = (
        "import os, sys\n"
        "class Import:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name in ('numpy', 'onnx', 'torch'): os._exit(7)\n"
        "sys.meta_path.insert(0, Import())\n"
        "from ibnorm_export.cli.__main__ import run\n"
        "run()"
    )
    reading, terminal = os.openpty()
    try:
        words = [model if word == "MODEL" else word for word in arguments]
        environment = {**os.environ, "TERM": "xterm"}
        done = subprocess.run([sys.executable, "-c", code, *words], stderr=terminal, env=environment, check=False)
        assert done.returncode == 7
        assert os.read(reading, 100).decode() == f"loading {words[0]} ..."
    finally:
        os.close(reading)
        os.close(terminal)


def test_nothing_about_loading_is_written_into_a_file(model: str) -> None:
    done = subprocess.run([*START, "inspect", model], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stderr.splitlines()[-1] == f"next: ibnorm-export verify {model} CHECKPOINT"
    assert "loading" not in done.stdout + done.stderr


@pytest.mark.parametrize("arguments", ["--help", "--version"])
def test_the_group_imports_no_command(arguments: str) -> None:
    """`--help` and `--version` of the group need only typer and rich: 0.1 s of processor time."""
    code = (
        "import atexit, os, sys\n"
        "from ibnorm_export.cli.main import COMMANDS, main, module_of\n"
        "main()\n"
        "modules = {f'ibnorm_export.cli.{module_of(name)}' for name in COMMANDS} | {'numpy', 'onnx', 'torch'}\n"
        "sys.exit(' '.join(modules & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_help_shows_every_default() -> None:
    """rich reads [default: ...] within a text as a style."""
    for command, said in (("bench", "128, or the model's positions if fewer"), ("analyze", "median distance")):
        done = subprocess.run([*START, command, "--help"], capture_output=True, text=True, check=False)
        assert f"[default: {said}]" in " ".join(done.stdout.split())
