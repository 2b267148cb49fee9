"""litgpt's lit_model.pth: import, and the logits of the stranger's own model in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ibnorm_export import import_checkpoint
from ibnorm_export.errors import CheckpointError
from tests.support.import_truth import difference
from tests.support.strangers import LitGPT, LogNorm, shake

CONFIG: dict[str, Any] = {
    "name": "tiny",
    "hf_config": {},
    "block_size": 32,
    "n_layer": 2,
    "n_embd": 16,
    "n_head": 4,
    "n_query_groups": 2,
    "head_size": 8,
    "vocab_size": 60,
    "padded_vocab_size": 64,
    "intermediate_size": 24,
    "mlp_class_name": "LLaMAMLP",
    "norm_class_name": "RMSNorm",
    "norm_eps": 1e-5,
    "parallel_residual": False,
    "shared_attention_norm": False,
    "rotary_percentage": 1.0,
    "rope_base": 5000,
    "rope_condense_ratio": 1,
    "rope_adjustments": None,
    "bias": False,
    "attn_bias": False,
    "sliding_window_size": None,
}
NORM = {"compression": "L", "lambda": 0.5, "epsilon": 1e-5, "convention": "multiply"}


def lit_folder(folder: Path, model: torch.nn.Module, config: dict[str, Any]) -> Path:
    """What litgpt's pretraining saves: the state of Fabric, and the configuration next to it."""
    folder.mkdir()
    state = {"model": model.state_dict(), "iter_num": 10, "step_count": 5, "hparams": {"seed": 42}}
    torch.save(state, folder / "lit_model.pth")
    (folder / "model_config.yaml").write_text(yaml.dump(config))
    return folder


def lit(config: dict[str, Any], legacy: bool = False) -> torch.nn.Module:
    return shake(LitGPT(config, lambda width: LogNorm(width, 0.5, bias=False), legacy))


LLAMA_3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len": 32}


# transformers computes a scaled table of frequencies in float32, so an angle of up to 20 is off by up to 20 * 2^-24
@pytest.mark.parametrize(
    ("more", "tolerance"),
    [({}, 1e-10), ({"rope_condense_ratio": 2, "attn_bias": True}, 1e-6), ({"rope_adjustments": LLAMA_3}, 1e-6)],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_the_logits_are_those_of_the_training_code(
    tmp_path: Path, legacy: bool, more: dict[str, Any], tolerance: float
) -> None:
    config = CONFIG | more
    model = lit(config, legacy)
    report = import_checkpoint(lit_folder(tmp_path / "out", model, config), tmp_path / "llama", norm=NORM)
    assert report.kind == "litgpt"
    ids = torch.randint(0, 64, (2, 20), generator=torch.Generator().manual_seed(1))
    assert difference(model, tmp_path / "llama", ids) < tolerance


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"mlp_class_name": "GptNeoxMLP"}, "mlp_class_name is 'GptNeoxMLP', and LLaMA has LLaMAMLP"),
        ({"rotary_percentage": 0.25}, "rotary_percentage is 0.25, and LLaMA has 1"),
        ({"n_query_groups": 4}, "has 64 rows, but n_head 4, n_query_groups 4 and head_size 8 need 96"),
        ({"n_layer": 3}, "n_layer is 3, but its weights have 2"),
        ({"rope_adjustments": {"factor": 8.0, "beta_fast": 32}}, "rope_adjustments is"),
        (
            {
                "rope_adjustments": dict.fromkeys(("factor", "low_freq_factor", "high_freq_factor"), 1.0)
                | {"original_max_seq_len": "8"}
            },
            "original_max_seq_len of rope_adjustments is '8'; it must be a finite number",
        ),
        ({"n_query_groups": "2"}, "n_query_groups is '2'; it must be a positive whole number"),
        ({"rope_base": 10**400}, r"rope_base is 10*\.\.\.; it must be a finite number"),
        ({"rope_condense_ratio": "x" * 100_000}, r"rope_condense_ratio is 'x{199}\.\.\.; it must be a finite number"),
    ],
)
def test_a_config_that_llama_cannot_have(tmp_path: Path, more: dict[str, Any], message: str) -> None:
    source = lit_folder(tmp_path / "out", lit(CONFIG), CONFIG | more)
    with pytest.raises(CheckpointError, match=message):
        import_checkpoint(source, tmp_path / "llama", norm=NORM)
    assert not (tmp_path / "llama").exists()
