"""Files of torch.save: every kind of content in both formats, and files that are damaged or hostile."""

from __future__ import annotations

import argparse
import collections
import datetime
import decimal
import io
import pathlib
import pickle
import struct
import sys
import uuid
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ibnorm_export.errors import CheckpointError
from ibnorm_export.models.containers import read_checkpoint
from ibnorm_export.models.containers.safe_pickle import UnreadableError, read_pickle

BASE = torch.arange(42, dtype=torch.float32).reshape(6, 7)

#: A state dict with every kind of dense tensor.
STATE: dict[str, Tensor] = {
    "base": BASE,
    "view": BASE[1:3, 2:],
    "transposed": BASE.t(),
    "expanded": torch.ones(1).expand(5, 5),
    "empty": torch.empty(0, 3),
    "scalar": torch.tensor(3.5),
    "parameter": nn.Parameter(torch.tensor([1.0, 2.0])),
    "buffer": nn.Buffer(torch.tensor([1.0, 2.0])),
    "bool": torch.tensor([True, False]),
    **{
        str(dtype).removeprefix("torch."): torch.tensor([1, 2, 3]).to(dtype)
        for dtype in (
            *(torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn),
            *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16),
        )
    },
}

#: Settings as training codes keep them, and the plain data that they become.
SETTINGS = argparse.Namespace(
    out=pathlib.PurePosixPath("/runs/1"),
    rate=np.float64(3e-4),
    steps=np.int32(7),
    flag=np.bool_(True),
    array=np.arange(6).reshape(2, 3),
    nested=collections.defaultdict(list, {"a": [1, (2, 3)]}),
    ordered=collections.OrderedDict(b=1),
    counted=collections.Counter("aab"),
    queue=collections.deque([1, 2], maxlen=3),
    took=datetime.timedelta(seconds=90),
    chosen={1, 2},
    raw=b"xy",
    steps_of=range(3),
    dtype=torch.bfloat16,
    device=torch.device("cpu"),
    size=torch.Size([2, 3]),
    version=torch.__version__,
    loss=torch.tensor(0.5),
    none=None,
)
PLAIN = {
    "out": "/runs/1",
    "rate": 3e-4,
    "steps": 7,
    "flag": True,
    "array": [[0, 1, 2], [3, 4, 5]],
    "nested": {"a": [1, (2, 3)]},
    "ordered": {"b": 1},
    "counted": {"a": 2, "b": 1},
    "queue": [1, 2],
    "took": "0:01:30",
    "chosen": [1, 2],
    "raw": b"xy",
    "steps_of": [0, 1, 2],
    "dtype": "bfloat16",
    "device": "cpu",
    "size": (2, 3),
    "version": str(torch.__version__),
    "loss": 0.5,
    "none": None,
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("name", "protocol"),
    [
        ("w.pt", 2),
        ("w.pt", 4),
        ("w.pt", 5),
        ("w.pth", 2),
        ("w.pth.tar", 2),
        ("w.ckpt", 2),
        ("w.bin", 2),
        ("weights", 2),
    ],
)
def test_every_kind_of_tensor_and_setting(tmp_path: Path, name: str, zipped: bool, protocol: int) -> None:
    content = {"model": STATE, "args": SETTINGS, "epoch": 3}
    torch.save(content, tmp_path / name, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    read = read_checkpoint(tmp_path / name)
    assert list(read.state) == list(STATE)
    for key, wanted in STATE.items():
        tensor = read.state[key]
        assert (tensor.dtype, tensor.shape) == (wanted.dtype, wanted.shape), key
        assert torch.equal(tensor.to(torch.float64), wanted.detach().to(torch.float64)), key
    assert read.extras == {"args": PLAIN, "epoch": 3}
    assert read.files == (tmp_path / name,)
    assert read.notes == ()


def test_tensors_share_memory_as_they_did(tmp_path: Path) -> None:
    torch.save({"a": BASE, "tied": BASE, "row": BASE[1]}, tmp_path / "w.pt")
    state = read_checkpoint(tmp_path / "w.pt").state
    assert state["a"].data_ptr() == state["tied"].data_ptr()
    assert state["row"].data_ptr() == state["a"].data_ptr() + 7 * 4


def test_a_large_file_is_mapped(tmp_path: Path) -> None:
    """Reading takes no further memory: a change in a tensor does not reach the file, and 64 MB cost nothing."""

    def private_kb() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    torch.save({f"{i}.weight": torch.ones(2048, 2048) for i in range(4)}, tmp_path / "w.pt")
    before = private_kb()
    state = read_checkpoint(tmp_path / "w.pt").state
    total = sum(float(tensor[::64].sum()) for tensor in state.values())
    assert private_kb() - before < 16 * 1024, "a quarter of the weights; a copy would be all of them"
    assert total == 4 * 2048 * 32
    state["0.weight"][0, 0] = 5.0
    assert float(read_checkpoint(tmp_path / "w.pt").state["0.weight"][0, 0]) == 1.0


class OmegaNode:
    """What the pickle of an OmegaConf node has: a class, and a dict of attributes."""


def test_settings_of_omegaconf_without_omegaconf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written as OmegaConf 2.3 does: nodes with `_content` or `_val`, metadata, and their parent."""
    nodes = {}
    monkeypatch.setitem(sys.modules, "omegaconf", type(pathlib)("omegaconf"))
    for module, name in (
        ("omegaconf.dictconfig", "DictConfig"),
        ("omegaconf.listconfig", "ListConfig"),
        ("omegaconf.nodes", "AnyNode"),
        ("omegaconf.base", "ContainerMetadata"),
    ):
        nodes[name] = type(name, (OmegaNode,), {"__module__": module})
        made = type(pathlib)(module)
        setattr(made, name, nodes[name])
        monkeypatch.setitem(sys.modules, module, made)

    def node(kind: str, **attributes: Any) -> Any:
        made = nodes[kind]()
        made.__dict__.update(attributes)
        return made

    root = node("DictConfig", _metadata=node("ContainerMetadata", element_type=Any), _parent=None, _content={})
    items = node("ListConfig", _parent=root, _content=[node("AnyNode", _val=1), node("AnyNode", _val="two")])
    root.__dict__["_content"] = {"lr": node("AnyNode", _val=3e-4, _parent=root), "items": items}
    torch.save({"state_dict": {"w": BASE}, "hyper_parameters": root}, tmp_path / "w.ckpt")
    monkeypatch.undo()
    assert read_checkpoint(tmp_path / "w.ckpt").extras == {"hyper_parameters": {"lr": 3e-4, "items": [1, "two"]}}


def rejected(path: Path, *words: str) -> str:
    """The one line with which a checkpoint is refused."""
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert len(message) < 900
    for word in words:
        assert word in message
    return message


class Canary:
    """Loaded without care, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[object, ...]:
        return exec, (f"open({self.path!r}, 'w').close()",)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
def test_no_code_of_a_pickle_runs(tmp_path: Path, zipped: bool, protocol: int) -> None:
    content = {"state_dict": {"w": BASE}, "extra": Canary(tmp_path / "canary")}
    file = tmp_path / "w.pt"
    torch.save(content, file, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    rejected(file, "w.pt contains builtins.exec, which is not plain data", "torch.save(model.state_dict()")
    assert not (tmp_path / "canary").exists()
    torch.load(file, weights_only=False)  # the file does what it is meant to
    assert (tmp_path / "canary").exists()


def test_an_array_of_python_objects_is_refused_as_such(tmp_path: Path) -> None:
    content = {"w": BASE, "extra": np.array([Canary(tmp_path / "canary")], dtype=object)}
    torch.save(content, tmp_path / "w.pt")
    rejected(tmp_path / "w.pt", "contains an array of NumPy that holds Python objects, which is not plain data")
    assert not (tmp_path / "canary").exists()


def test_plain_values_of_the_standard_library(tmp_path: Path) -> None:
    zone = datetime.timezone(datetime.timedelta(hours=1))
    content = {
        "at": datetime.datetime(2026, 1, 2, tzinfo=zone),
        "rate": decimal.Decimal("0.1"),
        "run": uuid.UUID(int=7),
    }
    torch.save({"model": {"w": BASE}, **content}, tmp_path / "w.pt")
    extras = read_checkpoint(tmp_path / "w.pt").extras
    assert extras == {"at": "2026-01-02 00:00:00 UTC 1:00:00", "rate": "0.1", "run": {"int": 7}}


def test_a_saved_module_is_refused_by_its_class(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "w.pt")
    rejected(tmp_path / "w.pt", "torch.nn.modules.linear.Linear")


def test_torchscript_is_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            archive.writestr(f"w/{name}", b"")
    rejected(tmp_path / "w.pt", "TorchScript", "torch.jit.load(path).state_dict()")


@pytest.mark.parametrize(
    ("pickled", "words"),
    [
        (b"\x80\x02cos\nsystem\n.", "posix.system"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "os.system"),
        (b"\x80\x04\x8c\x08builtins\x8c\x0bdict.update\x93.", "dict.update"),
        (b"(S'ls'\nios\nsystem\n.", "instruction"),
        (b"\x80\x02]K\x01\x85R.", "calls list, which is data"),
        (b"\x80\x02ccollections\nOrderedDict\n}X\x01\x00\x00\x00aK\x01sb.", "attributes of Allowed"),
        (b"\x80\x02}r\xff\xff\xff\x7fh\x00.", "Memo value not found"),
        (b"\x80\x05\x96\x00\x00\x00\x00\xff\x00\x00\x00.", ""),
        (b"\x80\x02X\xff\xff\xff\x7fa.", ""),
        (b"\x80\x02.", "IndexError"),
        (b"", "EOFError"),
    ],
)
def test_hostile_pickles(pickled: bytes, words: str) -> None:
    """Names outside the list, calls of data, changes of the list's own entries, huge indices and lengths."""
    from ibnorm_export.models.containers.plain_classes import plain_classes

    with pytest.raises(UnreadableError) as caught:
        read_pickle(io.BytesIO(pickled.replace(b"cos\n", b"cposix\n")), plain_classes())
    assert words in str(caught.value)


def test_a_deep_tuple_as_a_key_is_not_hashed() -> None:
    """Hashing nested tuples recurses in C without a limit: 200,000 levels crash Python."""
    deep = b"\x80\x02}(" + b"K\x01" + b"\x85" * 200_000 + b"K\x02u."
    with pytest.raises(UnreadableError, match="a key of the type tuple"):
        read_pickle(io.BytesIO(deep), {})


def test_settings_that_contain_themselves(tmp_path: Path) -> None:
    around: list[Any] = [1]
    around.append(around)
    wide: Any = "x"
    for _ in range(60):  # 2**60 items if each is visited once for every way to it
        wide = [wide, wide]
    deep: list[Any] = []
    for _ in range(400):
        deep = [deep]
    torch.save({"model": STATE, "around": around, "wide": {"w": wide}, "deep": deep, "epoch": 1}, tmp_path / "w.pt")
    extras = read_checkpoint(tmp_path / "w.pt").extras
    assert extras["epoch"] == 1
    assert extras.keys() == {"epoch", "wide"}


def edited(source: Path, target: Path, **changes: bytes) -> None:
    """Copy an archive with other bytes for some of its records, named without their folder."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for entry in old.infolist():
            name = entry.filename.partition("/")[2]
            new.writestr(entry.filename, changes.get(name, old.read(entry)))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    torch.save({"w": torch.arange(6, dtype=torch.float32)}, tmp_path / "small.pt")
    return tmp_path / "small.pt"


def test_a_storage_that_is_larger_than_its_record(small: Path) -> None:
    """torch.load reads past the end of such a record."""
    broken = small.with_name("w.pt")
    edited(small, broken, **{"data/0": b"\0" * 8})
    rejected(broken, "the tensor w is damaged", "24 bytes, and the file has 8 bytes")


def test_a_storage_without_a_record(small: Path) -> None:
    broken = small.with_name("w.pt")
    with zipfile.ZipFile(small) as old, zipfile.ZipFile(broken, "w") as new:
        for entry in old.infolist():
            if not entry.filename.endswith("data/0"):
                new.writestr(entry.filename, old.read(entry))
    rejected(broken, "the tensor w is damaged", "no bytes")


def data_pickle(shape: tuple[int, ...], stride: tuple[int, ...], *, offset: int = 0, elements: int = 6) -> bytes:
    """The pickle of {"w": tensor} with any sizes, which torch.save would not write."""
    out = io.BytesIO()

    class Storage:
        pass

    class Rebuilt:
        def __reduce__(self) -> tuple[object, ...]:
            arguments = (Storage(), offset, shape, stride, False, collections.OrderedDict())
            return torch._utils._rebuild_tensor_v2, arguments

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: object) -> object:
            return ("storage", torch.FloatStorage, "0", "cpu", elements) if isinstance(obj, Storage) else None

    Pickler(out, protocol=2).dump({"w": Rebuilt()})
    return out.getvalue()


@pytest.mark.parametrize(
    ("shape", "stride", "offset"),
    [
        ((7,), (1,), 0),
        ((2, 3), (3, 2), 0),
        ((6,), (1,), 1),
        ((-6,), (1,), 0),
        ((3,), (-1,), 5),
        ((3,), (1,), -1),
        ((2**31, 2**31), (0, 0), 0),
        ((2**62, 4), (1, 1), 0),
    ],
)
def test_shapes_that_do_not_fit_their_storage(
    small: Path, shape: tuple[int, ...], stride: tuple[int, ...], offset: int
) -> None:
    broken = small.with_name("w.pt")
    edited(small, broken, **{"data.pkl": data_pickle(shape, stride, offset=offset)})
    rejected(broken, "the tensor w is damaged")


def test_the_edited_pickle_is_right_otherwise(small: Path) -> None:
    edited(small, small.with_name("w.pt"), **{"data.pkl": data_pickle((2, 3), (3, 1))})
    state = read_checkpoint(small.with_name("w.pt")).state
    assert state["w"].tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]


def test_records_that_are_compressed(small: Path) -> None:
    """torch.load with mmap=True takes the compressed bytes for weights."""
    packed = small.with_name("w.pt")
    with zipfile.ZipFile(small) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    rejected(packed, "compressed or encrypted")


def test_big_endian_files_are_named(small: Path) -> None:
    edited(small, small.with_name("w.pt"), byteorder=b"big")
    rejected(small.with_name("w.pt"), "big-endian")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_truncated_file(tmp_path: Path, zipped: bool) -> None:
    torch.save({"model": STATE}, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    whole = (tmp_path / "w.pt").read_bytes()
    for cut in (0, 1, 3, 10, len(whole) // 3, len(whole) // 2, len(whole) - 1):
        (tmp_path / "w.pt").write_bytes(whole[:cut])
        rejected(tmp_path / "w.pt", "truncated")


def test_a_storage_of_the_old_format_that_lies_about_its_size(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(3)}, tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    whole = (tmp_path / "w.pt").read_bytes()
    for count in (2**60, -1, 4):
        (tmp_path / "w.pt").write_bytes(whole[:-20] + struct.pack("<q", count) + whole[-12:])
        rejected(tmp_path / "w.pt", "not of the size")


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (b"\x89HDF\r\n", "HDF5"),
        (b"GGUF\x03", "GGUF"),
        (b"\x1f\x8b\x08", "gzip"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"\0" * 257 + b"ustar\0" + b"\0" * 300, "tar archive"),
        (b"not weights at all", "is truncated, or is not a file of torch.save"),
    ],
)
def test_files_of_another_kind_are_named(tmp_path: Path, start: bytes, words: str) -> None:
    (tmp_path / "w.pt").write_bytes(start)
    rejected(tmp_path / "w.pt", words)


def quantized() -> Tensor:
    return torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (quantized, "the tensor odd is quantised; save the floating-point weights"),
        (lambda: torch.ones(2, 2).to_sparse(), "sparse; save tensor.to_dense()"),
        (lambda: torch.ones(2, 2).to_sparse_csr(), "sparse"),
        (lambda: torch.ones(2, dtype=torch.complex64), "complex"),
        (lambda: torch.ones(2, dtype=torch.complex64).conj().imag, "negated"),
        (lambda: torch.ones(2, device="meta"), "meta device"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:.*quantiz")
def test_tensors_that_no_model_file_can_hold(tmp_path: Path, tensor: Any, words: str) -> None:
    torch.save({"w": BASE, "odd": tensor()}, tmp_path / "w.pt")
    rejected(tmp_path / "w.pt", words)
    torch.save({"model": {"w": BASE}, "beside": {"odd": tensor()}}, tmp_path / "w.pt")
    assert list(read_checkpoint(tmp_path / "w.pt").state) == ["w"], "a tensor beside the weights does not matter"


def test_names_that_are_not_text(tmp_path: Path) -> None:
    torch.save({1: BASE, "b": BASE}, tmp_path / "w.pt")
    rejected(tmp_path / "w.pt", "keys of the type int, and names are text")


def test_characters_that_a_terminal_obeys_are_escaped(tmp_path: Path) -> None:
    torch.save({"model": {"a\x1b[2J\nb": torch.ones(2, device="meta")}}, tmp_path / "w.pt")
    rejected(tmp_path / "w.pt", r"the tensor a\x1b[2J b is on the meta device")


def test_damaged_bytes_end_in_one_line(tmp_path: Path) -> None:
    """60 random changes of each format: a file is read, or refused in one line."""
    random = np.random.default_rng(0)
    content = {"model": {"a.w": BASE, "a.b": torch.ones(3)}, "args": SETTINGS}
    for zipped in (True, False):
        torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
        whole = (tmp_path / "w.pt").read_bytes()
        for _ in range(60):
            damaged = bytearray(whole)
            for place in random.integers(0, len(whole), int(random.integers(1, 6))):
                damaged[place] = int(random.integers(256))
            (tmp_path / "damaged.pt").write_bytes(damaged)
            try:
                read_checkpoint(tmp_path / "damaged.pt")
            except CheckpointError as error:
                assert len(str(error).splitlines()) == 1


def test_many_names(tmp_path: Path) -> None:
    """Time grows with the number of names, not with its square: 5,000 take a fraction of a second."""
    shared = torch.zeros(1)
    torch.save({f"a.{i}": shared for i in range(5_000)}, tmp_path / "w.pt")
    assert len(read_checkpoint(tmp_path / "w.pt").state) == 5_000
