"""Models loaded from every container: of the user's own code, and folders of transformers with pickled weights."""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from ibnorm_export import models
from ibnorm_export.artifacts.metadata import Task
from ibnorm_export.cli.main import app
from ibnorm_export.errors import CheckpointError

CODE = """
import torch
from torch import nn

from ibnorm_export import CustomModel, IBNormSpec, InputSpec
from ibnorm_export.op.torch_op import IBNorm


def network():
    return nn.Sequential(nn.Linear(4, 8), IBNorm(8, IBNormSpec("L", 4.0, epsilon=1e-5)), nn.Linear(8, 2))


def build():
    return CustomModel(network(), inputs=(InputSpec("x", ("batch", 4), floating=True),), outputs=("y",))
"""


@pytest.fixture
def states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """The state dicts of a user's network, of the last step and averaged; its code is in the working directory."""
    (tmp_path / "my_net.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    importlib.invalidate_caches()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        raw = importlib.import_module("my_net").network().state_dict()
    yield raw, {name: tensor + 0.5 for name, tensor in raw.items()}
    sys.modules.pop("my_net", None)


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def check(model: models.LoadedModel, wanted: dict[str, Tensor]) -> None:
    found = model.module.state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    ("file", "prefix"),
    [
        ("last.ckpt", "model."),
        ("ckpt.pt", "_orig_mod."),
        ("checkpoint.pth", "module."),
        ("weights", "module._orig_mod."),
    ],
)
def test_a_training_checkpoint_of_the_users_code(
    states: tuple[dict[str, Tensor], dict[str, Tensor]], file: str, prefix: str
) -> None:
    raw, _ = states
    torch.save({"state_dict": prefixed(prefix, raw), "args": argparse.Namespace(lr=1.0), "epoch": 3}, file)
    model = models.load(file, "my_net:build")
    check(model, raw)
    assert model.notes == (f"names of weights: the prefix {prefix} was stripped",)


def test_a_distributed_checkpoint_of_the_users_code(states: tuple[dict[str, Tensor], dict[str, Tensor]]) -> None:
    raw, _ = states
    with pytest.warns(UserWarning, match="single process"):
        dcp.save({"model": raw, "step": 3}, checkpoint_id="step-3", no_dist=True)
    model = models.load("step-3", "my_net:build")
    check(model, raw)
    Path("step-3/__0_0.distcp").touch()
    assert models.load("step-3", "my_net:build").source_sha256 == model.source_sha256


def test_raw_and_ema_on_the_command_line(states: tuple[dict[str, Tensor], dict[str, Tensor]]) -> None:
    raw, average = states
    torch.save({"model": raw, "model_ema": prefixed("module.", average), "epoch": 1}, "c.pth")
    check(models.load("c.pth", "my_net:build", weights="ema"), average)
    runner = CliRunner()
    common = ["c.pth", "--model", "my_net:build"]
    refused = runner.invoke(app, ["export", *common, "-o", "m.onnx"])
    assert isinstance(refused.exception, CheckpointError)
    assert "--weights raw or --weights ema" in str(refused.exception)
    done = runner.invoke(app, ["export", *common, "-o", "m.onnx", "--weights", "ema"], catch_exceptions=False)
    assert done.exit_code == 0
    assert "EMA weights (model_ema), as --weights ema asks" in " ".join(done.output.split())
    assert "--weights ema" in " ".join(done.output.split()).partition("verify")[2]
    for weights, passes in (("ema", True), ("raw", False)):
        result = runner.invoke(app, ["verify", "m.onnx", *common, "--weights", weights, "--samples", "1"])
        assert (result.exit_code == 0) is passes, result.output
    for command in ("inspect", "analyze"):
        result = runner.invoke(app, [command, *common, "--weights", "raw"], catch_exceptions=False)
        assert result.exit_code == 0, result.output


def pickled(source: Path, target: Path, *, parts: int) -> dict[str, Tensor]:
    """Copy a folder of transformers with its weights as pytorch_model.bin or its shards; returns the weights."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"))
    weights = load_file(source / "model.safetensors")
    if parts == 1:
        torch.save(weights, target / "pytorch_model.bin")
        return weights
    places = {}
    for number in range(parts):
        name = f"pytorch_model-{number + 1:05}-of-{parts:05}.bin"
        part = dict(list(weights.items())[number::parts])
        torch.save(part, target / name)
        places |= dict.fromkeys(part, name)
    (target / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return weights


@pytest.mark.parametrize("parts", [1, 3])
def test_a_folder_of_transformers_with_pickled_weights(llama_checkpoint: Path, tmp_path: Path, parts: int) -> None:
    """The same model as from safetensors, in the type of the weights."""
    pickled(llama_checkpoint, tmp_path / "bin", parts=parts)
    model, reference = models.load(tmp_path / "bin"), models.load(llama_checkpoint)
    check(model, reference.module.state_dict())
    assert {p.dtype for p in model.module.parameters()} == {p.dtype for p in reference.module.parameters()}
    assert model.outputs == reference.outputs


def test_shards_that_transformers_writes(llama_checkpoint: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig, LlamaForCausalLM

    stock = LlamaForCausalLM(AutoConfig.from_pretrained(llama_checkpoint))
    stock.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    config = json.loads((tmp_path / "shards" / "config.json").read_text())
    config["ibnorm"] = json.loads((llama_checkpoint / "config.json").read_text())["ibnorm"]
    (tmp_path / "shards" / "config.json").write_text(json.dumps(config))
    model = models.load(tmp_path / "shards", task=Task.TEXT_GENERATION)
    check(model, stock.state_dict())


def test_a_pickle_in_a_folder_of_transformers_runs_no_code(llama_checkpoint: Path, tmp_path: Path) -> None:
    weights = pickled(llama_checkpoint, tmp_path / "bin", parts=1)
    torch.save({**weights, "extra": Canary(tmp_path / "canary")}, tmp_path / "bin" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"builtins\.exec, which is not plain data"):
        models.load(tmp_path / "bin")
    assert not (tmp_path / "canary").exists()


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[object, ...]:
        return exec, (f"open({self.path!r}, 'w').close()",)


def test_weights_of_a_folder_of_transformers_can_be_chosen(llama_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no EMA weights; it has raw weights"):
        models.load(llama_checkpoint, weights="ema")
    check(models.load(llama_checkpoint, weights="raw"), models.load(llama_checkpoint).module.state_dict())
    weights = pickled(llama_checkpoint, tmp_path / "bin", parts=1)
    average = {name: tensor + 0.5 for name, tensor in weights.items()}
    torch.save({"model": weights, "ema": average}, tmp_path / "bin" / "pytorch_model.bin")
    found = models.load(tmp_path / "bin", weights="ema")
    assert torch.equal(found.module.state_dict()["model.norm.weight"], average["model.norm.weight"])
    assert "EMA weights (ema)" in found.notes[0]


def test_weights_that_do_not_fit_are_named_as_before(llama_checkpoint: Path, tmp_path: Path) -> None:
    weights = pickled(llama_checkpoint, tmp_path / "bin", parts=1)
    del weights["model.norm.weight"]
    weights["model.extra"] = torch.ones(2)
    weights["model.layers.0.mlp.up_proj.weight"] = torch.ones(2, 2)
    torch.save(weights, tmp_path / "bin" / "pytorch_model.bin")
    with pytest.raises(CheckpointError) as caught:
        models.load(tmp_path / "bin")
    for words in ("(model.norm.weight)", "(model.extra)", "up_proj.weight: file (2, 2)"):
        assert words in str(caught.value)
    save_file(weights, tmp_path / "bin" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        models.load(tmp_path / "bin")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "net."])
def test_a_folder_of_transformers_saved_by_a_wrapped_model(llama_checkpoint: Path, tmp_path: Path, prefix: str) -> None:
    reference = models.load(llama_checkpoint).module.state_dict()
    weights = prefixed(prefix, pickled(llama_checkpoint, tmp_path / "bin", parts=1))
    save_file(weights, tmp_path / "bin" / "model.safetensors")
    (tmp_path / "bin" / "pytorch_model.bin").unlink()
    found = models.load(tmp_path / "bin", task=Task.TEXT_GENERATION)
    check(found, reference)
    assert found.notes == (f"names of weights: the prefix {prefix} was stripped",)
    weights[f"{prefix}other"] = weights.pop(f"{prefix}model.norm.weight")
    save_file(weights, tmp_path / "bin" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing .*not in the model"):
        models.load(tmp_path / "bin")
