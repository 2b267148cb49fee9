"""A Triton server on this machine: start it on a repository, wait until it is ready, stop it in an orderly way."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import secrets
import signal
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

from ibnorm_export.errors import IBNormError
from ibnorm_export.serving.options import ServeOptions
from ibnorm_export.serving.ports import bound_socket
from ibnorm_export.serving.triton.binary import TritonBinary, backend_folder, find_triton, python_environment
from ibnorm_export.serving.triton.containers import check_models
from ibnorm_export.serving.triton.staging import check_repository, stage_repository

__all__ = ["TritonServer", "triton_server"]

_STACK_BYTES: Final = 256 << 20
#: Endpoints that are open only if `ServeOptions.admin` is true.
_ADMIN_ENDPOINTS: Final = ("shared-memory", "trace", "logging")
_LOG_LINES: Final = 4
_LOG_WIDTH: Final = 400
#: Tables, and a message that every machine without a GPU gets.
_LOG_NOISE: Final = re.compile(r"[|+]|.*CudaDriverHelper")
_LOG_ERROR: Final = re.compile(r"[EF]\d{4} |error")


class TritonServer:
    """A running tritonserver.

    Args:
        process: the server, which leads its own process group.
        options: its ports, all of them chosen, and its time limits.
        log: file to which it writes its log.
    """

    def __init__(self, process: subprocess.Popen[bytes], options: ServeOptions, *, log: Path) -> None:
        self._process = process
        self._options = options
        self._log = log
        self.http = f"{options.address}:{options.http_port}"
        self.grpc = f"{options.address}:{options.grpc_port}"
        self.metrics = f"{options.address}:{options.metrics_port}"

    @property
    def pid(self) -> int:
        """Id of the process, and of its process group."""
        return self._process.pid

    def ready(self) -> bool:
        """Return whether every model is loaded and warmed up."""
        try:
            with urllib.request.urlopen(f"http://{_reachable(self.http)}/v2/health/ready", timeout=1) as answer:
                return bool(answer.status == 200)
        except OSError:  # both no answer and a status other than 200 mean: not yet
            return False

    def wait_until_ready(self) -> None:
        """Wait until the server is ready.

        Raises:
            IBNormError: it ends, or takes too long; the message quotes its log.
        """
        end = time.monotonic() + self._options.ready_s
        while not self.ready():
            self.check()
            if time.monotonic() > end:
                raise IBNormError(f"tritonserver is not ready after {self._options.ready_s:g} s; {self._log_end()}")
            time.sleep(0.05)

    def check(self) -> None:
        """Check that the server is running.

        Raises:
            IBNormError: it has ended by itself; the message quotes its log.
        """
        code = self._process.poll()
        if code is not None:
            how = f"was killed by signal {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            raise IBNormError(f"tritonserver {how}; {self._log_end()}")

    def wait(self) -> None:
        """Wait until the server ends by itself, which raises IBNormError as `check` does."""
        while True:
            self.check()
            time.sleep(0.2)

    def stop(self) -> None:
        """Refuse new requests, let those in flight finish, and end every process that was started."""
        if self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):  # it hangs, and is killed below
                self._process.wait(self._options.finish_s + 3)
        with contextlib.suppress(ProcessLookupError):  # the whole group has ended already
            os.killpg(self._process.pid, signal.SIGKILL)  # backend processes can outlive the server
        self._process.wait()

    def _log_end(self) -> str:
        text = self._log.read_text(encoding="utf-8", errors="replace")
        lines = [line[:_LOG_WIDTH] for line in text.splitlines() if line.strip() and not _LOG_NOISE.match(line)]
        errors = [line for line in lines if _LOG_ERROR.match(line)] or lines
        return "its log ends with: " + " | ".join(errors[-_LOG_LINES:])


@contextlib.contextmanager
def triton_server(repository: str | Path, options: ServeOptions | None = None) -> Iterator[TritonServer]:
    """Run a tritonserver on a repository while the block runs; it is ready when the block begins.

    Args:
        repository: a folder of `package`; it may be read-only.
        options: see `ServeOptions`; None means the defaults.

    Raises:
        ModelFileError: the repository is incomplete or changed, or its library cannot be loaded on this machine.
        BackendUnavailable: there is no tritonserver, or its ONNX Runtime is too old for a model.
        IBNormError: a port is in use, or the server ends before it is ready; the message quotes its log.
    """
    options = _choose_ports(ServeOptions() if options is None else options)
    repository = Path(repository).resolve()
    check_repository(repository)
    binary = find_triton()
    check_models(repository, binary)
    with tempfile.TemporaryDirectory(prefix="ibnorm-triton.") as scratch:
        folder = Path(scratch)
        log = folder / "log" if options.log is None else options.log
        shared_memory = f"ibnorm_{os.getpid()}_{folder.name[-8:]}_"
        process = _start(binary, repository, options=options, folder=folder, log=log, shared_memory=shared_memory)
        server = TritonServer(process, options, log=log)
        try:
            server.wait_until_ready()
            yield server
        finally:
            server.stop()
            for region in Path("/dev/shm").glob(f"{shared_memory}*"):  # a killed backend process leaves its regions
                region.unlink(missing_ok=True)


def _start(
    binary: TritonBinary, repository: Path, *, options: ServeOptions, folder: Path, log: Path, shared_memory: str
) -> subprocess.Popen[bytes]:
    environment = dict(os.environ)
    if binary.root is None:
        command = [str(binary.path), f"--model-repository={stage_repository(repository, folder / 'repository')}"]
    else:
        command = [
            str(binary.path),
            f"--model-repository={repository}",
            f"--backend-directory={backend_folder(binary.root, folder / 'backends')}",
            f"--backend-config=python,shm-region-prefix-name={shared_memory}",
        ]
        environment |= python_environment(binary.root)
    with log.open("ab") as stream, _large_stacks():
        return subprocess.Popen(
            [*command, *_arguments(options)],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            env=environment,
            start_new_session=True,
        )


@contextlib.contextmanager
def _large_stacks() -> Iterator[None]:
    """Give the threads of processes started in the block 256 MiB of stack; only touched pages take memory.

    Triton 2.51 copies a JSON body onto the stack: with the usual 8 MiB, one request of 8 MB kills the server.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    wanted = _STACK_BYTES if hard == resource.RLIM_INFINITY else min(hard, _STACK_BYTES)
    resource.setrlimit(resource.RLIMIT_STACK, (wanted, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_STACK, (soft, hard))


def _arguments(options: ServeOptions) -> list[str]:
    return [
        f"--http-address={options.address}",
        f"--http-port={options.http_port}",
        f"--grpc-address={options.address}",
        f"--grpc-port={options.grpc_port}",
        f"--metrics-address={options.address}",
        f"--metrics-port={options.metrics_port}",
        f"--exit-timeout-secs={options.finish_s}",
        "--allow-gpu-metrics=false",
        "--disable-auto-complete-config",
        *_admin_arguments(options.admin),
    ]


def _admin_arguments(is_open: bool) -> list[str]:
    """Open or close what changes the server: traces write files, logs too, shared memory is that of other programs.

    Triton closes an endpoint by a header that a request must have; its value is kept secret. Without explicit control,
    models are neither loaded nor unloaded.
    """
    if is_open:
        return ["--model-control-mode=explicit", "--load-model=*"]
    closed = f"{','.join(_ADMIN_ENDPOINTS)}:ibnorm-closed={secrets.token_urlsafe(32)}"
    return [
        "--model-control-mode=none",
        f"--http-restricted-api={closed}",
        f"--grpc-restricted-protocol={closed}",
    ]


def _choose_ports(options: ServeOptions) -> ServeOptions:
    """Replace every port 0 by a free port.

    Raises:
        IBNormError: two ports are equal, a port is in use, or this machine does not have the address.
    """
    given = [port for port in (options.http_port, options.grpc_port, options.metrics_port) if port]
    if len(set(given)) < len(given):
        raise IBNormError(f"ports are {given}; they must differ")
    ports: list[int] = []
    with contextlib.ExitStack() as sockets:  # all stay open until every port is chosen, so that none is chosen twice
        for name in ("http", "grpc", "metrics"):
            port = getattr(options, f"{name}_port")
            stream = sockets.enter_context(bound_socket(options.address, port, option=f"--{name}-port"))
            ports.append(stream.getsockname()[1])
    http_port, grpc_port, metrics_port = ports
    return replace(options, http_port=http_port, grpc_port=grpc_port, metrics_port=metrics_port)


def _reachable(endpoint: str) -> str:
    return endpoint.replace("0.0.0.0:", "127.0.0.1:")
