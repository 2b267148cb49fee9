"""`ibnorm-export serve` as a user runs it: started as a process and stopped by a signal."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from tests.support.json_documents import read_document

#: Seconds after which a test gives up on a process. Only one that hangs takes as long, also on a busy machine.
PATIENCE_S: Final = 120


@dataclass(frozen=True)
class Running:
    """A running `ibnorm-export serve`."""

    process: subprocess.Popen[str]
    http: str
    grpc: str
    pid: int


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-c", "from ibnorm_export.cli.__main__ import run; run()", *map(str, arguments)]


def members(group: int) -> list[int]:
    """Process ids of a process group, without zombies."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended between the listing and the reading
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[2]) == group and fields[0] != "Z":
                found.append(int(stat.parent.name))
    return found


def listening(group: int) -> set[str]:
    """Addresses on which the processes of a group listen."""
    return {
        connection.laddr.ip.removeprefix("::ffff:")  # gRPC writes IPv4 addresses as IPv6 ones
        for pid in members(group)
        for connection in psutil.Process(pid).net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }


@contextlib.contextmanager
def running(path: Path, *arguments: object) -> Iterator[Running]:
    """Run `serve` as a user does, until SIGTERM; it must then end by itself and leave no process."""
    process = subprocess.Popen(
        command("serve", path, "--http-port=0", "--grpc-port=0", "--metrics-port=0", "--json", *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    text = ""
    while not text.rstrip().endswith("\n}") and (line := process.stdout.readline()):
        text += line
    if process.poll() is not None or not text:
        raise RuntimeError(f"serve ended: {text} {process.communicate()[1]}")
    told = read_document(text, "serve")
    started = psutil.Process(told["pid"]).children(recursive=True)  # some have their own session
    try:
        yield Running(process, told["http"], told["grpc"], told["pid"])
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.communicate(timeout=PATIENCE_S)
        assert not members(told["pid"])
        assert not psutil.wait_procs(started, timeout=PATIENCE_S)[1]
        assert not list(Path("/dev/shm").glob(f"ibnorm_{process.pid}_*"))
