"""Text: sampling, one loop for all runtimes, the command, and what it rejects."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ibnorm_export import models
from ibnorm_export.errors import IBNormError, ModelFileError
from ibnorm_export.generation.sampling import Sampling
from ibnorm_export.generation.sessions import open_sessions, torch_sessions
from ibnorm_export.generation.text_model import TextModel, open_checkpoint, open_folder
from ibnorm_export.text_models import open_text_model
from tests.support.accuracy import assert_rows_close
from tests.support.json_documents import read_document

PROMPT = "Once: naïve"
SAMPLED = Sampling(max_new_tokens=24, temperature=1.3, top_p=0.9, seed=5)


@pytest.fixture(scope="module")
def forms(genai_checkpoint: Path, text_folder: Callable[[str], Path]) -> dict[str, Path]:
    """One checkpoint, and its folder for each runtime."""
    return {"torch": genai_checkpoint, "portable": text_folder("portable"), "genai": text_folder("genai")}


def opened(forms: dict[str, Path], name: str) -> TextModel:
    if name == "torch":
        return open_checkpoint(models.load(forms[name], task="text-generation"))
    return open_folder(forms[name])


# ---- choosing ----


def test_greedy_takes_the_likeliest_and_needs_no_seed() -> None:
    logits = np.array([0.1, 3.0, -1.0, 2.9], dtype=np.float32)
    assert {Sampling().choose(logits, np.random.default_rng(seed)) for seed in range(20)} == {1}


def test_sampling_follows_the_softmax() -> None:
    probabilities = np.array([0.1, 0.2, 0.3, 0.4])
    logits = np.log(probabilities).astype(np.float32)
    rng = np.random.default_rng(0)
    drawn = np.bincount([Sampling(temperature=1.0).choose(logits, rng) for _ in range(20_000)], minlength=4) / 20_000
    np.testing.assert_allclose(drawn, probabilities, atol=0.015)  # four standard deviations
    half = Sampling(temperature=0.5)  # squares the odds
    drawn = np.bincount([half.choose(logits, rng) for _ in range(20_000)], minlength=4) / 20_000
    np.testing.assert_allclose(drawn, probabilities**2 / (probabilities**2).sum(), atol=0.015)  # as above


@pytest.mark.parametrize(("top_p", "kept"), [(0.3, {3}), (0.5, {3, 2}), (0.8, {3, 2, 1}), (1.0, {0, 1, 2, 3})])
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_p: float, kept: set[int]) -> None:
    logits = np.log(np.array([0.1, 0.2, 0.3, 0.4])).astype(np.float32)
    rng = np.random.default_rng(0)
    assert {Sampling(temperature=1.0, top_p=top_p).choose(logits, rng) for _ in range(500)} == kept


def test_a_temperature_near_zero_takes_the_likeliest(recwarn: pytest.WarningsRecorder) -> None:
    logits = np.array([0.0, 3.0, 2.0, -np.inf], dtype=np.float32)
    rng = np.random.default_rng(1)
    assert {Sampling(temperature=temperature).choose(logits, rng) for temperature in (1e-320, 1e-5)} == {1}
    assert not recwarn.list


@pytest.mark.parametrize(
    ("values", "names"), [((0, 0.0, 1.0), "max_new"), ((1, -1.0, 1.0), "temperature"), ((1, 1.0, 0.0), "top_p")]
)
def test_sampling_is_checked(values: tuple[int, float, float], names: str) -> None:
    with pytest.raises(IBNormError, match=names):
        Sampling(values[0], values[1], top_p=values[2])


# ---- the loop ----


@pytest.mark.parametrize("sampling", [Sampling(max_new_tokens=24), SAMPLED], ids=["greedy", "sampled"])
def test_every_runtime_writes_the_same_text(forms: dict[str, Path], sampling: Sampling) -> None:
    results = {name: opened(forms, name).generate(PROMPT, sampling) for name in forms}
    assert results["torch"].tokens == results["portable"].tokens == results["genai"].tokens
    assert len(results["torch"].tokens) > 4
    assert results["torch"].prompt_tokens == len(PROMPT.encode())
    again = opened(forms, "portable").generate(PROMPT, sampling)
    assert again.text == results["portable"].text


def test_greedy_is_what_torch_chooses_without_a_cache(forms: dict[str, Path]) -> None:
    module = models.load(forms["torch"]).module
    ids = list(PROMPT.encode())
    for _ in range(12):
        with torch.inference_mode():
            ids.append(int(module(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    found = opened(forms, "portable").generate(PROMPT, Sampling(max_new_tokens=12))
    assert list(found.tokens) == ids[-12:]


def test_the_pieces_make_the_text(forms: dict[str, Path]) -> None:
    pieces: list[str] = []
    result = opened(forms, "portable").generate(PROMPT, SAMPLED, write=pieces.append)
    assert "".join(pieces) == result.text
    assert result.stopped == "length"
    other = opened(forms, "portable").generate(PROMPT, Sampling(24, 1.3, top_p=0.9, seed=6))
    assert other.tokens != result.tokens


def test_another_backend_writes_the_same_text(forms: dict[str, Path]) -> None:
    """onnx.reference stands for those that need other packages, which tests/runtimes/others runs."""
    sampling = Sampling(max_new_tokens=6, temperature=1.3, seed=5)
    expected = opened(forms, "portable").generate(PROMPT, sampling)
    model = open_folder(forms["portable"], backend="reference")
    assert model.backend == "reference"
    assert model.generate(PROMPT, sampling).tokens == expected.tokens
    assert model.generate(PROMPT, sampling).tokens == expected.tokens, "the second text starts with an empty cache"


@pytest.mark.parametrize(
    ("form", "options", "words"),
    [
        ("genai", {"backend": "ort-web"}, "is for onnxruntime-genai, which runs it; leave out --backend"),
        ("portable", {"backend": "ort-weeb"}, "there is no backend 'ort-weeb'; choose one of "),
        ("portable", {"backend": "triton"}, "backend triton generates no text here"),
        ("portable", {"npm": Path()}, "backend ort-cpu runs no npm package: use --backend ort-web or ort-node"),
        ("torch", {"backend": "ort-cpu"}, "is a checkpoint, which PyTorch runs; leave out --backend"),
    ],
)
def test_a_backend_that_does_not_suit(forms: dict[str, Path], form: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(IBNormError, match=re.escape(words)):
        open_text_model(forms[form], **options)


@pytest.mark.parametrize("name", ["torch", "portable", "genai"])
def test_the_positions_of_the_model_end_the_text(forms: dict[str, Path], name: str) -> None:
    model = opened(forms, name)  # 64 positions
    result = model.generate("x" * 60, Sampling(max_new_tokens=20))
    assert (len(result.tokens), result.stopped) == (4, "positions")
    with pytest.raises(ModelFileError, match="has 64 tokens; the model has 64 positions"):
        model.generate("x" * 64)
    with pytest.raises(ModelFileError, match="the prompt is empty"):
        model.generate("")


def test_an_end_token_ends_the_text(forms: dict[str, Path], tmp_path: Path) -> None:
    greedy = opened(forms, "portable").generate(PROMPT, Sampling(max_new_tokens=6))
    folder = Path(shutil.copytree(forms["portable"], tmp_path / "folder"))
    settings = json.loads((folder / "generation_config.json").read_text())
    settings["eos_token_id"] = [greedy.tokens[3], 1000]
    (folder / "generation_config.json").write_text(json.dumps(settings))
    result = open_folder(folder).generate(PROMPT, Sampling(max_new_tokens=6))
    end = greedy.tokens.index(greedy.tokens[3])
    assert (result.tokens, result.stopped) == (greedy.tokens[:end], "end")


def test_the_end_tokens_of_genai_config_end_the_text_too(forms: dict[str, Path], tmp_path: Path) -> None:
    """It writes padding after such a token, which is not part of the text."""
    greedy = opened(forms, "genai").generate(PROMPT, Sampling(max_new_tokens=6))
    folder = Path(shutil.copytree(forms["genai"], tmp_path / "folder"))
    settings = json.loads((folder / "genai_config.json").read_text())
    settings["model"]["eos_token_id"] = [greedy.tokens[3], 0]
    (folder / "genai_config.json").write_text(json.dumps(settings))
    result = open_folder(folder).generate(PROMPT, Sampling(max_new_tokens=6))
    assert (result.tokens, result.stopped) == (greedy.tokens[: greedy.tokens.index(greedy.tokens[3])], "end")


def test_greedy_ignores_the_search_settings_of_the_folder(forms: dict[str, Path], tmp_path: Path) -> None:
    """The settings of a chat model sample, and penalise repetition."""
    greedy = opened(forms, "genai").generate(PROMPT, Sampling(max_new_tokens=24))
    folder = Path(shutil.copytree(forms["genai"], tmp_path / "folder"))
    settings = json.loads((folder / "genai_config.json").read_text())
    settings["search"] |= {"do_sample": True, "temperature": 5.0, "repetition_penalty": 3.0, "no_repeat_ngram_size": 1}
    settings["search"] |= {"num_beams": 4, "num_return_sequences": 2}
    (folder / "genai_config.json").write_text(json.dumps(settings))
    assert open_folder(folder).generate(PROMPT, Sampling(max_new_tokens=24)).tokens == greedy.tokens


@pytest.mark.parametrize("form", ["torch", "portable", "genai"])
def test_tokens_that_were_chosen_are_part_of_the_text(forms: dict[str, Path], form: str) -> None:
    """Whether or not the model has processed them: steps, given tokens and a rewind in any order."""
    prompt = np.array([[65, 66, 67]])
    folder = forms[form]
    source = torch_sessions(models.load(folder, task="text-generation")) if form == "torch" else open_sessions(folder)
    session = source.start(1, 32)
    session.feed(prompt)
    chosen = [int(session.step()[0]) for _ in range(3)]
    given = session.feed(np.array([[70]]))
    fresh = source.start(1, 32).feed(np.array([[*prompt[0], *chosen, 70]]))
    assert_rows_close(given, fresh)
    session.step()
    session.rewind(2)
    session.feed(prompt[:, 2:])
    assert [int(session.step()[0]) for _ in range(3)] == chosen


# ---- what it rejects ----


def test_a_folder_must_be_whole(forms: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(forms["portable"], tmp_path / "folder"))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelFileError, match=r"no tokenizer\.json"):
        open_folder(folder)
    config = json.loads((folder / "config.json").read_text())
    for size in ("many", True):
        (folder / "config.json").write_text(json.dumps({**config, "vocab_size": size}))
        with pytest.raises(ModelFileError, match="vocab_size"):
            open_folder(folder)
    shutil.copy(forms["portable"] / "tokenizer.json", folder)
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 200}))
    with pytest.raises(ModelFileError, match="token 255, but the model's embedding has only 200"):
        open_folder(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ModelFileError, match="does not exist"):
        open_folder(folder)


# ---- the command ----


def test_the_command_streams_and_reports(forms: dict[str, Path]) -> None:
    code = "from ibnorm_export.cli.__main__ import run; run()"
    command = [sys.executable, "-c", code, "generate", str(forms["portable"]), "--prompt", PROMPT]
    plain = subprocess.run([*command, "--max-new-tokens", "8"], capture_output=True, text=True, check=False)
    assert plain.returncode == 0, plain.stderr
    as_json = subprocess.run([*command, "--max-new-tokens", "8", "--json"], capture_output=True, text=True, check=False)
    found = read_document(as_json.stdout, "generate")
    assert plain.stdout == PROMPT + found["text"] + "\n"
    assert (found["backend"], found["stopped"], len(found["tokens"])) == ("ort-cpu", "length", 8)
    bad = subprocess.run([*command[:-1], "", "--json"], capture_output=True, text=True, check=False)
    assert bad.returncode == 2
    long = subprocess.run([*command[:-1], "x" * 64], capture_output=True, text=True, check=False)
    assert (long.returncode, long.stdout) == (2, ""), "the prompt is not echoed before it is known to be good"
    assert "the prompt is empty" in json.loads(bad.stdout)["error"]["message"]


def test_the_example_with_plain_onnxruntime(forms: dict[str, Path]) -> None:
    example = Path(__file__).parents[2] / "examples" / "generate_onnxruntime.py"
    done = subprocess.run(
        [sys.executable, str(example), str(forms["portable"]), "ab"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    expected = opened(forms, "portable").generate("ab", Sampling(max_new_tokens=62)).text
    assert done.stdout.startswith("ab" + expected[:8])
    assert "ibnorm_export" not in example.read_text()
