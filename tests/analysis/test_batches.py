"""Labels from a .npy file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ibnorm_export.analysis.batches import read_labels
from ibnorm_export.errors import ModelFileError


def test_a_file_that_is_not_npy_is_refused(tmp_path: Path) -> None:
    for content in (b"PK\x03\x04", b"\x93NUMPY\x01\x00", b""):
        (tmp_path / "labels.npy").write_bytes(content)
        with pytest.raises(ModelFileError, match=r"labels\.npy is not a \.npy file of labels"):
            read_labels(tmp_path / "labels.npy")
    np.savez(tmp_path / "in.npz", a=np.ones(1, np.int64))
    with pytest.raises(ModelFileError, match="several arrays"):
        read_labels(tmp_path / "in.npz")
