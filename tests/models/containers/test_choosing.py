"""Which weights of a checkpoint are taken: wrappers of training codes, weights of the last step or their average."""

from __future__ import annotations

import argparse
import collections
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ibnorm_export.errors import CheckpointError
from ibnorm_export.models.containers import read_checkpoint


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


NET = network()
OPTIMIZER = torch.optim.AdamW(NET.parameters())
NET(torch.ones(2, 3)).sum().backward()
OPTIMIZER.step()
RAW: Mapping[str, Tensor] = NET.state_dict()
AVERAGE = collections.OrderedDict((name, tensor + 1) for name, tensor in RAW.items())


def averaged() -> dict[str, Tensor]:
    """The state dict of torch's AveragedModel, whose weights are `AVERAGE`."""
    model = AveragedModel(NET)
    model.module.load_state_dict(AVERAGE)
    return model.state_dict()


def prefixed(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


@pytest.fixture
def saved(tmp_path: Path) -> Any:
    def save(content: object) -> Path:
        torch.save(content, tmp_path / "w.pt")
        return tmp_path / "w.pt"

    return save


def same(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    return state.keys() == wanted.keys() and all(torch.equal(state[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    "content",
    [
        RAW,
        {"state_dict": RAW, "epoch": 1},
        {"model": RAW, "optimizer": OPTIMIZER.state_dict(), "iter_num": 5, "best_val_loss": torch.tensor(1.0)},
        {"model_state_dict": RAW, "optimizer_state_dict": OPTIMIZER.state_dict(), "loss": 0.1},
        {"net": RAW, "acc": 93.1, "epoch": 9},
        {"module": RAW, "optimizer": None, "lr_scheduler": None, "global_steps": 10},
        {"app": {"model": RAW, "optim": OPTIMIZER.state_dict()}},
        {"model": {"state_dict": RAW}},
        {"my_classifier": RAW, "epoch": 1},
        {"my_classifier": RAW, "losses": {"train": torch.tensor(0.1)}, "average": {"loss": torch.tensor([0.2])}},
        {"my_classifier": RAW, "rng_state": {"cpu": torch.get_rng_state()}, "optimizer": {"momentum": dict(AVERAGE)}},
        {"model": {**RAW, "version": 3}},
        {"state_dict": RAW, "discriminator": {"a.weight": torch.ones(2, 3)}},
        {"state_dict": RAW, "avg_losses": [torch.tensor(0.5), torch.tensor([0.25])]},
        {"model": RAW, "rng_state": {"cpu": torch.get_rng_state(), "cuda": torch.get_rng_state()}},
        [RAW, {"epoch": 1}],
    ],
    ids=lambda content: ",".join(str(key) for key in content if isinstance(key, str))[:40] or "a list",
)
def test_wrappers_of_training_codes(saved: Any, content: object) -> None:
    read = read_checkpoint(saved(content))
    assert same(read.state, RAW)
    assert read.notes == ()


def test_plain_values_between_the_tensors(saved: Any) -> None:
    read = read_checkpoint(saved({**RAW, "epoch": 3, "note": "x"}))
    assert same(read.state, RAW)
    assert read.extras == {"epoch": 3, "note": "x"}


def test_what_is_beside_the_weights(saved: Any) -> None:
    read = read_checkpoint(
        saved({"model": RAW, "optimizer": OPTIMIZER.state_dict(), "model_args": {"n_layer": 2}, "best_val_loss": BEST})
    )
    assert read.extras["model_args"] == {"n_layer": 2}
    assert read.extras["best_val_loss"] == 0.25
    assert "model" not in read.extras
    assert read.extras["optimizer"]["param_groups"][0]["lr"] == 1e-3


BEST = torch.tensor(0.25)

#: Checkpoints with both kinds of weights: name, content, where each kind is, and the prefix of each.
BOTH: dict[str, tuple[object, str, str, str, str]] = {
    "timm": (
        {
            "epoch": 1,
            "arch": "vit_tiny",
            "state_dict": RAW,
            "optimizer": OPTIMIZER.state_dict(),
            "version": 2,
            "args": argparse.Namespace(model="vit_tiny", lr=1e-3),
            "state_dict_ema": AVERAGE,
            "metric": 71.5,
        },
        "state_dict",
        "state_dict_ema",
        "",
        "",
    ),
    "torchvision": (
        {"model": RAW, "model_ema": averaged(), "epoch": 1, "args": argparse.Namespace(model_ema=True)},
        "model",
        "model_ema",
        "",
        "module.",
    ),
    "BasicSR": ({"params": RAW, "params_ema": AVERAGE}, "params", "params_ema", "", ""),
    "hand-written": ({"model": RAW, "ema": AVERAGE}, "model", "ema", "", ""),
    "nested": ({"model": RAW, "ema_state_dict": {"model": AVERAGE}}, "model", "ema_state_dict.model", "", ""),
    "ema-pytorch": (
        {
            "model": RAW,
            "ema": {
                **prefixed("online_model.", RAW),
                **prefixed("ema_model.", AVERAGE),
                "initted": torch.tensor(True),
                "step": torch.tensor(5),
            },
        },
        "model",
        "ema.ema_model",
        "",
        "",
    ),
    "Lightning, a callback of the user's": (
        {
            "state_dict": prefixed("model.", RAW),
            "callbacks": {"EMACallback{'decay': 0.99}": {"ema_state_dict": prefixed("model.", AVERAGE)}},
            "pytorch-lightning_version": "2.5.0",
        },
        "state_dict",
        "callbacks.EMACallback{'decay': 0.99}.ema_state_dict",
        "model.",
        "model.",
    ),
    "Lightning's WeightAveraging": (
        {
            "state_dict": prefixed("model.", AVERAGE),
            "current_model_state": prefixed("model.", RAW),
            "averaging_state": {"n_averaged": torch.tensor(3)},
            "callbacks": {"EMAWeightAveraging": {"latest_update_step": 10}},
        },
        "current_model_state",
        "state_dict",
        "model.",
        "model.",
    ),
    "a module of the user's": (
        {
            "state_dict": {
                **prefixed("model.", RAW),
                **prefixed("ema_model.module.", AVERAGE),
                "ema_model.n_averaged": torch.tensor(2),
            }
        },
        "state_dict",
        "state_dict.ema_model",
        "model.",
        "",
    ),
    "a module of the user's, in a wrapper": (
        {
            "state_dict": {**prefixed("module.net.", RAW), **prefixed("module.net_ema.", AVERAGE)},
            "averages": 1,
        },
        "state_dict",
        "state_dict.module.net_ema",
        "module.net.",
        "",
    ),
    "names without dots, as LitEma's": (
        {
            "state_dict": {
                **prefixed("model.", RAW),
                **{f"model_ema.{name.replace('.', '')}": tensor for name, tensor in AVERAGE.items()},
                "model_ema.decay": torch.tensor(0.999),
                "model_ema.num_updates": torch.tensor(3),
            }
        },
        "state_dict",
        "state_dict.model_ema",
        "model.",
        "",
    ),
    "avg_model": ({"model": RAW, "avg_model": AVERAGE}, "model", "avg_model", "", ""),
    "a module with a shadow": (
        {**prefixed("model.", RAW), **prefixed("ema.shadow.", AVERAGE)},
        "the tensors at the top level",
        "ema",
        "model.",
        "",
    ),
    "DINO": ({"student": RAW, "teacher": AVERAGE, "epoch": 2}, "student", "teacher", "", ""),
}


@pytest.mark.parametrize("writer", BOTH)
def test_raw_and_averaged_weights_are_never_mixed_up(saved: Any, writer: str) -> None:
    content, raw, average, raw_prefix, average_prefix = BOTH[writer]
    path = saved(content)
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    for words in (f"({raw})", f"({average})", "--weights raw", "--weights ema"):
        assert words in str(caught.value)
    one, other = read_checkpoint(path, weights="raw"), read_checkpoint(path, weights="ema")
    assert same(one.state, prefixed(raw_prefix, RAW))
    assert same(other.state, prefixed(average_prefix, AVERAGE))
    assert one.notes == (f"raw weights ({raw}), as --weights raw asks",)
    assert other.notes == (f"EMA weights ({average}), as --weights ema asks",)


@pytest.mark.parametrize("content", [{"ema": AVERAGE}, {"model_ema": AVERAGE, "epoch": 1}, averaged()])
def test_an_average_alone_is_taken_and_said(saved: Any, content: object) -> None:
    read = read_checkpoint(saved(content))
    assert all(torch.equal(read.state[name], tensor) for name, tensor in zip(read.state, AVERAGE.values(), strict=True))
    assert "EMA weights" in read.notes[0]
    assert "the only ones" in read.notes[0]
    with pytest.raises(CheckpointError, match=r"has no raw weights; it has EMA weights .*--weights ema"):
        read_checkpoint(saved(content), weights="raw")


@pytest.mark.parametrize("key", ["EMAmodel", "smoothed", "slow_weights", "best"])
def test_a_copy_of_the_model_under_an_unknown_name_is_not_ignored(saved: Any, key: str) -> None:
    path = saved({"model": RAW, key: AVERAGE})
    with pytest.raises(CheckpointError, match=rf'twice: model and {key}, .* --weights raw .*\["{key}"\]'):
        read_checkpoint(path)
    assert same(read_checkpoint(path, weights="raw").state, RAW)


def test_an_average_that_is_not_there(saved: Any) -> None:
    with pytest.raises(CheckpointError, match=r"has no EMA weights; it has raw weights \(model\): --weights raw"):
        read_checkpoint(saved({"model": RAW}), weights="ema")
    with pytest.raises(CheckpointError, match="weights is 'mean'; it must be one of raw, ema"):
        read_checkpoint(saved({"model": RAW}), weights="mean")


def test_averaged_tensors_without_names(saved: Any) -> None:
    """As diffusers' EMAModel and torch_ema keep them: a list in the order of the model's parameters."""
    shadows = [parameter.detach() + 1 for parameter in NET.parameters()]
    content = {"model": RAW, "ema": {"decay": 0.999, "shadow_params": shadows}}
    read = read_checkpoint(saved(content), weights="ema")
    wanted = {**RAW, **{name: AVERAGE[name] for name, _ in NET.named_parameters()}}
    assert same(read.state, wanted)
    twice = {"first": RAW["0.weight"], "again": RAW["0.weight"], "bias": RAW["0.bias"]}
    read = read_checkpoint(saved({"model": twice, "ema": {"shadow_params": shadows[:2]}}), weights="ema")
    assert same(read.state, {"first": shadows[0], "again": shadows[0], "bias": shadows[1]}), (
        "a tied weight, by each name"
    )
    content["ema"]["shadow_params"] = shadows[1:]  # type: ignore[index]  # the value is a dict
    with pytest.raises(CheckpointError, match=r"5 tensors without names, .*ema\.copy_to"):
        read_checkpoint(saved(content), weights="ema")
    assert same(read_checkpoint(saved(content), weights="raw").state, RAW)


def test_a_model_that_uses_a_moving_average_itself(saved: Any) -> None:
    """Its own module with such a name is part of the model, not a copy of it."""
    state = {"encoder.weight": torch.ones(3, 4), "ema.alpha": torch.ones(4), "ema.kernel": torch.ones(9)}
    read = read_checkpoint(saved({"model": state}))
    assert same(read.state, state)


def test_two_models_in_one_file(saved: Any) -> None:
    with pytest.raises(
        CheckpointError, match=r'2 state dicts of raw weights: generator, discriminator\..*\["generator"\]'
    ):
        read_checkpoint(saved({"generator": RAW, "discriminator": AVERAGE}))
    with pytest.raises(CheckpointError, match=r"2 state dicts of EMA weights: ema_0\.999, ema_0\.9999"):
        read_checkpoint(saved({"model": RAW, "ema_0.999": RAW | {}, "ema_0.9999": AVERAGE}), weights="ema")


def test_moments_of_an_optimizer_are_not_weights(saved: Any) -> None:
    """`exp_avg` is a moving average of gradients; a file with an optimizer alone has no weights."""
    path = saved({"optimizer": OPTIMIZER.state_dict(), "epoch": 1})
    with pytest.raises(CheckpointError, match=r"does not contain a state dict .* the keys optimizer, epoch"):
        read_checkpoint(path)
