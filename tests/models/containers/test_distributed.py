"""Folders of torch.distributed.checkpoint, written by its own functions without a process group."""

from __future__ import annotations

import argparse
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex

from ibnorm_export.errors import CheckpointError
from ibnorm_export.models.containers import read_checkpoint

NET = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
STATE = {**NET.state_dict(), "half": torch.ones(5, dtype=torch.bfloat16), "view": torch.arange(12.0).reshape(3, 4).t()}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a training code saves: the model, an optimizer, counters and settings."""
    folder = tmp_path_factory.mktemp("dcp") / "step-10"
    optimizer = {"state": {"0.weight": {"exp_avg": torch.ones(4, 3)}}, "param_groups": [{"lr": 1e-3}]}
    content = {"model": STATE, "optim": optimizer, "step": 10, "args": argparse.Namespace(lr=1e-3)}
    with pytest.warns(UserWarning, match="single process"):
        dcp.save(content, checkpoint_id=folder, no_dist=True)
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(written, tmp_path / "step-10"))


def change(folder: Path, edit: Callable[[Metadata], object]) -> None:
    """Edit the metadata as its own classes show it."""
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    edit(metadata)
    path.write_bytes(pickle.dumps(metadata))


def rejected(folder: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(folder)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    for word in words:
        assert word in message


def test_the_model_is_read(written: Path) -> None:
    read = read_checkpoint(written)
    assert read.state.keys() == STATE.keys()
    for name, tensor in STATE.items():
        assert read.state[name].dtype == tensor.dtype
        assert torch.equal(read.state[name], tensor), name
    assert (read.extras["step"], read.extras["args"]) == (10, {"lr": 1e-3})
    assert read.files == (written / ".metadata", written / "__0_0.distcp")


def test_pieces_are_put_together(folder: Path) -> None:
    """Two ranks that have the halves of a matrix each: the pieces of two folders under one metadata."""
    whole = torch.arange(24.0).reshape(4, 6)
    halves = [folder.parent / name for name in ("first", "second")]
    with pytest.warns(UserWarning, match="single process"):
        for half, columns in zip(halves, (slice(0, 2), slice(2, 6)), strict=True):
            dcp.save({"w": whole[:, columns].contiguous()}, checkpoint_id=half, no_dist=True)
    shutil.copy(halves[1] / "__0_0.distcp", halves[0] / "__1_0.distcp")
    other = pickle.loads((halves[1] / ".metadata").read_bytes())

    def join(metadata: Metadata) -> None:
        entry = metadata.state_dict_metadata["w"]
        entry.size = torch.Size([4, 6])
        entry.chunks.append(ChunkStorageMetadata(torch.Size([0, 2]), torch.Size([4, 4])))
        (place,) = other.storage_data.values()
        place.relative_path = "__1_0.distcp"
        metadata.storage_data[MetadataIndex("w", torch.Size([0, 2]))] = place

    change(halves[0], join)
    assert torch.equal(read_checkpoint(halves[0]).state["w"], whole)
    reference: dict[str, Any] = {"w": torch.zeros(4, 6)}
    with pytest.warns(UserWarning, match="single process"):
        dcp.load(reference, checkpoint_id=halves[0], no_dist=True)
    assert torch.equal(reference["w"], whole), "PyTorch reads the same from the joined folder"

    def shrink(metadata: Metadata) -> None:
        metadata.state_dict_metadata["w"].chunks.pop()

    def overlap(metadata: Metadata) -> None:
        metadata.state_dict_metadata["w"].chunks[1].offsets = torch.Size([0, 1])
        metadata.storage_data[MetadataIndex("w", torch.Size([0, 1]))] = metadata.storage_data[
            MetadataIndex("w", torch.Size([0, 2]))
        ]

    whole_metadata = (halves[0] / ".metadata").read_bytes()
    for edit, words in ((shrink, "do not cover it"), (overlap, "overlap")):
        change(halves[0], edit)
        rejected(halves[0], "the tensor w is damaged", words)
        (halves[0] / ".metadata").write_bytes(whole_metadata)


def test_settings_of_lightning_beside_it(folder: Path) -> None:
    torch.save({"epoch": 4, "hyper_parameters": {"lr": 0.1}}, folder / "meta.pt")
    read = read_checkpoint(folder)
    assert (read.extras["epoch"], read.extras["hyper_parameters"]) == (4, {"lr": 0.1})
    assert folder / "meta.pt" in read.files


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / "__0_0.distcp").unlink()
    rejected(folder, "names __0_0.distcp, which is missing", "every rank")


def test_a_truncated_file_is_named(folder: Path) -> None:
    file = folder / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:100])
    rejected(folder, "__0_0.distcp is truncated")


@pytest.mark.parametrize("cut", [0, 20, 500])
def test_truncated_metadata(folder: Path, cut: int) -> None:
    path = folder / ".metadata"
    path.write_bytes(path.read_bytes()[:cut])
    rejected(folder, "truncated")


def test_a_place_outside_the_folder(folder: Path) -> None:
    def move(metadata: Metadata) -> None:
        for place in metadata.storage_data.values():
            place.relative_path = "../__0_0.distcp"

    change(folder, move)
    rejected(folder, "points outside its folder", "../__0_0.distcp")


def test_sizes_that_are_not_those_of_the_pieces(folder: Path) -> None:
    def grow(metadata: Metadata) -> None:
        entry = metadata.state_dict_metadata["model.half"]
        entry.size = entry.chunks[0].sizes = torch.Size([1 << 50])

    change(folder, grow)
    rejected(folder, "the tensor half is damaged", "larger than their files")


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[object, ...]:
        return exec, (f"open({self.path!r}, 'w').close()",)


def test_no_code_of_the_metadata_runs(folder: Path) -> None:
    def poison(metadata: Metadata) -> None:
        metadata.planner_data = Canary(folder / "canary")

    change(folder, poison)
    rejected(folder, "contains builtins.exec, which torch.distributed.checkpoint never writes")
    assert not (folder / "canary").exists()


def test_no_code_of_a_saved_object_runs(tmp_path: Path) -> None:
    """Objects beside the tensors are pickles too; one with a class is left out, and the weights are read."""
    with pytest.warns(UserWarning, match="single process"):
        dcp.save({"model": STATE, "scheduler": Canary(tmp_path / "canary")}, checkpoint_id=tmp_path / "d", no_dist=True)
    read = read_checkpoint(tmp_path / "d")
    assert read.state.keys() == STATE.keys()
    assert "scheduler" not in read.extras or read.extras["scheduler"] is None
    assert not (tmp_path / "canary").exists()
