"""A native library is loaded only after its bytes and its machine have been checked."""

from __future__ import annotations

import base64
import ctypes
import hashlib
import importlib.metadata
from pathlib import Path

import pytest

from ibnorm_export.errors import BackendUnavailable
from ibnorm_export.op import native


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the library, as if pip had installed it; loading a library is an error."""
    copy = tmp_path / "ibnorm_export" / "lib" / "libibnorm_ort.so"
    copy.parent.mkdir(parents=True)
    copy.write_bytes(native.ort_library().read_bytes())
    digest = base64.urlsafe_b64encode(hashlib.sha256(copy.read_bytes()).digest()).rstrip(b"=").decode()
    info = tmp_path / "ibnorm_export-0.1.0.dist-info"
    info.mkdir()
    record = f"ibnorm_export/lib/{copy.name},sha256={digest},{copy.stat().st_size}\n"
    (info / "RECORD").write_text(record)
    found = importlib.metadata.PathDistribution(info)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: found)
    return copy


def forbid_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(path: str) -> None:
        pytest.fail(f"{path} was loaded")

    monkeypatch.setattr(ctypes, "CDLL", load)


def test_an_unchanged_library_is_accepted(library: Path) -> None:
    assert native.inspect(library)


def test_a_changed_library_is_not_loaded(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library.write_bytes(library.read_bytes() + b"\0")
    forbid_loading(monkeypatch)
    assert "changed after it was installed" in native.inspect(library).problem
    with pytest.raises(BackendUnavailable, match="changed after it was installed"):
        native.trt_library(library)


def test_a_library_for_another_machine_is_not_loaded(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytearray(library.read_bytes())
    content[18:20] = (183).to_bytes(2, "little")
    library.write_bytes(content)
    forbid_loading(monkeypatch)
    assert "is built for aarch64, but this machine is" in native.inspect(library).problem
