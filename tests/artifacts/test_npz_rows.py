"""Rows of an .npz file, one at a time."""

from __future__ import annotations

import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ibnorm_export.artifacts.npz import read_rows
from ibnorm_export.errors import ModelFileError

ROWS = np.arange(40 * 3 * 4, dtype=np.float32).reshape(40, 3, 4)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("array", [ROWS, np.asfortranarray(ROWS)])
@pytest.mark.parametrize("start", [0, 7, 40])
def test_rows_are_those_of_numpy(save: Callable[..., None], array: np.ndarray, start: int, tmp_path: Path) -> None:
    save(tmp_path / "x.npz", images=array)
    rows = list(read_rows(tmp_path / "x.npz", "images", what="a file", start=start))
    assert len(rows) == 40 - start
    assert all((row == expected).all() for row, expected in zip(rows, ROWS[start:], strict=True))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_memory_is_that_of_a_row(save: Callable[..., None], tmp_path: Path) -> None:
    save(tmp_path / "x.npz", images=np.zeros((200, 50_000), dtype=np.uint8))  # 10 MB
    tracemalloc.start()
    assert sum(1 for _ in read_rows(tmp_path / "x.npz", "images", what="a file")) == 200
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000  # a row of 50 kB, and the buffers of zipfile and zlib


def test_a_row_that_is_too_large_is_refused(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "x.npz", images=np.zeros((1, 70 << 20), dtype=np.uint8))
    with pytest.raises(ModelFileError, match="a row of 'images' has 73400320 bytes; it may have at most 67108864"):
        next(read_rows(tmp_path / "x.npz", "images", what="a file"))


def test_damage_is_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=ROWS)
    content = bytearray((tmp_path / "x.npz").read_bytes())
    with zipfile.ZipFile(tmp_path / "x.npz") as archive:
        content[archive.infolist()[0].header_offset + 400] ^= 0xFF
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(ModelFileError, match=r"x.npz is not a file: Bad CRC-32"):
        list(read_rows(tmp_path / "x.npz", "images", what="a file"))
