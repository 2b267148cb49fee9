"""A path that cannot be written, and an export that ends early: no half-written file is left."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path
from typing import Any

import onnx
import onnx.helper
import pytest

from ibnorm_export import models
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.errors import ExportError
from ibnorm_export.exporter.export import export
from ibnorm_export.verifier.verify import verify
from tests.support.held_process import held_process


def test_a_missing_folder_and_a_folder_as_target(prebuilt: LoadedModel, tmp_path: Path) -> None:
    model = prebuilt
    with pytest.raises(ExportError, match="nowhere does not exist"):
        export(model, tmp_path / "nowhere" / "m.onnx")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ExportError, match="is a folder"):
        export(model, tmp_path / "folder")
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match="file"):
        export(model, tmp_path / "file" / "m.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_a_path_without_permission(prebuilt: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0:  # root may write anywhere, so raise the error of the system

        def forbidden(*_: object, **__: object) -> str:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

        monkeypatch.setattr("ibnorm_export.files.tempfile.mkdtemp", forbidden)
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(ExportError, match=r"m\.onnx: Permission denied"):
            export(prebuilt, tmp_path / "m.onnx")
    finally:
        tmp_path.chmod(0o755)
    assert [p.name for p in tmp_path.iterdir()] == []


#: A model from another tool.
OLDER = onnx.helper.make_model(
    onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", ["x"], ["y"])],
        "g",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])],
    )
).SerializeToString()


@pytest.mark.parametrize("content", [b"notes of a user", b"PK\x03\x04", OLDER[: len(OLDER) // 2], b"{}"])
def test_a_file_of_another_kind_is_not_replaced(prebuilt: LoadedModel, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(ExportError, match=r"m\.onnx exists and is not an ONNX file: it would be lost"):
        export(prebuilt, tmp_path / "m.onnx")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("m.onnx", content)]


@pytest.mark.parametrize("content", [OLDER, b""])
def test_an_earlier_model_is_replaced(prebuilt: LoadedModel, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    assert len(export(prebuilt, tmp_path / "m.onnx").norms) > 0


def test_a_path_that_ends_in_a_slash_is_a_folder(prebuilt: LoadedModel, tmp_path: Path) -> None:
    for path in (f"{tmp_path}/new/", f"{tmp_path}/"):
        with pytest.raises(ExportError, match=r"/ is a folder; name the file to write, e\.g\. .*/model\.onnx"):
            export(prebuilt, path)
    assert list(tmp_path.iterdir()) == []


def full_disk(model: Any, path: Any, **_: object) -> None:
    Path(path).write_bytes(b"half of it")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def interrupted(model: Any, path: Any, **_: object) -> None:
    Path(path).write_bytes(b"half of it")
    raise KeyboardInterrupt


def broken(model: Any, path: Any, **_: object) -> None:
    Path(path).write_bytes(b"half of it")
    raise ZeroDivisionError("planted")


@pytest.mark.parametrize(
    ("save", "raised", "expected"),
    [
        (full_disk, ExportError, "No space left on device"),
        (interrupted, KeyboardInterrupt, None),
        (broken, ZeroDivisionError, "planted"),
    ],
)
@pytest.mark.parametrize("old", [OLDER, None], ids=["over an old file", "new"])
def test_a_failed_write_leaves_what_was_there(
    prebuilt: LoadedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    save: Any,
    raised: type[BaseException],
    expected: str | None,
    old: bytes | None,
) -> None:
    target = tmp_path / "m.onnx"
    if old is not None:
        target.write_bytes(old)
    monkeypatch.setattr("ibnorm_export.exporter.single_file.write_model", save)
    with pytest.raises(raised, match=expected):
        export(prebuilt, target)
    assert [p.name for p in tmp_path.iterdir()] == ([] if old is None else ["m.onnx"])
    assert old is None or target.read_bytes() == old


@pytest.mark.parametrize("stage", ["tracing", "simplifying", "writing", "checking"])
def test_ctrl_c_at_any_stage_leaves_nothing(
    request: pytest.FixtureRequest, vit_checkpoint: Path, tmp_path: Path, stage: str
) -> None:
    if stage in ("writing", "checking"):
        request.getfixturevalue("prebuilt")

    def progress(what: str, done: int, total: int) -> None:
        assert 0 <= done <= total
        if what == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(models.load(vit_checkpoint), tmp_path / "m.onnx", progress=progress)
    assert [p.name for p in tmp_path.iterdir()] == []


def test_an_invalid_result_is_not_kept(prebuilt: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise onnx.checker.ValidationError("planted")

    monkeypatch.setattr(onnx.checker, "check_model", refuse)
    with pytest.raises(ExportError, match="does not make a valid model: planted"):
        export(prebuilt, tmp_path / "m.onnx")
    assert [p.name for p in tmp_path.iterdir()] == []


def test_kill_9_leaves_no_file_under_the_target_name(prebuilt: LoadedModel, tmp_path: Path) -> None:
    """The process is killed after it has written half of the bytes."""
    target = tmp_path / "m.onnx"
    code = (
        "import torch\n"
        "from ibnorm_export import IBNorm, IBNormSpec, export\n"
        "from ibnorm_export.exporter import single_file\n"
        "write = single_file.write_model\n"
        "def write_half(model, path):\n"
        "    write(model, path)\n"
        "    path.write_bytes(path.read_bytes()[:1000])\n"
        "    hold()\n"
        "single_file.write_model = write_half\n"
        f"export(IBNorm(8, IBNormSpec('L')), {str(target)!r}, inputs=torch.ones(2, 8))\n"
    )
    with held_process(code) as process:
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not target.exists()
    assert verify(export(prebuilt, target), prebuilt), "what the killed process left does not disturb the next export"
