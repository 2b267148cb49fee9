"""A model repository -> a running tritonserver on this machine, and its orderly end.

The server is NVIDIA's own binary: the one on PATH with its own backends, else the one that the package nvidia-pytriton
carries. That one has no ONNX Runtime backend, so `onnxruntime_backend/model.py` stands in for it and
reads the same config.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.resources
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Final

from ibnorm_export.artifacts.manifest import check_files, check_library, read_manifest
from ibnorm_export.errors import BackendUnavailable, IBNormError

__all__ = ["Server", "ServerOptions", "TritonBinary", "find_triton", "serve"]

_GET_ONE: Final = (
    "pip install --no-deps nvidia-pytriton==0.7.0 (the binary, 150 MB), or put tritonserver on PATH, or start the "
    "container that the repository's README.md names"
)
_PACKAGE: Final = "nvidia-pytriton"
_LIBRARY: Final = re.compile(r'op_library_filename\s*:\s*\[?\s*"([^"]*)"')
_STACK_BYTES: Final = 256 << 20
_LOG_LINES: Final = 4
_LOG_WIDTH: Final = 400
#: Tables, and what every machine without a GPU is told.
_LOG_NOISE: Final = re.compile(r"[|+]|.*CudaDriverHelper")
_LOG_ERROR: Final = re.compile(r"[EF]\d{4} |error")


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Where a server listens, and how long it may take.

    Args:
        address: to bind to.
        http_port, grpc_port, metrics_port: 0 takes one that is free.
        ready_s: most seconds until it is ready.
        finish_s: most seconds that requests in flight have to finish when it stops.
        log: file that the server's own log goes to; None keeps it until the end only.

    Raises:
        IBNormError: a value is outside its range.
    """

    address: str = "127.0.0.1"
    http_port: int = 8000
    _: KW_ONLY
    grpc_port: int = 8001
    metrics_port: int = 8002
    ready_s: float = 120.0
    finish_s: int = 5
    log: Path | None = None

    def __post_init__(self) -> None:
        ports = [self.http_port, self.grpc_port, self.metrics_port]
        if any(not 0 <= port <= 65535 for port in ports):
            raise IBNormError(f"ports are {ports}; each must be 0 (any that is free) to 65535")
        chosen = [port for port in ports if port]
        if len(set(chosen)) < len(chosen):
            raise IBNormError(f"ports are {ports}; they must differ")


@dataclass(frozen=True, slots=True)
class TritonBinary:
    """A tritonserver.

    Args:
        path: of the executable.
        root: folder of the package that carries it, with stubs and Python backend; None for one on PATH.
    """

    path: Path
    root: Path | None


def find_triton() -> TritonBinary:
    """The server on PATH, else the one that the package nvidia-pytriton carries.

    Raises:
        BackendUnavailable: there is none, or the packaged one cannot run here; says how to get one.
    """
    if found := shutil.which("tritonserver"):
        return TritonBinary(Path(found), None)
    try:
        package = importlib.metadata.distribution(_PACKAGE)
    except importlib.metadata.PackageNotFoundError as error:
        raise BackendUnavailable(f"no tritonserver on PATH, and {_PACKAGE} is not installed: {_GET_ONE}") from error
    root = Path(str(package.locate_file("pytriton/tritonserver")))
    binary = root / "bin" / "tritonserver"
    if not binary.is_file():
        raise BackendUnavailable(f"{binary} is missing from the installed {_PACKAGE}: {_GET_ONE}")
    return TritonBinary(binary, root)


class Server:
    """A tritonserver that is ready.

    Args:
        process: the server, leader of its own process group.
        address, http_port, grpc_port, metrics_port: where it listens.
        log: its log so far.
    """

    def __init__(self, process: subprocess.Popen[bytes], options: ServerOptions, *, log: Path) -> None:
        self._process = process
        self._options = options
        self._log = log
        self.http = f"{options.address}:{options.http_port}"
        self.grpc = f"{options.address}:{options.grpc_port}"
        self.metrics = f"{options.address}:{options.metrics_port}"

    @property
    def pid(self) -> int:
        """Of the server, and of its process group."""
        return self._process.pid

    def ready(self) -> bool:
        """Whether every model is loaded and warm."""
        try:
            with urllib.request.urlopen(f"http://{_reachable(self.http)}/v2/health/ready", timeout=1) as answer:
                return bool(answer.status == 200)
        except OSError:  # no answer, and an answer other than 200, both mean not yet
            return False

    def wait_until_ready(self) -> None:
        """Raises IBNormError, with the last lines of the server's log, when it ends or takes too long."""
        end = time.monotonic() + self._options.ready_s
        while not self.ready():
            self.check()
            if time.monotonic() > end:
                raise IBNormError(f"tritonserver is not ready after {self._options.ready_s:g} s; {self._last_words()}")
            time.sleep(0.05)

    def check(self) -> None:
        """Raise IBNormError, with the last lines of its log, where the server has ended by itself."""
        code = self._process.poll()
        if code is not None:
            how = f"was killed by signal {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            raise IBNormError(f"tritonserver {how}; {self._last_words()}")

    def wait(self) -> None:
        """Until the server ends by itself, which raises IBNormError as `check` does."""
        while True:
            self.check()
            time.sleep(0.2)

    def stop(self) -> None:
        """Refuse new requests, let those in flight finish, end everything that was started."""
        if self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):  # it hangs: the next lines kill it
                self._process.wait(self._options.finish_s + 3)
        with contextlib.suppress(ProcessLookupError):  # the whole group has ended, as it should
            os.killpg(self._process.pid, signal.SIGKILL)  # backend processes can outlive the server
        self._process.wait()

    def _last_words(self) -> str:
        text = self._log.read_text(encoding="utf-8", errors="replace")
        lines = [line[:_LOG_WIDTH] for line in text.splitlines() if line.strip() and not _LOG_NOISE.match(line)]
        told = [line for line in lines if _LOG_ERROR.match(line)] or lines
        return "its last words: " + " | ".join(told[-_LOG_LINES:])


@contextlib.contextmanager
def serve(repository: str | Path, options: ServerOptions | None = None) -> Iterator[Server]:
    """Run a tritonserver on a repository while the block runs; it is ready when the block begins.

    Args:
        repository: written by `package`; may be read-only.
        options: see `ServerOptions`.

    Raises:
        ModelFileError: the repository is incomplete, was changed, or has a library that cannot be loaded here.
        BackendUnavailable: there is no server on this machine.
        IBNormError: a port is in use, or the server ends before it is ready; its last log lines follow.
    """
    options = _with_ports(ServerOptions() if options is None else options)
    repository = Path(repository).resolve()
    _check(repository)
    binary = find_triton()
    with tempfile.TemporaryDirectory(prefix="ibnorm-triton.") as scratch:
        folder = Path(scratch)
        log = folder / "log" if options.log is None else options.log
        shared_memory = f"ibnorm_{os.getpid()}_{folder.name[-8:]}_"
        environment = dict(os.environ)
        if binary.root is None:
            command = [str(binary.path), f"--model-repository={_staged(repository, folder / 'repository')}"]
        else:
            command = [
                str(binary.path),
                f"--model-repository={repository}",
                f"--backend-directory={_backends(binary.root, folder / 'backends')}",
                f"--backend-config=python,shm-region-prefix-name={shared_memory}",
            ]
            environment |= _python_environment(binary.root)
        with log.open("wb") as stream, _large_stacks():
            process = subprocess.Popen(
                [*command, *_listen(options)],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                env=environment,
                start_new_session=True,
            )
        server = Server(process, options, log=log)
        try:
            server.wait_until_ready()
            yield server
        finally:
            server.stop()
            for region in Path("/dev/shm").glob(f"{shared_memory}*"):  # left where a backend process was killed
                region.unlink(missing_ok=True)


@contextlib.contextmanager
def _large_stacks() -> Iterator[None]:
    """What is started in the block gives its threads 256 MiB of stack, of which only what is touched takes memory.

    Triton 2.51 copies a JSON body onto the stack: with the usual 8 MiB, one request of 8 MB kills the server.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    wanted = _STACK_BYTES if hard == resource.RLIM_INFINITY else min(hard, _STACK_BYTES)
    resource.setrlimit(resource.RLIMIT_STACK, (wanted, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_STACK, (soft, hard))


def _check(repository: Path) -> None:
    """Every file is the one that was packaged, and no config names a library that the manifest does not."""
    manifest = read_manifest(repository)
    check_files(repository, manifest)
    for config in sorted(repository.glob("*/config.pbtxt")):
        for declared in _LIBRARY.findall(config.read_text(encoding="utf-8")):
            check_library(repository, f"{config.parent.name}/{Path(declared).name}", manifest=manifest)


def _listen(options: ServerOptions) -> list[str]:
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
    ]


def _with_ports(options: ServerOptions) -> ServerOptions:
    """`options` with free ports for the zeros.

    Raises:
        IBNormError: a port that was asked for is in use, or the address is none of this machine's.
    """
    chosen: dict[str, int] = {}
    with contextlib.ExitStack() as held:  # until all are chosen, so that none is chosen twice
        for name in ("http_port", "grpc_port", "metrics_port"):
            port = getattr(options, name)
            stream = held.enter_context(socket.socket())
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                stream.bind((options.address, port))
            except OSError as error:
                option = f"--{name.replace('_', '-')}"
                raise IBNormError(
                    f"cannot listen on {options.address}:{port}: {error.strerror}; choose another with {option}, "
                    "or 0 for any that is free"
                ) from error
            chosen[name] = stream.getsockname()[1]
    return ServerOptions(options.address, **chosen, ready_s=options.ready_s, finish_s=options.finish_s, log=options.log)


def _reachable(endpoint: str) -> str:
    return endpoint.replace("0.0.0.0:", "127.0.0.1:")


def _staged(repository: Path, folder: Path) -> Path:
    """The repository for a server whose own backend takes op libraries by absolute path.

    It is `repository` itself where those paths exist; else links to it, with configs that name the libraries here.
    """
    folder.mkdir()
    moved = False
    for model in sorted(path for path in repository.iterdir() if path.is_dir()):
        (folder / model.name).mkdir()
        for entry in model.iterdir():
            if entry.name != "config.pbtxt":
                (folder / model.name / entry.name).symlink_to(entry)
        text = (model / "config.pbtxt").read_text(encoding="utf-8")
        here = text
        for declared in _LIBRARY.findall(text):
            here = here.replace(f'"{declared}"', f'"{model / Path(declared).name}"')
        moved |= here != text
        (folder / model.name / "config.pbtxt").write_text(here, encoding="utf-8")
    return folder if moved else repository


def _backends(root: Path, folder: Path) -> Path:
    """A backend folder for the packaged binary: its Python backend, and ours under the name onnxruntime."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = root / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.is_file():
        raise BackendUnavailable(f"{_PACKAGE} has no Python backend for Python {version}: {_GET_ONE}")
    (folder / "python").mkdir(parents=True)
    for file in (*(root / "backends" / "python").glob("*.*"), stub):
        shutil.copy(file, folder / "python" / file.name)  # the server refuses links that leave the folder
    ours = importlib.resources.files("ibnorm_export.serving.triton").joinpath("onnxruntime_backend", "model.py")
    (folder / "onnxruntime").mkdir()
    shutil.copyfile(str(ours), folder / "onnxruntime" / "model.py")
    return folder


def _python_environment(root: Path) -> dict[str, str]:
    """What the backend's processes need to be this Python, with its packages."""
    library = sysconfig.get_config_var("INSTSONAME") or ""
    places = [sysconfig.get_config_var("LIBDIR") or "", "/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu"]
    place = next((place for place in places if place and (Path(place) / str(library)).is_file()), None)
    if place is None or ".so" not in str(library):
        raise BackendUnavailable(
            f"the Python backend of {_PACKAGE} needs a Python with a shared library, which {sys.executable} lacks; "
            "install libpython (Debian: libpython3-dev), use such a Python, or put a tritonserver on PATH"
        )
    paths = [place, str(root.parent.parent / "nvidia_pytriton.libs"), os.environ.get("LD_LIBRARY_PATH", "")]
    return {
        "LD_LIBRARY_PATH": os.pathsep.join(path for path in paths if path),
        # the stub reads no PYTHONPATH: it is the Python that it finds on PATH, with that one's packages
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath))),
    }
