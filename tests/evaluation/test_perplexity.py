"""Perplexity against the loop of transformers' guide in float64, and what each window counts."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from ibnorm_export import EvaluationOptions, IBNormError, evaluate, load
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.tokenizer import write_byte_tokenizer
from ibnorm_export.evaluation.perplexity import windows_of
from ibnorm_export.evaluation.samples import ModelFacts
from ibnorm_export.evaluation.scoring import score_tokens
from ibnorm_export.evaluation.texts import TextData
from tests.support.fake_candidates import FakeCandidate

TEXT = "Größe zählt nicht. The quick brown fox jumps over the lazy dog; " * 4


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_byte_tokenizer(folder)
    return folder


def uniform(tokens: np.ndarray) -> np.ndarray:
    return np.zeros((len(tokens), 256), dtype=np.float32)


@pytest.mark.parametrize(("length", "max_length", "stride"), [(100, 32, 16), (33, 32, 31), (5, 32, 16), (64, 32, 1)])
def test_windows_are_those_of_the_guide(length: int, max_length: int, stride: int) -> None:
    """The loop of "Perplexity of fixed-length models", where labels before the target are -100 and shift by one."""
    expected, before = [], 0
    for begin in range(0, length, stride):
        end = min(begin + max_length, length)
        target = end - before
        labels = [-100] * (end - begin - target) + [1] * target
        expected.append((begin, end, sum(label != -100 for label in labels[1:])))
        before = end
        if end == length:
            break
    assert list(windows_of(length, max_length=max_length, stride=stride)) == expected
    assert sum(scored for _, _, scored in expected) == length - 1


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("rows", [0, 1, 3, 1400])  # only the last are enough for five threads
def test_scores_are_those_of_log_softmax(rows: int, threads: int) -> None:
    rng = np.random.default_rng(0)
    logits, tokens = rng.normal(0.0, 8.0, (rows, 1000)), rng.integers(0, 1000, rows)
    expected = torch.log_softmax(torch.from_numpy(logits), -1).numpy()
    scores = score_tokens(logits.astype(np.float32), tokens, threads=threads)
    # float32 logits of up to 40 are rounded by 2e-6, and so is their difference
    assert scores.log_probabilities == pytest.approx(expected[np.arange(rows), tokens], abs=1e-5)
    assert (scores.greedy == (logits.argmax(-1) == tokens)).all()


def test_an_exported_model_has_the_perplexity_of_float64(
    exported_llama: ExportedModel, llama_checkpoint: Path, tokenizer: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    options = EvaluationOptions(tokenizer=tokenizer, max_length=48, stride=20, batch=3)
    report = evaluate(
        exported_llama, task="perplexity", data=tmp_path / "text.txt", against=llama_checkpoint, options=options
    )
    tokens = torch.tensor(list(TEXT.encode()))[None]
    module = load(llama_checkpoint).in_float64()
    total, before = 0.0, 0
    with torch.inference_mode():
        for begin in range(0, tokens.shape[1], 20):
            end = min(begin + 48, tokens.shape[1])
            logits = module(input_ids=tokens[:, begin:end]).logits[0, :-1]
            losses = torch.nn.functional.cross_entropy(logits, tokens[0, begin + 1 : end], reduction="none")
            new = end - max(before, 1)
            total += float(losses[-new:].sum())
            before = end
            if end == tokens.shape[1]:
                break
    predicted = tokens.shape[1] - 1
    for candidate in report.candidates:
        token, word, byte, _ = (metric.value for metric in candidate.metrics)
        # the tolerance of a model in fp32 is 1e-5 of the logits, which are of order 1
        assert token == pytest.approx(math.exp(total / predicted), rel=1e-5)
        assert byte == pytest.approx(total / predicted / math.log(2.0), rel=1e-5)
        # the first word begins before the first token that is scored
        assert math.log(word) == pytest.approx(total / (len(TEXT.split()) - 1), rel=1e-5)
    assert report
    assert report.candidates[1].comparisons[0].drop == pytest.approx(0.0, abs=1e-5)


def test_bytes_and_words_add_up(tokenizer: Path, tmp_path: Path) -> None:
    """Each window counts the text of the tokens that it scores; a letter of two bytes is not counted twice."""
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    options = EvaluationOptions(tokenizer=tokenizer, max_length=16, results=tmp_path / "results")
    report = evaluate(FakeCandidate("uniform", uniform), task="perplexity", data=tmp_path / "text.txt", options=options)
    rows = [
        json.loads(line)[2]
        for line in next((tmp_path / "results").glob("*.jsonl")).read_text(encoding="utf-8").splitlines()[1:]
    ]
    assert sum(row[1] for row in rows) == len(TEXT.encode()) - 1
    assert sum(row[3] for row in rows) == len(TEXT.encode()) - 1
    assert sum(row[2] for row in rows) == len(TEXT.split()) - 1
    assert report.candidates[0].metrics[0].value == pytest.approx(256.0)
    assert report.candidates[0].metrics[2].value == pytest.approx(8.0)


def test_texts_in_every_format_are_the_same(tmp_path: Path) -> None:
    texts = ["one text", "another, größer", "a third"]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    found = {"jsonl": [d.text for d in TextData(tmp_path / "lines.jsonl").documents()]}
    arrow = pytest.importorskip("pyarrow", reason="the extra `evaluate` is not installed")
    import pyarrow.ipc
    import pyarrow.parquet

    table = arrow.table({"text": texts})
    pyarrow.parquet.write_table(table, tmp_path / "texts.parquet")
    found["parquet"] = [d.text for d in TextData(tmp_path / "texts.parquet").documents()]
    folder = tmp_path / "saved"
    folder.mkdir()
    with pyarrow.ipc.new_stream(folder / "data-00000-of-00001.arrow", table.schema) as stream:
        stream.write_table(table)
    (folder / "state.json").write_text("{}", encoding="utf-8")
    found["datasets"] = [d.text for d in TextData(folder).documents()]
    assert found == dict.fromkeys(found, texts)


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("short", {}, "has 5 tokens, fewer than a window of 32: give a longer text, or --max-length 5"),
        ("x", {}, "no text of at least two tokens"),
        (TEXT, {"stride": 32}, "--stride is 32; it must be at most 31"),
        (TEXT, {"max_length": 4096}, "--max-length is 4096; the model has 64 positions"),
    ],
)
def test_unsuitable_texts_and_windows(
    tokenizer: Path, tmp_path: Path, content: str, options: dict[str, int], message: str
) -> None:
    (tmp_path / "text.txt").write_text(content, encoding="utf-8")
    wanted = EvaluationOptions(tokenizer=tokenizer, **{"max_length": 32, **options})
    candidate = FakeCandidate("uniform", uniform, facts=ModelFacts(max_positions=64))
    with pytest.raises(IBNormError, match=message) as caught:
        evaluate(candidate, task="perplexity", data=tmp_path / "text.txt", options=wanted)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("vocabulary", "what"),
    [
        (200, "has the token 255, but the last token of the model is 199"),
        (300, "has 256 tokens, but the model has 300"),
    ],
)
def test_another_models_tokenizer(tokenizer: Path, tmp_path: Path, vocabulary: int, what: str) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    candidate = FakeCandidate("small", uniform, facts=ModelFacts(tokenizer, vocabulary))
    with pytest.raises(IBNormError, match=f"{what}: it is the tokenizer of another model; name the right one with"):
        evaluate(candidate, task="perplexity", data=tmp_path / "text.txt")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "does not exist; nothing is downloaded: put there a .txt file"),
        ("text.pdf", "x", "ends in '.pdf'; it must be .txt, .jsonl"),
        ("text.jsonl", '{"body": 1}\n', "record 1 has the keys .'body'.; it must have a text under text"),
        ("text.jsonl", "{\n", "cannot be read: Expecting"),
        ("text.jsonl", '{"text": "\\ud800"}\n', "cannot be read: text 1 has an unpaired surrogate"),
    ],
)
def test_texts_that_cannot_be_read(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(IBNormError, match=message):
        list(TextData(tmp_path / name).documents())


@pytest.mark.parametrize(("name", "content"), [("a.txt", "some words"), ("a.jsonl", '{"text": "some words"}')])
def test_a_byte_order_mark_is_not_text(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    assert [document.text for document in TextData(tmp_path / name).documents()] == ["some words"]


def test_questions_that_are_not_utf_8_are_one_line(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_bytes(b'{"question": "\xff", "choices": ["a", "b"], "answer": 0}\n')
    candidate = FakeCandidate("uniform", uniform)
    with pytest.raises(IBNormError, match="cannot be read after line 0: 'utf-8' codec"):
        evaluate(candidate, task="choice", data=tmp_path / "q.jsonl", options=EvaluationOptions(tokenizer=tokenizer))


def test_a_model_that_overflows_fails(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    broken = FakeCandidate("broken", lambda tokens: uniform(tokens) * np.float32(np.nan))
    options = EvaluationOptions(tokenizer=tokenizer, max_length=16)
    report = evaluate(
        broken,
        task="perplexity",
        data=tmp_path / "text.txt",
        against=FakeCandidate("uniform", uniform),
        options=options,
    )
    assert not report
    assert "FAIL broken against uniform" in str(report)


def test_a_model_that_guesses_gets_a_note(tokenizer: Path, tmp_path: Path) -> None:
    """Weights that were never trained: a difference of their perplexity means nothing."""
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    options = EvaluationOptions(max_length=16)
    candidates = [FakeCandidate(name, uniform, facts=ModelFacts(tokenizer)) for name in ("one", "two")]
    report = evaluate(candidates, task="perplexity", data=tmp_path / "text.txt", options=options)
    assert [note for note in report.notes if "no better than a guess among 256 tokens" in note] == list(report.notes)
    assert len(report.notes) == 1


def test_what_a_data_set_keeps_beside_it_is_not_read(tmp_path: Path) -> None:
    """`datasets` writes the result of `map` into the folder of the data set."""
    arrow = pytest.importorskip("pyarrow", reason="the extra `evaluate` is not installed")
    import pyarrow.ipc

    table = arrow.table({"text": ["one text", "another"]})
    for name in ("data-00000-of-00001.arrow", "cache-0123456789abcdef.arrow"):
        with pyarrow.ipc.new_stream(tmp_path / name, table.schema) as stream:
            stream.write_table(table)
    assert [document.text for document in TextData(tmp_path).documents()] == ["one text", "another"]


def test_a_tokenizer_that_was_saved_with_a_length_reads_whole_texts(tokenizer: Path, tmp_path: Path) -> None:
    """transformers ignores the truncation and padding that tokenizer.json states."""
    settings = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))
    settings["truncation"] = {"direction": "Right", "max_length": 20, "strategy": "LongestFirst", "stride": 0}
    settings["padding"] = {
        "strategy": {"Fixed": 5000},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "!",
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings), encoding="utf-8")
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    options = EvaluationOptions(tokenizer=tmp_path, max_length=16)
    report = evaluate(FakeCandidate("uniform", uniform), task="perplexity", data=tmp_path / "text.txt", options=options)
    assert report.candidates[0].samples == math.ceil((len(TEXT.encode()) - 16) / 8) + 1
    assert report.candidates[0].metrics[2].value == pytest.approx(8.0)


@pytest.mark.parametrize("task", ["perplexity", "choice"])
def test_more_tokens_than_positions_are_refused(tokenizer: Path, tmp_path: Path, task: str) -> None:
    data = tmp_path / ("text.txt" if task == "perplexity" else "q.jsonl")
    data.write_text(TEXT if task == "perplexity" else '{"question": "a", "choices": ["b", "c"], "answer": 0}\n')
    candidate = FakeCandidate("uniform", uniform, facts=ModelFacts(max_positions=64))
    options = EvaluationOptions(tokenizer=tokenizer, max_length=65)
    with pytest.raises(IBNormError, match="--max-length is 65; the model has 64 positions"):
        evaluate(candidate, task=task, data=data, options=options)


@pytest.mark.parametrize(("text", "words"), [("ab" * 200, "none"), ("学校" * 100 + " " + "学校" * 100, r"inf|\d")])
def test_a_text_of_few_words_has_no_interval_per_word(tokenizer: Path, tmp_path: Path, text: str, words: str) -> None:
    """Resamples of its windows may have no word. Warnings of a division by zero are errors in tests."""
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    options = EvaluationOptions(tokenizer=tokenizer, max_length=16)
    report = evaluate(FakeCandidate("uniform", uniform), task="perplexity", data=tmp_path / "text.txt", options=options)
    per_word = report.candidates[0].metrics[1]
    assert re.match(words, str(per_word))
    if words != "none":
        assert (per_word.low, per_word.high) == (0.0, math.inf)
