"""Build the plugin library with emulated kernels, and call it as TensorRT would."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ibnorm_export.op.spec import IBNormSpec
from tests.support import cuda_emulator

ROOT = cuda_emulator.ROOT
CACHE = ROOT / ".cache" / "tensorrt"
PLUGIN = ROOT / "custom_ops" / "tensorrt"
#: The mock of TensorRT, in C++.
MOCK = ROOT / "tests" / "custom_ops" / "tensorrt"
#: nvinfer1::DataType of the data types, nvinfer1::PluginFieldType of the fields.
DATA_TYPES = {"float32": 0, "float16": 1, "bfloat16": 7}
FIELD_TYPES = {"float16": 0, "float32": 1, "float64": 2, "int8": 3, "int16": 4, "int32": 5, "char": 6, "int64": 10}
LINEAR = 0


def headers() -> Path | None:
    """Find TensorRT's headers: those of an installed SDK, otherwise those in the cache."""
    given = os.environ.get("TENSORRT_INCLUDE_DIR")
    places = [Path(given)] if given else [Path("/usr/include"), Path("/usr/include/x86_64-linux-gnu")]
    places.append(ROOT / ".cache" / "headers" / "tensorrt")
    return next((place for place in places if (place / "NvInferRuntime.h").is_file()), None)


def _compile(sources: list[Path], include: Path, name: str, link: tuple[str, ...]) -> Path:
    cxx = cuda_emulator.compiler()
    if cxx is None:
        raise RuntimeError("no C++ compiler: install g++ 12 or set CXX")
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
    flags += [f"-I{ROOT / 'custom_ops' / 'include'}", f"-I{PLUGIN}", f"-I{MOCK / 'include'}"]
    command = [cxx, *flags, "-isystem", str(include), *map(str, sources), *link]
    digest = hashlib.sha256("\0".join(command).encode())
    headers_read = [*PLUGIN.glob("*.h"), *PLUGIN.glob("*.map"), *(ROOT / "custom_ops" / "include").rglob("*.h")]
    for file in [*sources, *sorted(headers_read)]:
        digest.update(file.read_bytes())
    made = CACHE / digest.hexdigest()[:20] / name
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        new = made.with_suffix(f".{os.getpid()}.new")
        done = subprocess.run([*command, "-o", str(new)], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{name} does not compile:\n{done.stderr[-4000:]}")
        new.rename(made)
    return made


def build_harness(include: Path) -> Path:
    """Build the mock of TensorRT, which exports its functions."""
    return _compile([MOCK / "harness.cc"], include, "libharness.so", ("-fvisibility=default", "-ldl"))


def build_plugin(include: Path, folder: Path = PLUGIN) -> Path:
    """The plugin library with the emulated kernels in the place of the compiled ones.

    Args:
        include: TensorRT's headers.
        folder: custom_ops/tensorrt, or a copy with a planted bug.
    """
    kernels = cuda_emulator.build(cuda_emulator.CACHE)
    sources = [folder / name for name in ("library.cc", "plugin.cc", "fields.cc")]
    link = (str(kernels), f"-Wl,-rpath,{kernels.parent}", f"-Wl,--version-script={PLUGIN / 'exports.map'}")
    return _compile(sources, include, "libibnorm_trt.so", (*link, "-static-libstdc++", "-static-libgcc"))


def build_register(include: Path, plugin: Path) -> Path:
    """Build the registering library next to `plugin`."""
    made = _compile([PLUGIN / "register.cc"], include, "libibnorm_trt_register.so", ("-ldl",))
    target = plugin.parent / made.name
    target.write_bytes(made.read_bytes())
    return target


Fields = Mapping[str, tuple[str, Any]]


def fields_of(spec: IBNormSpec) -> dict[str, tuple[str, Any]]:
    """Convert a node's attributes as TensorRT's parser does: FLOAT is kFLOAT32, INT is kINT32."""
    return {"lambd": ("float32", spec.lambd), "epsilon": ("float32", spec.epsilon), "axis": ("int32", -1)}


def _bytes(kind: str, value: Any) -> tuple[bytes, int]:
    if kind == "char":
        return value, len(value)
    array = np.atleast_1d(np.asarray(value, kind))
    return array.tobytes(), array.size


class Tensor(NamedTuple):
    """What a plugin is told about one tensor."""

    shape: tuple[int, ...]
    dtype: str  # a key of DATA_TYPES
    address: int


class Refused(Exception):
    """The plugin, or the harness on its behalf, returned an error."""


class Plugin:
    """One plugin in an execution context, after create, clone, serialise, create again and attach.

    Raises:
        Refused: a step failed.
    """

    def __init__(self, harness: Path, library: Path, op_type: str, fields: Fields) -> None:
        self._mock = ctypes.CDLL(str(harness))
        self._mock.harness_open.restype = ctypes.c_void_p
        self._mock.harness_timing_id.restype = ctypes.c_char_p
        self._mock.harness_workspace.restype = ctypes.c_size_t
        names = [name.encode() for name in fields]
        data = [_bytes(kind, value) for kind, value in fields.values()]
        count = len(names)
        text = ctypes.create_string_buffer(400)
        session = self._mock.harness_open(
            str(library).encode(),
            op_type.encode(),
            count,
            (ctypes.c_char_p * count)(*names),
            (ctypes.c_int * count)(*[FIELD_TYPES[kind] for kind, _ in fields.values()]),
            (ctypes.c_char_p * count)(*[raw for raw, _ in data]),
            (ctypes.c_int * count)(*[size for _, size in data]),
            text,
            ctypes.c_size_t(len(text)),
        )
        if not session:
            raise Refused(text.value.decode())
        self._session = ctypes.c_void_p(session)
        self.inputs, self.outputs = (4, 2) if op_type.startswith("Skip") else (3, 1)

    def close(self) -> None:
        self._mock.harness_close(self._session)

    @property
    def fields(self) -> tuple[float, float, int]:
        """lambd, epsilon and axis as the attached plugin would serialise them."""
        lambd, epsilon, axis = ctypes.c_float(), ctypes.c_float(), ctypes.c_int32()
        count = self._mock.harness_fields(self._session, ctypes.byref(lambd), ctypes.byref(epsilon), ctypes.byref(axis))
        assert count == 3
        return lambd.value, epsilon.value, axis.value

    @property
    def timing_cache_id(self) -> str:
        return str(self._mock.harness_timing_id(self._session).decode())

    @property
    def workspace(self) -> int:
        """Bytes of workspace plus number of tactics."""
        return int(self._mock.harness_workspace(self._session, self.inputs, self.outputs))

    def supports(self, types: list[int], formats: list[int] | None = None, inputs: int | None = None) -> bool:
        """Whether these types (nvinfer1::DataType) are taken, inputs first."""
        count = self.inputs if inputs is None else inputs
        whole = (ctypes.c_int * len(types))(*types)
        form = (ctypes.c_int * len(types))(*(formats or [LINEAR] * len(types)))
        return bool(self._mock.harness_supports(self._session, count, len(types) - count, whole, form))

    def infer(self, rank: int, dtype: int, inputs: int | None = None) -> list[int] | None:
        """Output types where every output has X's own dimensions, else None."""
        out = (ctypes.c_int * self.outputs)()
        count = self.inputs if inputs is None else inputs
        done = self._mock.harness_infer(self._session, count, self.outputs, rank, dtype, out)
        return list(out) if done == 1 else None

    def run(self, inputs: list[NDArray[Any]], outputs: list[NDArray[Any]]) -> int:
        """`enqueue` on arrays of the host, which is where the emulated kernels run."""
        return self.enqueue(
            *([Tensor(a.shape, a.dtype.name, a.ctypes.data) for a in side] for side in (inputs, outputs))
        )

    def enqueue(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], stream: int | None = None) -> int:
        """Code of enqueue, or 1000 + that of onShapeChange."""
        tensors = [*inputs, *outputs]
        count = len(tensors)
        flat = [size for tensor in tensors for size in tensor.shape]
        return int(
            self._mock.harness_run(
                self._session,
                len(inputs),
                len(outputs),
                (ctypes.c_int * count)(*[len(tensor.shape) for tensor in tensors]),
                (ctypes.c_int64 * len(flat))(*flat),
                (ctypes.c_int * count)(*[DATA_TYPES[tensor.dtype] for tensor in tensors]),
                (ctypes.c_void_p * count)(*[tensor.address for tensor in tensors]),
                ctypes.c_void_p(stream),
            )
        )


def describe(harness: Path, library: Path) -> dict[str, dict[str, int]]:
    """List the creators of a library, and the fields that each requests from the parser."""
    text = ctypes.create_string_buffer(4000)
    count = ctypes.CDLL(str(harness)).harness_describe(str(library).encode(), text, ctypes.c_size_t(len(text)))
    lines = [line.split() for line in text.value.decode().splitlines()]
    assert count == len(lines)
    return {name: {f.split(":")[0]: int(f.split(":")[1]) for f in fields} for name, *fields in lines}
