"""ONNX Runtime for JavaScript as a runner: one process of Node for each runner, which runs `driver.mjs`."""

from __future__ import annotations

import contextlib
import importlib.resources
import json
import os
import struct
import subprocess
import tempfile
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
from numpy.typing import NDArray

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.runtime_versions import ONNX_RUNTIME, version_problem
from ibnorm_export.artifacts.tensors import Arrays
from ibnorm_export.errors import BackendUnavailable, ModelFileError, shortened
from ibnorm_export.runtimes.in_place import CachePasser
from ibnorm_export.runtimes.node.packages import find_node, find_package
from ibnorm_export.runtimes.runner import Backend
from ibnorm_export.usable_cores import default_threads

__all__ = ["NodeRunner"]

#: Type names of ONNX Runtime for JavaScript, and NumPy's types with the same bytes.
_NUMPY_TYPES: Final[Mapping[str, Any]] = {
    "float32": np.dtype("<f4"),
    "float64": np.dtype("<f8"),
    "float16": np.dtype("<f2"),
    "int8": np.dtype("i1"),
    "int32": np.dtype("<i4"),
    "int64": np.dtype("<i8"),
    "uint8": np.dtype("u1"),
    "bool": np.dtype("?"),
}

#: The same names by the short names of element types in `ExportedModel`.
_TYPES: Final = {"fp32": "float32", "fp64": "float64", "fp16": "float16", "int64": "int64", "int32": "int32"}

#: How long a process may take to end by itself, in s.
_PATIENCE_S: Final = 5.0


def _stop(process: subprocess.Popen[bytes], replies: IO[bytes], log: IO[bytes]) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it has ended already
        process.stdin.close()  # the driver ends when there are no more requests
    try:
        process.wait(_PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    replies.close()
    log.close()


class NodeRunner:
    """A session of onnxruntime-web (WebAssembly) or onnxruntime-node in Node. Norms run as functions.

    The process ends with the runner, and with this process if that is killed.

    Args:
        backend: which package runs the model.
        model: the file.
        threads: number of threads; None is the runtime's default, or fewer where the process may use fewer cores.
        npm: the folder given to `npm install --prefix`; None looks in the current folder and those above it.

    Raises:
        BackendUnavailable: Node or the package is not installed, does not start, or is too old for the file.
        ModelFileError: the runtime cannot load the model; the message quotes the runtime's own.
    """

    #: Whether its threads keep a core busy for a while after a pass.
    spins = True

    def __init__(
        self, backend: Backend, model: ExportedModel, *, threads: int | None = None, npm: Path | None = None
    ) -> None:
        self.name: str = backend
        node, package = find_node(backend), find_package(backend, npm)
        self._label = f"{package.name} {package.version}"
        install = f"npm install --ignore-scripts --prefix {package.folder} '{package.name}@>={{version}}'"
        if problem := version_problem(model, ONNX_RUNTIME, version=package.version, install=install):
            raise BackendUnavailable(f"backend {backend}: {problem}")
        self._types = {tensor.name: _TYPES.get(tensor.dtype, tensor.dtype) for tensor in model.inputs}
        self._cache = CachePasser(model)
        self._start(node)
        opened = self._ask(
            {
                "call": "open",
                "package": package.name,
                "folder": str(package.folder),
                "model": str(model.path.resolve()),
                "external": _external_data(model),
                "threads": default_threads() if threads is None else threads,
            }
        )
        if "error" in opened:
            raise _refusal(f"{model.path}: {self._label} cannot load it", opened["error"])
        self._outputs = [tensor.name for tensor in model.outputs]

    def _start(self, node: Path) -> None:
        reading, writing = os.pipe()
        driver = importlib.resources.files("ibnorm_export.runtimes.node").joinpath("driver.mjs")
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # open as long as the process; `_stop` closes it
        try:
            self._process = subprocess.Popen(
                [node, str(driver), str(writing)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=self._log,
                pass_fds=[writing],
            )
        except OSError as error:
            os.close(reading)
            self._log.close()
            raise BackendUnavailable(f"{node} does not start: {error.strerror}; install Node again") from error
        finally:
            os.close(writing)
        self._replies = os.fdopen(reading, "rb")
        self._end = weakref.finalize(self, _stop, self._process, self._replies, self._log)

    def run(self, inputs: Arrays) -> Arrays:
        return self._cache.run(self._run, inputs)

    def timed(self, inputs: Arrays) -> Callable[[], float]:
        """See `DeviceRunner`. Node's clock measures the pass, without the way of the tensors between the processes."""
        self._run(self._cache.with_room(inputs))

        def once() -> float:
            return float(self._answer({"call": "time"})["ms"])

        return once

    def _run(self, inputs: Arrays) -> Arrays:
        tensors, data = [], []
        for name, array in inputs.items():
            kind = self._types[name]
            converted = np.ascontiguousarray(array.astype(_NUMPY_TYPES[kind], copy=False))
            data.append(converted)
            tensors.append({"name": name, "type": kind, "shape": converted.shape, "bytes": converted.nbytes})
        answer = self._answer({"call": "run", "tensors": tensors}, data)
        found = {tensor["name"]: self._read_tensor(tensor) for tensor in answer["tensors"]}
        return {name: found[name] for name in self._outputs}

    def _answer(self, request: Mapping[str, Any], data: list[NDArray[Any]] | None = None) -> dict[str, Any]:
        """The reply to a request.

        Raises:
            ModelFileError: the runtime reports an error.
        """
        answer = self._ask(request, data)
        if "error" in answer:
            raise _refusal(f"{self._label} cannot run the model", answer["error"])
        return answer

    def _ask(self, request: Mapping[str, Any], data: list[NDArray[Any]] | None = None) -> dict[str, Any]:
        header = json.dumps(request).encode()
        stream = self._process.stdin
        assert stream is not None
        try:
            stream.write(struct.pack("<I", len(header)) + header)
            for array in data or ():
                stream.write(array.data if array.size else b"")
            stream.flush()
            (length,) = struct.unpack("<I", self._read(4))
            answer: dict[str, Any] = json.loads(self._read(length))
        except BrokenPipeError as error:
            raise self._gone() from error
        return answer

    def _read(self, count: int) -> bytes:
        found = self._replies.read(count)
        if len(found) < count:
            raise self._gone()
        return found

    def _read_tensor(self, tensor: Mapping[str, Any]) -> NDArray[Any]:
        dtype = _NUMPY_TYPES[tensor["type"]]
        return np.frombuffer(bytearray(self._read(tensor["bytes"])), dtype).reshape(tensor["shape"])

    def _gone(self) -> BackendUnavailable:
        """The error where the process has ended, e.g. because a package is damaged or memory was short."""
        code = self._process.wait()
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        said = next((line for line in lines if "Error" in line), lines[-1] if lines else "it printed nothing")
        return BackendUnavailable(f"{self._label}: the process of Node ended with code {code}: {shortened(said)}")


def _external_data(model: ExportedModel) -> list[tuple[str, str]]:
    """Name in the model and path of every file of external data."""
    folder = model.path.parent
    return [(file.relative_to(folder).as_posix(), str(file.resolve())) for file in model.external_files]


def _refusal(what: str, said: str) -> ModelFileError:
    text = shortened(" ".join(said.split()))
    return ModelFileError(
        f"{what}: {text}; export it again with --for web and --dtype fp32, or install a newer version of the package"
    )
