"""nanoGPT's ckpt.pt: import, load, and the logits of the stranger's own model in float64."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from ibnorm_export import import_checkpoint, load
from ibnorm_export.artifacts.tokenizer import FolderTokenizer
from ibnorm_export.errors import CheckpointError
from tests.support.import_truth import difference
from tests.support.strangers import GPT, LogNorm, save_nanogpt, shake

ARGS: dict[str, Any] = {
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 16,
    "block_size": 24,
    "bias": False,
    "vocab_size": 65,
    "dropout": 0.1,
}
NORM = {"compression": "L", "lambda": 2.5, "epsilon": 1e-5, "convention": "multiply"}


def gpt(**more: Any) -> GPT:
    args = ARGS | more
    return shake(GPT(args, lambda c: LogNorm(c.n_embd, 2.5, bias=c.bias)))  # type: ignore[return-value]  # the same


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, 65, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_logits_are_those_of_the_training_code(
    tmp_path: Path, ids: torch.Tensor, bias: bool, compiled: bool
) -> None:
    model = gpt(bias=bias)
    source = save_nanogpt(tmp_path / "ckpt.pt", model, ARGS | {"bias": bias}, compiled)
    report = import_checkpoint(source, tmp_path / "gpt", norm=NORM)
    assert report.kind == "nanogpt"
    assert difference(model, tmp_path / "gpt", ids) < 1e-10
    assert any("tied head" in note for note in report.notes)
    assert any("_orig_mod" in note for note in report.notes) == compiled
    config = json.loads((tmp_path / "gpt" / "config.json").read_text())
    assert config["ibnorm"]["bias"] is bias


def test_masks_that_older_checkpoints_keep_are_left_out(tmp_path: Path, ids: torch.Tensor) -> None:
    model = shake(GPT(ARGS, lambda c: LogNorm(c.n_embd, 2.5, bias=c.bias), slow=True))
    source = save_nanogpt(tmp_path / "ckpt.pt", model, ARGS)
    import_checkpoint(source, tmp_path / "gpt", norm=NORM)
    assert difference(model, tmp_path / "gpt", ids) < 1e-10


def test_a_head_that_is_not_tied_is_kept(tmp_path: Path, ids: torch.Tensor) -> None:
    model = gpt()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().flip(0))
    source = save_nanogpt(tmp_path / "ckpt.pt", model, ARGS)
    report = import_checkpoint(source, tmp_path / "gpt", norm=NORM)
    assert difference(model, tmp_path / "gpt", ids) < 1e-10
    assert any("lm_head and wte differ" in note for note in report.notes)


def test_the_folder_of_a_run_is_a_source(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    save_nanogpt(tmp_path / "out" / "ckpt.pt", gpt(), ARGS)
    assert import_checkpoint(tmp_path / "out", tmp_path / "gpt", norm=NORM).kind == "nanogpt"


def test_characters_of_meta_pkl_become_a_tokenizer(tmp_path: Path) -> None:
    characters = sorted(set("\n !$&',-.3:;?" + "abcdefghijklmnopqrstuvwxyz" + "abcdefghijklmnopqrstuvwxyz".upper()))
    meta = {
        "vocab_size": len(characters),
        "itos": dict(enumerate(characters)),
        "stoi": {c: i for i, c in enumerate(characters)},
    }
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    source = save_nanogpt(tmp_path / "ckpt.pt", gpt(), ARGS)
    report = import_checkpoint(source, tmp_path / "gpt", norm=NORM, tokenizer=tmp_path / "meta.pkl")
    assert report.tokenizer
    tokenizer = FolderTokenizer(tmp_path / "gpt", 65)
    text = "First Citizen:\nBefore we proceed any further, hear me speak.\n\n All"
    assert tokenizer.encode(text).tolist() == [meta["stoi"][c] for c in text]  # type: ignore[index]  # a dict
    assert tokenizer.decode(tokenizer.encode(text)) == text


class _Code:
    def __reduce__(self) -> Any:
        return print, ("this must not run",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps({"stoi": _Code()}), "is not a plain pickle: it names builtins.print"),
        (b"\x80\x04}", "truncated or is not a pickle"),
        (b"\x80\x02}r\xff\xff\xff\x7f.", "is not nanoGPT's meta.pkl"),  # Python's own reader reserves 16 GB
        (pickle.dumps({"stoi": {"a": 0, "bc": 1}}), "is not nanoGPT's meta.pkl"),
        (pickle.dumps({"stoi": {chr(200 + n): n for n in range(66)}}), "has 66 tokens, but the model has 65"),
    ],
)
def test_a_meta_pkl_that_cannot_be_used(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "meta.pkl").write_bytes(content)
    source = save_nanogpt(tmp_path / "ckpt.pt", gpt(), ARGS)
    with pytest.raises(CheckpointError, match=message):
        import_checkpoint(source, tmp_path / "gpt", norm=NORM, tokenizer=tmp_path / "meta.pkl")
    assert not (tmp_path / "gpt").exists()


def test_without_a_tokenizer_the_notes_say_what_to_type(tmp_path: Path) -> None:
    report = import_checkpoint(save_nanogpt(tmp_path / "ckpt.pt", gpt(), ARGS), tmp_path / "gpt", norm=NORM)
    assert not report.tokenizer
    assert "import again with --tokenizer PATH" in str(report)


@pytest.mark.parametrize(
    ("args", "more", "message"),
    [
        ({"n_layer": 3}, {}, "n_layer is 3, but its weights have 2"),
        ({"n_head": 3}, {}, "n_head is 3, which does not divide n_embd, 16"),
        ({"n_head": None}, {}, "does not state n_head.*--settings '{\"n_head\": VALUE}'"),
        ({}, {"kind": "litgpt"}, "is a checkpoint of nanogpt, not of litgpt: use --from nanogpt"),
        ({}, {"kind": "karpathy"}, "kind is 'karpathy'; it must be one of"),
        ({}, {"norm": None}, "does not state what its norms compute.*--norm-class package.module:Class.*--norm"),
        ({}, {"norm": {"compression": "L", "lambda": 4.0, "epsilon": 1e-5}}, "convention is missing"),
        ({}, {"norm": NORM | {"bias": True}}, "has no bias, but --norm states bias true"),
        ({}, {"tokenizer": "nowhere"}, "--tokenizer nowhere does not exist"),
        ({}, {"norm_class": "no_such_module:Norm", "norm": None}, "no module named 'no_such_module'"),
        ({}, {"norm_class": "torch.nn:functional", "norm": None}, "functional is not a class of torch.nn.Module"),
    ],
)
def test_bad_input(tmp_path: Path, args: dict[str, Any], more: dict[str, Any], message: str) -> None:
    source = save_nanogpt(tmp_path / "ckpt.pt", gpt(), ARGS | args)
    with pytest.raises(CheckpointError, match=message) as error:
        import_checkpoint(source, tmp_path / "gpt", **({"norm": NORM} | more))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "gpt").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("transformer.h.1.mlp.c_fc.weight"), "has no tensor transformer.h.1.mlp.c_fc.weight"),
        (lambda state: state.update({"lm_head.bias": torch.ones(65)}), "has no place for lm_head.bias"),
        (lambda state: state.update({"transformer.ln_f.lam": torch.ones(())}), "also keeps lam .*--norm-class"),
        (
            lambda state: state.update({"transformer.h.0.attn.c_proj.weight": torch.ones(16, 15)}),
            "of the wrong shape .transformer.h.0.attn.c_proj.weight",
        ),
        (lambda state: state.clear() or state.update({"a.weight": torch.ones(2)}), "those of no known architecture"),
    ],
)
def test_weights_that_do_not_fit(tmp_path: Path, change: Any, message: str) -> None:
    source = save_nanogpt(tmp_path / "ckpt.pt", gpt(), ARGS)
    checkpoint = torch.load(source, weights_only=True)
    change(checkpoint["model"])
    torch.save(checkpoint, source)
    with pytest.raises(CheckpointError, match=message) as error:
        import_checkpoint(source, tmp_path / "gpt", norm=NORM)
    assert str(source) in str(error.value)
    assert not (tmp_path / "gpt").exists()


def test_only_an_earlier_import_is_replaced(tmp_path: Path) -> None:
    source = save_nanogpt(tmp_path / "ckpt.pt", gpt(), ARGS)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="exists and is not an earlier import"):
        import_checkpoint(source, tmp_path / "mine", norm=NORM)
    assert (tmp_path / "mine" / "config.json").read_text() == "{}"
    for _ in range(2):
        import_checkpoint(source, tmp_path / "gpt", norm=NORM)
    manifest = json.loads((tmp_path / "gpt" / "import.json").read_text())
    assert manifest["tensors"]["transformer.h.0.attn.c_attn.weight"] == "transformer.h.0.attn.c_attn.weight, transposed"
    assert load(tmp_path / "gpt").family == "gpt2"


def test_layers_with_another_norm(tmp_path: Path, ids: torch.Tensor) -> None:
    model = gpt(bias=True)
    model.transformer["ln_f"] = torch.nn.LayerNorm(16)
    source = save_nanogpt(tmp_path / "ckpt.pt", model, ARGS)
    rules = {"layers": [{"match": "*.ln_f", "norm": "layernorm", "epsilon": 1e-5}]}
    import_checkpoint(source, tmp_path / "gpt", norm=NORM | rules)
    assert difference(model, tmp_path / "gpt", ids) < 1e-10
