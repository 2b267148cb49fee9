"""The process that generates texts: how it starts and ends, and how the endpoint ends without it."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from ibnorm_export.errors import BackendUnavailable, IBNormError, ModelFileError
from ibnorm_export.serving.text import worker_process as worker_module
from ibnorm_export.serving.text.worker_process import worker_process
from tests.support.messages import messages
from tests.support.running_server import PATIENCE_S, Running, command, running


def worker_of(server: Running) -> psutil.Process:
    started = psutil.Process(server.pid).children()
    (worker,) = (one for one in started if "ibnorm_export.serving.text.worker" in one.cmdline())
    return worker


def begin(server: Running) -> Any:
    """A stream that has received its first piece, and that takes long to finish because others run at the same time.

    The worker gives way to the client: on a busy machine it would else finish all texts before the client goes on.
    """
    worker_of(server).nice(19)
    client = openai.OpenAI(base_url=f"http://{server.http}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S)
    asked: Any = {"model": "noise", "prompt": "import", "max_tokens": 500, "temperature": 0, "stream": True}
    streams = [client.completions.create(**asked) for _ in range(8)]
    next(iter(streams[-1]))
    return streams[-1]


def has_ended(process: psutil.Process) -> bool:
    try:
        process.wait(PATIENCE_S)
    except psutil.TimeoutExpired:
        return False
    return True


def ask(server: Running, **change: object) -> socket.socket:
    """Send a request over a new connection, and wait until the endpoint has read it. The worker should be suspended."""
    body = json.dumps({"model": "noise", "prompt": "import", "max_tokens": 5, **change}).encode()
    asked = socket.create_connection(("127.0.0.1", int(server.http.rpartition(":")[2])), timeout=PATIENCE_S)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\nConnection: close\r\n"
    asked.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
    until(server, waiting=1)
    return asked


def until(server: Running, **wanted: int) -> None:
    """Wait until /health reports these values."""
    for _ in range(50 * PATIENCE_S):
        with urllib.request.urlopen(f"http://{server.http}/health", timeout=PATIENCE_S) as answer:
            told = json.load(answer)
        if told.items() >= wanted.items():
            return
        time.sleep(0.02)
    pytest.fail(f"/health reports {told}")


def until_closed(server: Running) -> None:
    """Wait until the endpoint begins to stop, which closes its port."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        try:
            socket.create_connection(("127.0.0.1", int(server.http.rpartition(":")[2])), timeout=PATIENCE_S).close()
        except OSError:
            return
        time.sleep(0.01)
    pytest.fail("it still accepts connections")


def answer_to(asked: socket.socket) -> bytes:
    with asked, asked.makefile("rb") as answer:
        return answer.read()


def test_the_endpoint_ends_with_its_worker(noise: Path) -> None:
    """Waiting clients get an error, and the command fails with a message that explains what happened."""
    with running(noise) as server:
        worker = worker_of(server)
        worker.suspend()
        asked = ask(server)
        worker.kill()
        told = answer_to(asked)
        assert told.startswith(b"HTTP/1.1 503 ")
        assert b"the process that generates texts has ended (signal 9, Killed)" in told
        _, error = server.process.communicate(timeout=PATIENCE_S)
        assert server.process.returncode == 2
        assert "ibnorm-export: the process that generates texts has ended (signal 9, Killed)" in error
        assert len(messages(error)) == 1, error


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_disconnects_before_the_first_token(noise: Path, stream: bool) -> None:
    """Its text no longer waits, and its place is free as soon as the worker has cancelled the text."""
    with running(noise, "--max-waiting", 1) as server:
        worker = worker_of(server)
        worker.suspend()
        ask(server, stream=stream).close()
        until(server, waiting=0, running=1)
        worker.resume()
        until(server, waiting=0, running=0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_waits_when_the_endpoint_stops_gets_an_error(noise: Path, stream: bool) -> None:
    with running(noise) as server:
        worker = worker_of(server)
        worker.suspend()
        asked = ask(server, stream=stream)
        server.process.send_signal(signal.SIGTERM)
        told = answer_to(asked)
        assert told.startswith(b"HTTP/1.1 503 "), told
        assert b"the endpoint is stopping" in told
        _, error = server.process.communicate(timeout=PATIENCE_S)
        assert (server.process.returncode, error) == (0, "")


def test_a_worker_that_ends_while_the_endpoint_stops(noise: Path) -> None:
    with running(noise, "--finish-seconds", PATIENCE_S) as server:
        worker = worker_of(server)
        worker.suspend()
        asked = ask(server)
        server.process.send_signal(signal.SIGTERM)
        until_closed(server)
        worker.kill()
        assert answer_to(asked).startswith(b"HTTP/1.1 503 ")
        _, error = server.process.communicate(timeout=PATIENCE_S)
        assert server.process.returncode == 2
        assert "has ended (signal 9, Killed)" in error


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_before_it_is_ready(noise: Path, signum: signal.Signals) -> None:
    """The exit code is 130, and there is one line of output, with nothing from the worker."""
    process = subprocess.Popen(
        command("serve", noise, "--http-port", 0), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not (started := psutil.Process(process.pid).children()):
        time.sleep(0.005)
    process.send_signal(signum)
    out, error = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, out) == (130, "")
    assert messages(error) == ["ibnorm-export: interrupted; nothing was left half-written"]
    assert all(map(has_ended, started))


def test_a_stream_gets_an_error_when_the_worker_ends(noise: Path) -> None:
    with running(noise) as server:
        stream = begin(server)
        worker_of(server).kill()
        with pytest.raises(openai.APIError, match="the process that generates texts has ended"):
            for _ in stream:
                pass
        assert server.process.wait(PATIENCE_S) == 2


def test_a_worker_ends_with_its_endpoint(noise: Path) -> None:
    """Even if the endpoint is killed in the middle of a text."""
    with running(noise) as server:
        worker = worker_of(server)
        begin(server)
        server.process.kill()
        assert has_ended(worker)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_the_worker_ignores_signals(noise: Path, signum: signal.Signals) -> None:
    """A terminal or a service manager signals both processes: the text finishes, then both end."""
    with running(noise, "--finish-seconds", PATIENCE_S) as server:
        worker = worker_of(server)
        stream = begin(server)
        worker.send_signal(signum)
        server.process.send_signal(signum)
        *_, last = stream
        assert last.choices[0].finish_reason == "length"
        _, error = server.process.communicate(timeout=PATIENCE_S)
        assert (server.process.returncode, error) == (0, "")
        assert has_ended(worker)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_worker_that_does_not_end_is_killed(noise: Path, signum: signal.Signals) -> None:
    with running(noise) as server:
        worker = worker_of(server)
        worker.suspend()  # like one in the middle of a long prompt
        server.process.send_signal(signum)
        assert server.process.wait(PATIENCE_S) == 0
        assert has_ended(worker)


def start(folder: Path) -> None:
    async def enter() -> None:
        async with worker_process(folder):
            pytest.fail("it was started")

    asyncio.run(enter())


def without_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def changed_library(folder: Path) -> None:
    with (folder / "libibnorm_ort.so").open("ab") as stream:
        stream.write(b"\0")


def no_config(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (without_tokenizer, "has no tokenizer.json"),
        (changed_library, "libibnorm_ort.so was changed after packaging"),
        (no_config, "contains list; it must be a JSON object"),
    ],
)
def test_a_damaged_folder_is_reported(noise: Path, tmp_path: Path, damage: Callable[[Path], None], words: str) -> None:
    folder = tmp_path / "noise"
    shutil.copytree(noise, folder)
    damage(folder)
    with pytest.raises(ModelFileError, match=words):
        start(folder)
    done = subprocess.run(
        command("serve", folder, "--http-port", 0), capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 2
    assert words in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_a_worker_that_ends_before_it_is_ready(noise: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nkill -SEGV $$\n")
    python.chmod(0o755)
    monkeypatch.setattr(worker_module.sys, "executable", str(python))
    with pytest.raises(IBNormError, match=r"has ended \(signal 11, Segmentation fault\)"):
        start(noise)


def test_a_missing_python_is_reported(noise: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module.sys, "executable", "")
    with pytest.raises(BackendUnavailable, match=r"cannot start a second Python process, ''"):
        start(noise)


def test_files_in_the_working_folder_do_not_hide_modules(
    noise: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "select.py").write_text("raise SystemExit('taken from the working folder')")
    (tmp_path / "numpy.py").write_text("raise SystemExit('taken from the working folder')")
    monkeypatch.chdir(tmp_path)

    async def enter() -> int:
        async with worker_process(noise) as process:
            return process.max_positions

    assert asyncio.run(enter()) == 512
