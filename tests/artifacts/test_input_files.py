"""Inputs from the user: what an .npz file must contain, and the message if it does not."""

from __future__ import annotations

import io
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ibnorm_export import models
from ibnorm_export.artifacts.input_files import arrays_in_memory, read_inputs
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.npz import read_npy, read_npz
from ibnorm_export.errors import IBNormError, ModelFileError


@pytest.fixture(scope="module")
def llama(llama_checkpoint: Path) -> LoadedModel:
    return models.load(llama_checkpoint)


def ids(*shape: int) -> np.ndarray[Any, Any]:
    return np.ones(shape, np.int64)


@pytest.mark.parametrize(
    ("arrays", "expected"),
    [
        ({"input_ids": ids(1, 3)}, "attention_mask"),
        ({"input_ids": ids(1, 3), "attention_mask": ids(1, 3), "x": ids(1)}, "'x'"),
        ({"input_ids": ids(1, 3), "attention_mask": ids(1, 4)}, "attention_mask has shape"),
        ({"input_ids": ids(2, 3), "attention_mask": ids(1, 3)}, "attention_mask has shape"),
        ({"input_ids": ids(3), "attention_mask": ids(3)}, "input_ids has shape"),
        ({"input_ids": ids(1, 0), "attention_mask": ids(1, 0)}, "no axis of size 0"),
        ({"input_ids": ids(1, 3) * 0.5, "attention_mask": ids(1, 3)}, "input_ids has dtype float64"),
        ({"input_ids": np.array([["a"]]), "attention_mask": ids(1, 1)}, "input_ids has dtype <U1"),
        ({"input_ids": np.array([[None]]), "attention_mask": ids(1, 1)}, "plain arrays"),
    ],
)
def test_arrays_that_do_not_fit_the_model(
    llama: LoadedModel, tmp_path: Path, arrays: dict[str, Any], expected: str
) -> None:
    np.savez(tmp_path / "in.npz", **arrays)
    with pytest.raises(IBNormError, match=expected):
        read_inputs(tmp_path / "in.npz", llama)


@pytest.mark.parametrize("text", [b"", b"PK\x03\x04", b"not a zip", b"\x93NUMPY\x01\x00"])
def test_a_file_that_is_not_npz_is_rejected(llama: LoadedModel, tmp_path: Path, text: bytes) -> None:
    (tmp_path / "in.npz").write_bytes(text)
    with pytest.raises(ModelFileError, match=r"in\.npz"):
        read_inputs(tmp_path / "in.npz", llama)


def test_a_single_array_is_rejected(llama: LoadedModel, tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", ids(3))
    with pytest.raises(ModelFileError, match=r"one\.npy"):
        read_inputs(tmp_path / "one.npy", llama)


def test_a_missing_npz(llama: LoadedModel, tmp_path: Path) -> None:
    for place in (tmp_path / "none.npz", tmp_path):
        with pytest.raises(ModelFileError, match=r"does not exist|not an"):
            read_inputs(place, llama)


@pytest.mark.parametrize("cut", [10, 300, -5])
def test_a_truncated_npz(llama: LoadedModel, tmp_path: Path, cut: int) -> None:
    np.savez(tmp_path / "in.npz", input_ids=ids(1, 3), attention_mask=ids(1, 3))
    (tmp_path / "in.npz").write_bytes((tmp_path / "in.npz").read_bytes()[:cut])
    with pytest.raises(ModelFileError, match=r"in\.npz"):
        read_inputs(tmp_path / "in.npz", llama)


def encrypted(content: bytes) -> bytes:
    """The archive with the encryption flag in both headers of its only member."""
    central = content.find(b"PK\x01\x02")
    changed = bytearray(content)
    changed[6] |= 1
    changed[central + 8] |= 1
    return bytes(changed)


def with_an_unknown_method(content: bytes) -> bytes:
    central = content.find(b"PK\x01\x02")
    return content[:8] + b"\x63" + content[9 : central + 10] + b"\x63" + content[central + 11 :]


@pytest.mark.parametrize(
    ("change", "expected"), [(encrypted, "encrypted"), (with_an_unknown_method, "compression method is not supported")]
)
def test_archives_that_cannot_be_read(
    llama: LoadedModel, tmp_path: Path, change: Callable[[bytes], bytes], expected: str
) -> None:
    np.savez(tmp_path / "in.npz", input_ids=ids(1, 3))
    (tmp_path / "in.npz").write_bytes(change((tmp_path / "in.npz").read_bytes()))
    with pytest.raises(ModelFileError, match=rf"in\.npz is not an \.npz file of plain arrays: .*{expected}"):
        read_inputs(tmp_path / "in.npz", llama)


def test_a_member_that_is_not_an_array_is_named(llama: LoadedModel, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "in.npz", "w") as archive:
        archive.writestr("input_ids", b"hello")
    with pytest.raises(ModelFileError, match="its member 'input_ids' cannot be used: it is not an array"):
        read_inputs(tmp_path / "in.npz", llama)


def npy(array: np.ndarray[Any, Any]) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


def with_shape(shape: str, data: bytes = b"", descr: str = "<i8") -> bytes:
    """An array whose header claims this shape and type."""
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (63 - (10 + len(header)) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({"input_ids.npy": npy(np.array([None, "x"]))}, "holds Python objects"),
        ({"input_ids.npy": npy(ids(1, 3)), "input_ids": npy(ids(1, 3))}, "two members named 'input_ids'"),
        ({"input_ids.npy": with_shape("(1000000000,)", b"12345678")}, "claims 8000000000 bytes for shape"),
        ({"input_ids.npy": with_shape("(1,)", b"123456789")}, "claims 8 bytes for shape .*, but 9 follow"),
        ({"input_ids.npy": with_shape("(-1, -1)", b"12345678")}, "hold no values"),
        ({"input_ids.npy": with_shape("(3,)", b"", "<U0")}, "hold no values"),
        ({"input_ids.npy": b"\x93NUMPY\x02\x00\xff\xff\xff\x7f" + b" " * 100}, "its header has 2147483647 bytes"),
        ({"input_ids.npy": b"\x93NUMPY\x09\x00\x04\x00\x00\x00abcd"}, "it has version 9 of NumPy's format"),
        ({"../../input_ids.npy": npy(ids(1, 3))}, "contains the arrays"),
        ({"/etc/input_ids.npy": npy(ids(1, 3))}, "contains the arrays"),
        ({"x" * 50_000 + ".npy": npy(ids(1, 3))}, "contains the arrays"),
        ({"\x1b[31m.npy": npy(ids(1, 3))}, r"contains the arrays \['\\x1b\[31m'\]"),
    ],
)
def test_hostile_archives(llama: LoadedModel, tmp_path: Path, members: dict[str, bytes], expected: str) -> None:
    with zipfile.ZipFile(tmp_path / "in.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(ModelFileError, match=rf"in\.npz.*{expected}") as found:
        read_inputs(tmp_path / "in.npz", llama)
    assert len(str(found.value)) < 1000


@pytest.mark.parametrize("name", ["input_ids", "another"])
def test_a_small_file_that_claims_much_is_refused_unread(llama: LoadedModel, tmp_path: Path, name: str) -> None:
    """100 MB of zeros in 0.1 MB: names and sizes are known before anything is unpacked."""
    np.savez_compressed(tmp_path / "in.npz", **{name: np.zeros((1, 12_500_000), np.int64)})
    assert (tmp_path / "in.npz").stat().st_size < 200_000
    tracemalloc.start()
    try:
        with pytest.raises(ModelFileError, match="its arrays need 100000000 bytes, and a file of"):
            read_inputs(tmp_path / "in.npz", llama)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


def test_large_arrays_that_are_not_packed_are_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros(9_000_000))
    assert read_npz(tmp_path / "a.npz", "an archive")["x"].nbytes == 72_000_000
    np.save(tmp_path / "a.npy", np.asfortranarray(np.arange(6).reshape(2, 3)))
    assert read_npy(tmp_path / "a.npy", "an array").tolist() == [[0, 1, 2], [3, 4, 5]]
    (tmp_path / "b.npy").write_bytes(with_shape("(1000000000,)", b"12345678"))
    with pytest.raises(ModelFileError, match="claims 8000000000 bytes"):
        read_npy(tmp_path / "b.npy", "an array")


@pytest.mark.parametrize(
    "given",
    [
        {"input_ids": ids(1, 3), "attention_mask": torch.ones(1, 3, dtype=torch.bool)},
        [{"input_ids": ids(1, 3), "attention_mask": ids(1, 3)}],
        (torch.ones(1, 3, dtype=torch.int32), ids(1, 3)),
    ],
)
def test_one_sample_in_memory(llama: LoadedModel, given: Any) -> None:
    (sample,) = arrays_in_memory(given, llama.inputs)
    assert {name: (array.dtype, array.shape) for name, array in sample.items()} == {
        "input_ids": (np.int64, (1, 3)),
        "attention_mask": (np.int64, (1, 3)),
    }
    assert all((array == 1).all() for array in sample.values())


def test_a_tensor_is_one_sample_of_a_model_of_one_input(vit_checkpoint: Path) -> None:
    model = models.load(vit_checkpoint)
    images = torch.randn(2, 1, 8, 8, dtype=torch.bfloat16)
    (sample,) = arrays_in_memory(images, model.inputs)
    assert np.array_equal(sample["pixel_values"], images.float().numpy())


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], "inputs is empty"),
        ((ids(1, 3),), "1 tensors; the model takes 2"),
        ({"input_ids": ids(1, 3)}, "attention_mask"),
        ({"input_ids": ids(1, 3), "attention_mask": "text"}, "attention_mask is str"),
        ([{"input_ids": ids(1, 3), "attention_mask": ids(1, 3)}, ids(1, 3)], "inputs\\[1\\]"),
    ],
)
def test_wrong_inputs_in_memory_are_named(llama: LoadedModel, given: Any, expected: str) -> None:
    with pytest.raises(ModelFileError, match=expected):
        arrays_in_memory(given, llama.inputs)
