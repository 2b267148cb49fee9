"""Inputs from the user: what an .npz file must contain, and the message if it does not."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ibnorm_export import models
from ibnorm_export.artifacts.input_files import read_inputs
from ibnorm_export.artifacts.loaded_model import LoadedModel
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
    with pytest.raises(ModelFileError, match="its member 'input_ids' is not an array"):
        read_inputs(tmp_path / "in.npz", llama)
