"""docs/how-to/import-a-checkpoint.md: every recipe, on a checkpoint as its training code writes it."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ibnorm_export.cli import main
from tests.docs.pages import commands
from tests.models.importers import test_galore as galore
from tests.models.importers import test_litgpt as litgpt
from tests.models.importers.test_containers import lightning
from tests.support.strangers import (
    GPT,
    ChannelNorm,
    LitGPT,
    Llama,
    LogNorm,
    ResNet,
    save_distributed,
    save_nanogpt,
    save_torchvision,
    shake,
)

PAGE = "how-to/import-a-checkpoint.md"
CHARACTERS = [chr(code) for code in range(32, 127)]
ARGS = {
    "n_layer": 1,
    "n_head": 4,
    "n_embd": 16,
    "block_size": 40,
    "bias": False,
    "vocab_size": len(CHARACTERS),
    "dropout": 0.0,
}


def gpt(args: dict[str, object] = ARGS) -> torch.nn.Module:
    return shake(GPT(args, lambda c: LogNorm(c.n_embd, bias=c.bias)))


def write_nanogpt() -> None:
    Path("out").mkdir()
    save_nanogpt(Path("out/ckpt.pt"), gpt(), ARGS)
    stoi = {character: token for token, character in enumerate(CHARACTERS)}
    Path("out/meta.pkl").write_bytes(pickle.dumps({"vocab_size": len(stoi), "stoi": stoi}))


def write_galore() -> None:
    Path("checkpoints").mkdir()
    model = shake(Llama(galore.CONFIG, lambda width: LogNorm(width)))
    galore.saved(Path("checkpoints/model_10000"), model, galore.CONFIG)


def write_litgpt() -> None:
    Path("out").mkdir()
    litgpt.lit_folder(Path("out/final"), shake(LitGPT(litgpt.CONFIG, lambda width: LogNorm(width))), litgpt.CONFIG)


def write_torchvision() -> None:
    save_torchvision(Path("checkpoint.pth"), shake(ResNet((1, 1), ChannelNorm, bottleneck=False)))


def write_lightning() -> None:
    Path("lightning_logs").mkdir()
    lightning(Path("lightning_logs/last.ckpt"), gpt(), {"config": ARGS})


def write_dcp() -> None:
    Path("checkpoints").mkdir()
    save_distributed(Path("checkpoints/step-1000"), gpt(ARGS | {"bias": True}))


WRITERS: dict[str, Callable[[], None]] = {
    "out/ckpt.pt": write_nanogpt,
    "checkpoints/model_10000": write_galore,
    "out/final": write_litgpt,
    "checkpoint.pth": write_torchvision,
    "lightning_logs/last.ckpt": write_lightning,
    "checkpoints/step-1000": write_dcp,
}
#: Recipes that need timm, which `make test-families` installs: test_timm_train.py imports such a checkpoint.
ELSEWHERE = {"output/train/last.pth.tar"}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the stranger's classes."""
    strangers = "from tests.support.strangers import"
    (tmp_path / "model.py").write_text(f"{strangers} LogNorm as IBNorm\n")
    (tmp_path / "norms.py").write_text(f"{strangers} ChannelNorm as IBNorm2d, LogNorm as IBNorm\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("model", "norms"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def run(words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["ibnorm-export", *words])
    return main.main()


IMPORTS = [words for words in commands(PAGE) if words[0] == "import"]


@pytest.mark.parametrize("words", IMPORTS, ids=" ".join)
def test_a_recipe(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if words[1] in ELSEWHERE:
        assert "timm" in words
        return
    WRITERS[words[1]]()
    assert run(words, monkeypatch) == 0
    assert Path(words[3], "config.json").is_file()


def test_every_kind_has_a_recipe() -> None:
    from ibnorm_export import ImportKind

    stated = {words[words.index("--from") + 1] for words in IMPORTS if "--from" in words}
    assert stated == set(ImportKind) - {"auto"}


def test_the_first_example_exports_verifies_and_generates(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    write_nanogpt()
    first = commands(PAGE)[:4]
    assert [words[0] for words in first] == ["import", "export", "verify", "generate"]
    for words in first:
        capfd.readouterr()
        assert run(words, monkeypatch) == 0, capfd.readouterr().err
    assert "first token after" in "".join(capfd.readouterr())
