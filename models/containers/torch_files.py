"""Files of torch.save: zip archives, and the older format of pickles in a row. No code of a file runs.

Format: torch/serialization.py of PyTorch 2.13. A zip archive has one folder with data.pkl and a record data/KEY for
every storage, uncompressed. The older format is five pickles (a magic number, a version, facts about the machine, the
content, the keys of its storages), and then each storage as a count of 8 bytes and its elements.

`torch.load(weights_only=True, mmap=True)` is not used. It reads a storage that is larger than its record, or a record
that is compressed, as whatever bytes are there, and it cannot read subclasses of dict or pickles of protocol 4.
Further classes can be allowed for the whole process only.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch

from ibnorm_export.errors import CheckpointError, quoted
from ibnorm_export.models.containers.plain_classes import plain_classes
from ibnorm_export.models.containers.safe_pickle import Allowed, RefusedClassError, UnreadableError, read_pickle, shown
from ibnorm_export.models.containers.stored_tensors import DenseTensor, OtherTensor, Storage, map_file

__all__ = ["read_torch_bytes", "read_torch_file"]

_MAGIC: Final = 0x1950A86A20F9469CFC6C
_VERSION: Final = 1001

#: The first bytes of files that are often taken for weights, and what they are.
_OTHER_FORMATS: Final = {
    b"\x89HDF": "an HDF5 file (Keras)",
    b"GGUF": "a GGUF file",
    b"\x1f\x8b": "a gzip archive; unpack it",
    b"\x93NUMPY": "a NumPy array",
    b"\x28\xb5\x2f\xfd": "a Zstandard archive; unpack it",
    b"version https://git-lfs": "a Git LFS pointer; run `git lfs pull` to fetch the file itself",
}

#: Storage classes, in the modules `torch` and `torch.cuda`, and the type of their elements.
_STORAGES: Final = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "QInt8Storage": torch.qint8,
    "QUInt8Storage": torch.quint8,
    "QInt32Storage": torch.qint32,
    "UntypedStorage": torch.uint8,
}


def _shape(sizes: object) -> tuple[int, ...]:
    if not isinstance(sizes, (tuple, list)) or not all(isinstance(n, int) for n in sizes):
        raise UnreadableError("the shape of a tensor is damaged")
    return tuple(sizes)


def _dense(storage: object, offset: object, size: object, stride: object, *, dtype: object) -> Any:
    shape, steps = _shape(size), _shape(stride)
    if isinstance(storage, OtherTensor):
        return OtherTensor(storage.kind, shape)
    if not isinstance(storage, Storage) or not isinstance(offset, int) or len(shape) != len(steps):
        raise UnreadableError("a tensor has no storage")
    if not isinstance(dtype, torch.dtype):
        raise UnreadableError("a tensor has no type")
    return DenseTensor(storage, offset=offset, shape=shape, stride=steps, dtype=dtype)


def _rebuild(storage: object, offset: object, size: object, stride: object, *flags: object) -> Any:
    tensor = _dense(storage, offset, size, stride, dtype=getattr(storage, "element", torch.uint8))
    if len(flags) > 2 and isinstance(flags[2], dict) and any(flags[2].values()):
        return OtherTensor("a lazily negated or conjugated view; save tensor.resolve_neg()", tensor.shape)
    return tensor


def _rebuild_v3(storage: object, offset: object, size: object, stride: object, *rest: object) -> Any:
    if len(rest) < 3:
        raise UnreadableError("a tensor has no type")
    return _dense(storage, offset, size, stride, dtype=rest[2])


def _same(data: object = None, *_flags: object) -> Any:
    """A parameter or buffer: the tensor that it wraps."""
    if not isinstance(data, (DenseTensor, OtherTensor)):
        raise UnreadableError("a parameter has no tensor")
    return data


def _rebuild_from_type(function: object, _kind: object, arguments: object, _state: object) -> Any:
    if not isinstance(function, Allowed) or not isinstance(arguments, tuple):
        raise UnreadableError("a tensor is damaged")
    return _same(function.make(*arguments))


def _other(kind: str) -> Callable[..., OtherTensor]:
    return lambda *_arguments: OtherTensor(kind)


def _tensor_classes() -> dict[str, Any]:
    makers: dict[str, Callable[..., Any]] = {
        "torch._utils._rebuild_tensor": _rebuild,
        "torch._utils._rebuild_tensor_v2": _rebuild,
        "torch._utils._rebuild_tensor_v3": _rebuild_v3,
        "torch._utils._rebuild_parameter": _same,
        "torch._utils._rebuild_parameter_with_state": _same,
        "torch.nn.parameter.Parameter": _same,
        "torch.nn.parameter.Buffer": _same,
        "torch.Tensor": _same,
        "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
        "torch._utils._rebuild_qtensor": _other("quantised; save the floating-point weights"),
        "torch._utils._rebuild_sparse_tensor": _other("sparse; save tensor.to_dense()"),
        "torch._utils._rebuild_nested_tensor": _other("a nested tensor"),
        "torch._utils._rebuild_meta_tensor_no_storage": _other("on the meta device, so it has no values"),
    }
    storages = {f"{module}.{name}": dtype for name, dtype in _STORAGES.items() for module in ("torch", "torch.cuda")}
    storages["torch.storage.UntypedStorage"] = torch.uint8
    schemes = {
        str(found): str(found) for name in dir(torch) if isinstance(found := getattr(torch, name), torch.qscheme)
    }
    return {name: Allowed(name, make) for name, make in makers.items()} | storages | schemes


class _Storages:
    """The storages that a pickle refers to, by key."""

    def __init__(self, find: Callable[[str], memoryview | None]) -> None:
        self.by_key: dict[str, Storage] = {}
        self._find = find

    def __call__(self, pid: object) -> Any:
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage":
            raise UnreadableError("it refers to something that is not a storage")
        _, element, key, location, elements, *view = pid
        if not isinstance(element, torch.dtype) or not isinstance(key, str) or not isinstance(elements, int):
            raise UnreadableError("a storage is damaged")
        if location == "meta":
            return OtherTensor("on the meta device, so it has no values")
        if view and view[0] is not None:
            raise UnreadableError("a storage is a view of another, as before PyTorch 0.4: load and save the file again")
        if key not in self.by_key:
            self.by_key[key] = Storage(element, elements, self._find(key))
        return self.by_key[key]


def _record(data: memoryview, entry: zipfile.ZipInfo) -> memoryview:
    """The bytes of an uncompressed record of a zip archive."""
    start = entry.header_offset
    header = bytes(data[start : start + 30])
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise UnreadableError(f"the record {quoted(entry.filename)} is damaged")
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
        raise UnreadableError("its records are compressed or encrypted, which torch.save never does; pack it again")
    name, extra = struct.unpack("<HH", header[26:30])
    start += 30 + name + extra
    if start + entry.file_size > len(data):
        raise UnreadableError(f"the record {quoted(entry.filename)} ends after the file")
    return data[start : start + entry.file_size]


def _read_zip(data: memoryview) -> Any:
    try:
        with zipfile.ZipFile(io.BufferedReader(_View(data))) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            unique = len(entries) == len(archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
        raise UnreadableError(f"the archive is damaged: {error}") from error
    folders = [name.removesuffix("data.pkl") for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(folders) != 1 or not unique:
        raise UnreadableError("it is a zip archive, but not one of torch.save")
    folder = folders[0]
    if f"{folder}constants.pkl" in entries:
        raise UnreadableError(
            "it is a TorchScript program, which contains code; save its weights: "
            'torch.save(torch.jit.load(path).state_dict(), "weights.pt")'
        )
    order = entries.get(f"{folder}byteorder")
    if order is not None and bytes(_record(data, order)) != b"little":
        raise UnreadableError("it was saved on a big-endian machine; load and save it on a little-endian one")

    def find(key: str) -> memoryview | None:
        entry = entries.get(f"{folder}data/{key}")
        return None if entry is None else _record(data, entry)

    content = io.BytesIO(_record(data, entries[f"{folder}data.pkl"]))
    return read_pickle(content, {**plain_classes(), **_tensor_classes()}, storage=_Storages(find))


def _read_legacy(data: memoryview) -> Any:
    stream = io.BufferedReader(_View(data))
    allowed = {**plain_classes(), **_tensor_classes()}
    storages = _Storages(lambda key: None)
    try:
        known = read_pickle(stream, {}) == _MAGIC and read_pickle(stream, {}) == _VERSION
    except RefusedClassError as error:
        raise UnreadableError(f"it is a pickle that starts with {error.name}") from error
    if not known:
        raise UnreadableError("it is a pickle of something else")
    machine = read_pickle(stream, {})
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise UnreadableError("it was saved on a big-endian machine; load and save it on a little-endian one")
    content = read_pickle(stream, allowed, storage=storages)
    keys = read_pickle(stream, {})
    if not isinstance(keys, list):
        raise UnreadableError("the list of its storages is damaged")
    place = stream.tell()
    for key in keys:
        storage = storages.by_key.get(key) if isinstance(key, str) else None
        if storage is None or storage.data is not None or len(count := data[place : place + 8]) < 8:
            raise UnreadableError("the list of its storages is damaged, or the file is truncated")
        (elements,) = struct.unpack("<q", count)
        size = elements * storage.element.itemsize
        if elements != storage.elements or place + 8 + size > len(data):
            raise UnreadableError("a storage is not of the size that the file gives, or the file is truncated")
        storage.data = data[place + 8 : place + 8 + size]
        place += 8 + size
    return content


class _View(io.RawIOBase):
    """Bytes in memory as a stream, without a copy of them all."""

    def __init__(self, data: memoryview) -> None:
        self._data, self._place = data, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: len(self._data)}[whence]
        if start + offset < 0:
            raise ValueError("a place before the start of the file")
        self._place = start + offset
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        part = self._data[self._place : self._place + len(buffer)]
        buffer[: len(part)] = part
        self._place += len(part)
        return len(part)


def read_torch_bytes(data: memoryview, source: str) -> Any:
    """The content of a file of torch.save, with a `StoredTensor` for each tensor.

    Args:
        data: the whole file, or a part that is itself a file.
        source: what to call it in messages.

    Raises:
        CheckpointError: it is damaged or of another kind, or it contains a class that is not plain data.
    """
    for start, what in _OTHER_FORMATS.items():
        if bytes(data[: len(start)]) == start:
            raise CheckpointError(f"{source} is {what}; it must be a file of torch.save or a safetensors file")
    if bytes(data[257:262]) == b"ustar":
        raise CheckpointError(
            f"{source} is a tar archive; unpack it. If PyTorch before 0.1.10 wrote it, load and save it again"
        )
    try:
        content = _read_zip(data) if bytes(data[:4]) == b"PK\x03\x04" else _read_legacy(data)
    except RefusedClassError as error:
        raise CheckpointError(
            f"{source} contains {error.name}, which is not plain data: loading it would run code, so nothing was "
            'loaded. Save only the weights in your training code: torch.save(model.state_dict(), "weights.pt")'
            f"{_hint(error.name)}"
        ) from error
    except UnreadableError as error:
        raise CheckpointError(f"{source} is truncated, or is not a file of torch.save: {shown(error)}") from error
    return content


def _hint(name: str) -> str:
    if name.startswith("torch.distributed"):
        return (
            ". For sharded tensors: torch.distributed.checkpoint.state_dict.get_model_state_dict(model, "
            "options=StateDictOptions(full_state_dict=True)) gives a plain state dict"
        )
    return ""


def read_torch_file(path: Path) -> Any:
    """The content of a file of torch.save; see `read_torch_bytes`. Its tensors are mapped, not read."""
    return read_torch_bytes(map_file(path), str(path))
