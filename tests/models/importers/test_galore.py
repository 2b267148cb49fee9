"""Checkpoints of GaLore, and of others with the names of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ibnorm_export import import_checkpoint
from ibnorm_export.errors import CheckpointError
from tests.support.import_truth import difference, imported_logits, largest_difference
from tests.support.strangers import Llama, LogNorm, shake
from tests.support.training_writers import galore

#: configs/llama_60m.json of GaLore, narrower.
CONFIG: dict[str, Any] = {
    "architectures": ["LLaMAForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 1,
    "hidden_act": "silu",
    "hidden_size": 16,
    "intermediate_size": 24,
    "initializer_range": 0.02,
    "max_sequence_length": 32,
    "model_type": "llama",
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "pad_token_id": -1,
    "rms_norm_eps": 1e-06,
    "transformers_version": "4.28.1",
    "use_cache": True,
    "vocab_size": 48,
}
NORM = {"compression": "L", "lambda": 4.0, "epsilon": 1e-5, "convention": "multiply"}


def llama() -> torch.nn.Module:
    return shake(Llama(CONFIG, lambda width: LogNorm(width, 4.0, bias=False)))


def saved(folder: Path, model: torch.nn.Module, config: dict[str, Any], safe: bool = False) -> Path:
    """What GaLore's torchrun_main.py leaves: save_pretrained of its model, the optimizer, and the state of training."""
    folder.mkdir()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if safe:
        save_file(state, folder / "model.safetensors")
    else:
        torch.save(state, folder / "pytorch_model.bin")
    torch.save({"optimizer": torch.optim.SGD(model.parameters(), lr=0.1).state_dict()}, folder / "optimizer.pt")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "training_state.json").write_text(json.dumps({"global_step": 10, "tokens_seen": 1000}))
    return folder


@pytest.mark.parametrize("safe", [False, True])
def test_the_logits_are_those_of_the_training_code(tmp_path: Path, safe: bool) -> None:
    model = llama()
    report = import_checkpoint(saved(tmp_path / "model_10", model, CONFIG, safe), tmp_path / "llama", norm=NORM)
    assert report.kind == "galore"
    ids = torch.randint(0, 48, (2, 32), generator=torch.Generator().manual_seed(1))
    assert difference(model, tmp_path / "llama", ids) < 1e-10
    config = json.loads((tmp_path / "llama" / "config.json").read_text())
    assert config["max_position_embeddings"] == 32


def test_a_trained_model_that_transformers_saved(tmp_path: Path) -> None:
    """`save_pretrained` itself writes the folder; benchmarks.run training_checkpoints has the other training codes."""
    written = galore(tmp_path)
    import_checkpoint(written.source, tmp_path / "imported", **written.options)
    assert largest_difference(imported_logits(tmp_path / "imported", written.inputs), written.truth()) < 1e-10


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"intermediate_size": 32}, r"of the wrong shape \(model.layers.0.mlp.down_proj.weight"),
        ({"num_hidden_layers": 3}, "a norm at model.layers.2.input_layernorm, but the weights have no tensor"),
        ({"num_hidden_layers": 1}, "not in the model"),
        ({"model_type": "gopher"}, r"model_type is 'gopher'\. It must be one of"),
    ],
)
def test_a_config_that_does_not_fit(tmp_path: Path, more: dict[str, Any], message: str) -> None:
    source = saved(tmp_path / "model_10", llama(), CONFIG | more)
    with pytest.raises(CheckpointError, match=message) as error:
        import_checkpoint(source, tmp_path / "llama", norm=NORM)
    assert str(source) in str(error.value)
    assert not (tmp_path / "llama").exists()


def test_weights_without_a_config(tmp_path: Path) -> None:
    source = saved(tmp_path / "model_10", llama(), CONFIG)
    (source / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json next to it"):
        import_checkpoint(source, tmp_path / "llama", norm=NORM)
