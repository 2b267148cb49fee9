"""Folders of weights: names of transformers, shards with an index, a single file of any name, caches of links."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ibnorm_export.errors import CheckpointError
from ibnorm_export.models.containers import read_checkpoint

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2), "b.weight": torch.zeros(3)}
Save = Callable[[dict[str, Tensor], Path], None]


def torch_save(state: dict[str, Tensor], path: Path) -> None:
    torch.save(state, path)


#: How each kind of file is written, and the name that transformers gives it.
KINDS: dict[str, tuple[Save, str, str]] = {
    "safetensors": (save_file, "model", "safetensors"),
    "bin": (torch_save, "pytorch_model", "bin"),
}


def shards(folder: Path, kind: str) -> Path:
    """Two files and their index, as transformers writes them; returns the index."""
    save, stem, ending = KINDS[kind]
    names = [f"{stem}-0000{number}-of-00002.{ending}" for number in (1, 2)]
    parts = [{"a.weight": STATE["a.weight"]}, {name: STATE[name] for name in ("a.bias", "b.weight")}]
    for name, part in zip(names, parts, strict=True):
        save(part, folder / name)
    index = folder / f"{stem}.{ending}.index.json"
    places = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    index.write_text(json.dumps({"metadata": {"total_size": 44}, "weight_map": places}))
    return index


def is_state(state: object) -> bool:
    assert isinstance(state, dict)
    return state.keys() == STATE.keys() and all(torch.equal(state[name], STATE[name]) for name in STATE)


def rejected(path: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    for word in words:
        assert word in message


@pytest.mark.parametrize("kind", KINDS)
def test_one_file_and_shards(tmp_path: Path, kind: str) -> None:
    save, stem, ending = KINDS[kind]
    (tmp_path / "one").mkdir()
    save(STATE, tmp_path / "one" / f"{stem}.{ending}")
    assert is_state(read_checkpoint(tmp_path / "one").state)
    index = shards(tmp_path, kind)
    read = read_checkpoint(tmp_path)
    assert is_state(read.state)
    assert read.files == (index, *sorted(tmp_path.glob(f"*-of-00002.{ending}")))


def test_safetensors_come_before_pickles(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"not read")
    assert is_state(read_checkpoint(tmp_path).state)


def test_the_header_of_safetensors_is_kept(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "w", {"format": "pt", "step": "10"})
    read = read_checkpoint(tmp_path / "w")  # known by its content
    assert is_state(read.state)
    assert read.extras == {"format": "pt", "step": "10"}


@pytest.mark.parametrize("name", ["lit_model.pth", "last.ckpt", "weights.pt", "w.pth.tar", "other.safetensors"])
def test_the_only_file_of_a_folder(tmp_path: Path, name: str) -> None:
    save: Save = save_file if name.endswith("safetensors") else torch_save
    save(STATE, tmp_path / name)
    for beside in ("optimizer.pt", "training_args.bin", "rng_state_0.pth", "config.json"):
        (tmp_path / beside).write_bytes(b"not weights")
    assert is_state(read_checkpoint(tmp_path).state)


def test_folders_without_one_set_of_weights(tmp_path: Path) -> None:
    rejected(tmp_path, "neither model.safetensors nor another file of weights")
    for name in ("checkpoint-10", "checkpoint-9"):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (100, 100 if name.endswith("9") else 200))
    rejected(tmp_path, "give a checkpoint in it, such as ", "checkpoint-10")
    (tmp_path / "adapter_model.safetensors").touch()
    rejected(tmp_path, "only an adapter", "merge_and_unload")
    (tmp_path / "zero_to_fp32.py").touch()
    rejected(tmp_path, "DeepSpeed", "python zero_to_fp32.py . OUTPUT")
    for name in ("a.pt", "b.pt"):
        torch.save(STATE, tmp_path / name)
    rejected(tmp_path, "2 files of weights and no index (a.pt, b.pt); give one of them")


@pytest.mark.parametrize("kind", KINDS)
def test_an_index_that_does_not_hold(tmp_path: Path, kind: str) -> None:
    index = shards(tmp_path, kind)
    second = sorted(tmp_path.glob("*-00002-of-*"))[0]
    good = index.read_text()
    index.write_text(good.replace(second.name, f"../{tmp_path.name}/{second.name}"))
    rejected(tmp_path, "points outside its folder")
    index.write_text(good.replace(second.name, "/etc/passwd"))
    rejected(tmp_path, "points outside its folder")
    for text in ("", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', "[" * 100_000):
        index.write_text(text)
        rejected(tmp_path, index.name)
    index.write_text(good)
    KINDS[kind][0]({**STATE}, second)
    rejected(tmp_path, "has a.weight, which another file of the folder has too")
    second.unlink()
    rejected(tmp_path, f"names {second.name}, which is missing")


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_of_links(tmp_path: Path, kind: str) -> None:
    """As huggingface_hub keeps a model: the files are links to blobs outside the folder, named by their hash."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    shards(blobs, kind)
    for number, file in enumerate(sorted(blobs.iterdir())):
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.rename(blobs / f"hash{number}").name)
    assert is_state(read_checkpoint(snapshot).state)


def test_links_that_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "loop.pt").symlink_to("loop.pt")
    rejected(tmp_path / "loop.pt", "does not exist")
    (tmp_path / "model.safetensors").symlink_to("gone")
    rejected(tmp_path, "neither model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "loop.safetensors"}}')
    (tmp_path / "loop.safetensors").symlink_to("loop.safetensors")
    rejected(tmp_path, "names loop.safetensors, which is missing")


def test_damaged_safetensors(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "w.safetensors")
    whole = (tmp_path / "w.safetensors").read_bytes()
    for damaged in (b"", whole[:7], whole[:50], whole[:-1], whole + b"x", b"\xff" * 8 + whole[8:]):
        (tmp_path / "w.safetensors").write_bytes(damaged)
        rejected(tmp_path / "w.safetensors", "truncated or is not safetensors")
