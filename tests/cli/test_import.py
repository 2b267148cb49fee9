"""`ibnorm-export import` as a user sees it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.models.importers.test_nanogpt import ARGS, NORM, gpt
from tests.support.json_documents import read_document
from tests.support.strangers import save_nanogpt


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_nanogpt(tmp_path_factory.mktemp("out") / "ckpt.pt", gpt(), ARGS)


def test_it_prints_what_was_mapped_and_the_next_command(cli: Any, source: Path, tmp_path: Path) -> None:
    code, out, err = cli("import", source, "-o", tmp_path / "gpt", "--from", "nanogpt", "--norm", json.dumps(NORM))
    assert code == 0
    assert err.endswith(f"next: ibnorm-export export {tmp_path / 'gpt'} -o gpt.onnx\n")
    assert "gpt2 from a checkpoint of nanogpt" in out
    assert "transformer.h.0.ln_1 ... transformer.ln_f" in out
    assert "note: tied head" in out


def test_it_prints_one_json_object(cli: Any, source: Path, tmp_path: Path) -> None:
    code, out, _ = cli("import", source, "-o", tmp_path / "gpt", "--norm", json.dumps(NORM), "--json")
    found = read_document(out, "import")
    assert code == 0
    assert (found["kind"], found["family"], found["tokenizer"]) == ("nanogpt", "gpt2", False)
    assert len(found["norms"]) == 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--norm", "{"], "--norm is not valid JSON"),
        (["--norm-args", "[1]"], "--norm-args is '[1]'; it must be a JSON object"),
        ([], "Add the class that it was trained with, --norm-class package.module:Class"),
        (["--from", "keras"], "kind is 'keras'; it must be one of"),
    ],
)
def test_bad_input_ends_in_one_line(cli: Any, source: Path, tmp_path: Path, words: list[str], message: str) -> None:
    code, out, err = cli("import", source, "-o", tmp_path / "gpt", *words)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "gpt").exists()
