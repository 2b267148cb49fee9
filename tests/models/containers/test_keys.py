"""Prefixes that wrappers add to the names of weights: stripped only where every name then fits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from ibnorm_export.errors import CheckpointError
from ibnorm_export.models.containers import fit_keys
from ibnorm_export.models.weights import fill, tied_names

MODEL = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
WANTED = MODEL.state_dict()


def saved(*names: str) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(float(index)) for index, name in enumerate(names)}


@pytest.mark.parametrize(
    ("template", "stripped"),
    [
        ("{}", ""),
        ("module.{}", "module."),
        ("_orig_mod.{}", "_orig_mod."),
        ("module._orig_mod.{}", "module._orig_mod."),
        ("_orig_mod.module.{}", "_orig_mod.module."),
        ("model.{}", "model."),
        ("model._orig_mod.{}", "model._orig_mod."),
        ("_forward_module.model.module.{}", "_forward_module.model.module."),
        ("my.own.wrapper.{}", "my.own.wrapper."),
    ],
)
def test_a_prefix_that_all_names_have(template: str, stripped: str) -> None:
    state = {template.format(name): tensor for name, tensor in WANTED.items()}
    fitted, notes = fit_keys(state, WANTED)
    assert {name: id(tensor) for name, tensor in fitted.items()} == {name: id(t) for name, t in WANTED.items()}
    assert notes == ((f"names of weights: the prefix {stripped} was stripped",) if stripped else ())


def test_a_wrapper_inside_a_name() -> None:
    """torch.compile or FSDP of some blocks."""
    state = saved("blocks.0._orig_mod.weight", "blocks.1._fsdp_wrapped_module._checkpoint_wrapped_module.weight")
    fitted, notes = fit_keys(state, ["blocks.0.weight", "blocks.1.weight"])
    assert list(fitted) == ["blocks.0.weight", "blocks.1.weight"]
    assert len(notes) == 1


def test_a_model_whose_own_names_look_like_wrappers() -> None:
    state = saved("module.weight", "model.module.bias")
    assert fit_keys(state, ["module.weight", "model.module.bias"]) == (state, ())


@pytest.mark.parametrize(
    "names",
    [
        ("model.a", "model.b", "criterion.weight"),  # one name more than the model has
        ("model.a",),  # one name fewer
        ("module.a", "a"),  # both would be a
        ("model.a", "module.b"),  # no single prefix
    ],
)
def test_names_that_fit_after_no_stripping_stay(names: tuple[str, ...]) -> None:
    state = saved(*names)
    assert fit_keys(state, ["a", "b"]) == (state, ())


def test_two_names_that_would_become_one() -> None:
    state = saved("module.a", "a")
    assert fit_keys(state, ["a"]) == (state, ())


def test_one_name_of_a_tied_weight_is_enough() -> None:
    tied = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    tied[1].weight = tied[0].weight
    state = saved("module.0.weight")
    assert list(fit_keys(state, tied.state_dict(), tied=tied_names(tied))[0]) == ["0.weight"]
    assert list(fit_keys(state, tied.state_dict())[0]) == ["module.0.weight"]


def test_a_mismatch_names_what_is_near() -> None:
    state = dict(WANTED) | {"0.wieght": torch.ones(2, 2)}
    del state["0.weight"]
    with pytest.raises(CheckpointError) as caught:
        fill(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), state, source=Path("w.pt"))
    for words in ("1 missing (0.weight)", "1 not in the model (0.wieght)", "0.wieght may be 0.weight"):
        assert words in str(caught.value)


def test_a_prefix_with_names_left_over_is_explained() -> None:
    state = {f"model.{name}": tensor for name, tensor in WANTED.items()} | {"criterion.weight": torch.ones(1)}
    with pytest.raises(CheckpointError, match=r"model\.0\.weight may be 0\.weight"):
        fill(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), state, source=Path("w.pt"))
