"""Folders are written as a whole or not at all, and only replace what an earlier run wrote."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from ibnorm_export import IBNormSpec, models
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.errors import ExportError, IBNormError
from ibnorm_export.exporter.export import export
from ibnorm_export.exporter.text_folder import earlier_export, export_folder
from ibnorm_export.files import new_file, new_folder
from ibnorm_export.serving.triton.repository import package
from tests.support.checkpoints import LLAMA, save_checkpoint


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def any_file(folder: Path) -> set[str]:
    return set(contents(folder))


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "old").write_bytes(b"old")
    return tmp_path / "target"


def fill(target: Path) -> None:
    with new_folder(target, any_file) as beside:
        (beside / "new").write_bytes(b"new")


def test_a_new_folder_replaces_the_old_one(target: Path) -> None:
    fill(target)
    assert contents(target) == {"new": b"new"}
    assert [path.name for path in target.parent.iterdir()] == ["target"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("failing", [{1}, {2}, {2, 3}])
def test_the_old_folder_survives_a_failure_at_any_point(
    target: Path, monkeypatch: pytest.MonkeyPatch, failing: set[int], error: type[BaseException]
) -> None:
    """Before the first rename, between the two, or while the old folder is restored."""
    rename, calls = Path.rename, 0

    def stopped(self: Path, to: Path) -> Path:
        nonlocal calls
        calls += 1
        if calls in failing:
            raise error
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", stopped)
    with pytest.raises(ExportError if error is OSError else error):
        fill(target)
    if 3 in failing:
        (beside,) = target.parent.iterdir()
        assert contents(beside) == {"old/old": b"old", "target/new": b"new"}
    else:
        assert contents(target) == {"old": b"old"}
        assert [path.name for path in target.parent.iterdir()] == ["target"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, exported_vit: ExportedModel) -> dict[Path, Callable[[], object]]:
    """Folders of every kind, each with the function that writes it."""
    place = tmp_path_factory.mktemp("written")
    spec = IBNormSpec("L", 4.0, epsilon=1e-5, bias=False)
    one_layer = save_checkpoint(place / "llama", LLAMA | {"num_hidden_layers": 1}, spec)
    llama = models.load(one_layer, task="text-generation")
    writers: dict[Path, Callable[[], object]] = {
        place / "text": lambda: export_folder(llama, place / "text"),
        place / "repository": lambda: package(exported_vit, place / "repository"),
        place / "checkpoint": lambda: models.save(llama.module, place / "checkpoint"),  # type: ignore[arg-type]  # a Module, of a family
    }
    for write in writers.values():
        write()
    return writers


@pytest.mark.parametrize("name", ["thesis.tex", "src/app.js", "link"])
def test_files_that_no_run_wrote_are_kept(written: dict[Path, Callable[[], object]], name: str) -> None:
    """A file named model.onnx or manifest.json does not make a folder one that may be replaced."""
    for folder, write in written.items():
        before = contents(folder)
        mine = folder / name
        mine.parent.mkdir(exist_ok=True)
        if name == "link":
            mine.symlink_to("nowhere")
        else:
            mine.write_text("mine")
        with pytest.raises(IBNormError, match=f"contains {name}, which this command did not write"):
            write()
        assert mine.is_symlink() or mine.read_text() == "mine"
        mine.unlink()
        assert contents(folder) == before


def test_an_earlier_run_is_replaced(written: dict[Path, Callable[[], object]]) -> None:
    for folder, write in written.items():
        before = contents(folder)
        changed = "config.json" if "config.json" in before else next(name for name in before if name.endswith(".onnx"))
        (folder / changed).write_bytes(b"{}")
        write()
        assert contents(folder).keys() == before.keys()
        assert contents(folder)[changed] != b"{}"


def test_a_checkpoint_is_not_replaced_by_its_export(
    tmp_path: Path, llama_checkpoint: Path, exported_llama: ExportedModel
) -> None:
    folder = tmp_path / "llama"
    shutil.copytree(llama_checkpoint, folder)
    shutil.copy(exported_llama.path, folder / "model.onnx")
    before = contents(folder)
    with pytest.raises(ExportError, match=r"contains model\.safetensors, which this command did not write"):
        export_folder(models.load(folder, task="text-generation"), folder)
    assert contents(folder) == before


def test_an_export_does_not_replace_files_of_its_checkpoint(tmp_path: Path, llama_checkpoint: Path) -> None:
    folder = tmp_path / "llama"
    shutil.copytree(llama_checkpoint, folder)
    before = contents(folder)
    for name in before:
        with pytest.raises(ExportError, match=r"belongs to the checkpoint .*choose another file"):
            export(models.load(folder), folder / name)
    assert contents(folder) == before


def test_a_device_is_not_replaced(tmp_path: Path, vit_checkpoint: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ExportError, match="is not a regular file"):
        export(models.load(vit_checkpoint), tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()


def test_a_model_from_another_tool_is_not_replaced(tmp_path: Path, exported_vit: ExportedModel) -> None:
    proto = onnx.load(exported_vit.path)
    del proto.metadata_props[:]
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "model.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(ExportError, match=r"was not written by ibnorm-export"):
        earlier_export(tmp_path / "theirs")
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "manifest.json").write_text(json.dumps({"name": "of a web application"}))
    with pytest.raises(ExportError, match="was not written by `package`"):
        package(exported_vit, tmp_path / "app")


def test_a_checkpoint_keeps_its_tokenizer(tmp_path: Path) -> None:
    config = {
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 8,
    }
    model = models.new_model(config, IBNormSpec("L", bias=False))
    models.save(model, tmp_path / "c")
    (tmp_path / "c" / "tokenizer.json").write_text("{}")
    with torch.no_grad():
        next(model.parameters()).fill_(2.0)
    models.save(model, tmp_path / "c")
    assert (tmp_path / "c" / "tokenizer.json").read_text() == "{}"
    weights = models.load(tmp_path / "c").module.state_dict()
    assert any(np.all(tensor.numpy() == 2.0) for tensor in weights.values())


def test_weights_have_the_permissions_of_their_neighbours(tmp_path: Path) -> None:
    """safetensors lets only the owner read what it writes."""
    before = os.umask(0o027)
    try:
        with new_folder(tmp_path / "f", lambda folder: ()) as new:
            for name in ("weights", "library", "secret"):
                (new / name).touch()
            (new / "weights").chmod(0o600)
            (new / "library").chmod(0o755)
        with new_file(tmp_path / "one") as new:
            (new / "one").touch(mode=0o600)
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode & 0o777 for file in (*(tmp_path / "f").iterdir(), tmp_path / "one")}
    assert modes == {"weights": 0o640, "library": 0o755, "secret": 0o640, "one": 0o640}
