"""Decoding tokens one by one gives the same text as decoding them together, for every kind of tokenizer."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ibnorm_export.artifacts.tokenizer import FolderTokenizer, write_byte_tokenizer
from ibnorm_export.generation import text_model as text
from ibnorm_export.generation.sampling import Sampling
from ibnorm_export.generation.sessions import SessionSource
from ibnorm_export.generation.text_model import TextModel, TextResult

TEXT = "The naïve café costs 10 €, 日本語 and 👩‍👩‍👧 cost more; straße, Ελλάδα. don't"


def byte_pairs() -> Tokenizer:
    """A tokenizer like that of GPT-2: bytes and merges of bytes, some of which end within a character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([TEXT] * 4, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet))
    return tokenizer


def words(decoder: decoders.Decoder | None, spaced: str) -> Tokenizer:
    """A word-level tokenizer that marks spaces in the given way, with a token for every byte."""
    vocabulary = [spaced.format(word) for word in ("the", "é", "日本", "", "don", "'t", ".")]
    vocabulary += ["a", "##b", "s</w>", "▁", "\u200b"]
    vocabulary += [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(vocabulary)}, unk_token="a"))
    if decoder is not None:
        tokenizer.decoder = decoder
    return tokenizer


def sentence_pieces() -> Tokenizer:
    """A tokenizer like that of LLaMA 2: it drops the first space and writes unknown characters as bytes."""
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return words(decoders.Sequence(steps), "▁{}")


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "byte pairs": byte_pairs,
    "sentence pieces": sentence_pieces,
    "metaspace": lambda: words(decoders.Metaspace(), "▁{}"),
    "word pieces": lambda: words(decoders.WordPiece(cleanup=True), "{}"),
    "ends of words": lambda: words(decoders.BPEDecoder("</w>"), "{}</w>"),
    "none": lambda: words(None, "{}"),
}


@pytest.fixture(params=TOKENIZERS)
def tokens(request: pytest.FixtureRequest, tmp_path: Path) -> FolderTokenizer:
    tokenizer = TOKENIZERS[request.param]()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.add_tokens(["<added>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return FolderTokenizer(tmp_path)


def pieces(tokens: FolderTokenizer, ids: list[int]) -> list[str]:
    """The pieces of text after each token, and the rest at the end."""
    stream, taken = tokens.stream(), []
    for token in ids:
        stream.extend([token])
        taken.append(stream.take())
    return [*taken, stream.rest()]


def taken_at_random(tokens: FolderTokenizer, ids: list[int], rng: random.Random) -> str:
    """The whole text, taken after random numbers of tokens."""
    stream, text = tokens.stream(), ""
    often = rng.choice([0.02, 0.1, 0.5])
    for token in ids:
        stream.extend([token])
        if rng.random() < often:
            text += stream.take()
    return text + stream.rest()


def test_random_tokens(tokens: FolderTokenizer) -> None:
    """Most texts are noise: broken characters, many spaces, special tokens and unknown tokens."""
    rng = random.Random(1)
    known = max(tokens._tokenizer.get_vocab().values()) + 1
    few = [known - 3, known - 1, known + 5, *rng.sample(range(known - 3), 12)]
    for case in range(600):
        pool = range(known + 2) if case % 2 else few
        ids = [rng.choice(pool) for _ in range(rng.randrange(80))]
        assert "".join(pieces(tokens, ids)) == tokens.decode(ids), ids
        assert taken_at_random(tokens, ids, rng) == tokens.decode(ids), ids


def test_words_with_bytes_between(tokens: FolderTokenizer) -> None:
    """Between words there are runs of bytes that are whole characters, and runs that are not."""
    rng = random.Random(2)
    bytes_of = {byte: tokens._tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256)}
    for _ in range(600):
        ids: list[int] = []
        for _ in range(rng.randrange(12)):
            if rng.random() < 0.5 or None in bytes_of.values():
                ids += tokens.encode(rng.choice(TEXT.split())).tolist()
            else:
                run = "".join(rng.sample(TEXT, 3)).encode()
                ids += [bytes_of[byte] for byte in run[: rng.choice([len(run), rng.randrange(len(run) + 1)])]]
            ids += ids[:1] * (rng.random() < 0.3)
        assert "".join(pieces(tokens, ids)) == tokens.decode(ids), ids
        assert taken_at_random(tokens, ids, rng) == tokens.decode(ids), ids


def of_bytes(tmp_path: Path) -> FolderTokenizer:
    write_byte_tokenizer(tmp_path)
    return FolderTokenizer(tmp_path)


def test_a_character_is_returned_whole_and_at_once(tmp_path: Path) -> None:
    tokens = of_bytes(tmp_path)
    assert pieces(tokens, list("a€👩b".encode())) == ["a", "", "", "€", "", "", "", "👩", "b", ""]
    assert pieces(tokens, [0x61, 0xE2, 0x82]) == ["a", "", "", "\ufffd"]
    assert pieces(tokens, [0xFF] * 60) == ["", *["\ufffd"] * 60]  # not held back forever


def test_byte_tokens_are_held_back_until_their_run_ends(tmp_path: Path) -> None:
    """One wrong byte turns the whole run into U+FFFD, so no part of it is certain before its end."""
    tokenizer = sentence_pieces()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    tokens = FolderTokenizer(tmp_path)
    word, a, first = (tokenizer.token_to_id(name) for name in ("▁the", "<0x41>", "<0xE2>"))
    assert pieces(tokens, [word, a, a, word]) == ["the", "", "", "AA the", ""]
    assert pieces(tokens, [word, a, first, word]) == ["the", "", "", "\ufffd\ufffd the", ""]


def test_tokens_without_text_are_not_used_as_context(tmp_path: Path) -> None:
    """After only such tokens, a word would lose its space, and a run of bytes its wrong byte."""
    tokenizer = sentence_pieces()
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u200b", ""), tokenizer.decoder])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    tokens = FolderTokenizer(tmp_path)
    word, nothing, wrong, a = (tokenizer.token_to_id(name) for name in ("▁the", "\u200b", "<0xFF>", "<0x41>"))
    for ids in ([word, *[nothing] * 20, word], [word] * 7 + [wrong] + [a] * 7 + [nothing, word]):
        assert "".join(pieces(tokens, ids)) == tokens.decode(ids)


def test_the_cost_of_a_token_does_not_grow(tmp_path: Path) -> None:
    """Count how many tokens are decoded for the last of 2000."""
    tokens = of_bytes(tmp_path)
    seen: list[int] = []
    stream = tokens.stream()
    stream._decode = lambda ids: (seen.append(len(ids)), tokens.decode(ids))[1]  # type: ignore[func-returns-value]  # append
    for text_bytes in ((TEXT * 40).encode(), b"\xff" * 2000, b"\x80" * 2000):
        for token in text_bytes[:2000]:
            stream.extend([token])
            stream.take()
    assert max(seen) <= 16
    seen.clear()
    for token in ((TEXT * 40).encode())[:2000]:  # no text is taken before the end
        stream.extend([token])
    stream.take()
    assert len(seen) == 2


class Clock:
    """Replaces the module `time` in `text_model`."""

    now = 5.0

    def perf_counter(self) -> float:
        return self.now


class Fixed:
    """A session that generates a fixed text; a token takes `tick_s` of `clock`."""

    def __init__(self, text: bytes, clock: Clock | None = None, tick_s: float = 0.0) -> None:
        self._left = iter(text)
        self.told = 0
        self._clock, self._tick_s = clock or Clock(), tick_s

    def feed(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        return np.zeros((1, 256), np.float32)

    def step(self) -> NDArray[np.int64]:
        self._clock.now += self._tick_s
        self.told += 1
        return np.array([next(self._left)])

    def rewind(self, length: int) -> None:
        raise NotImplementedError


@pytest.mark.parametrize("stop", ["€", "a€", "\ufffd", "a", "b€c", "not there", "日本", "c\ufffd"])
@pytest.mark.parametrize("cut", [0, 1, 2])
def test_pieces_end_where_the_text_does(tmp_path: Path, stop: str, cut: int) -> None:
    text_bytes = "xa b€ b€c 日本".encode()
    text_bytes = text_bytes[: len(text_bytes) - cut]
    model = TextModel(
        SessionSource("fixed", lambda rows, length: Fixed(text_bytes)),
        of_bytes(tmp_path),
        max_positions=100,
        ends=frozenset(),
    )
    written: list[str] = []
    result = model.generate("p", Sampling(len(text_bytes), stop=(stop,)), write=written.append)
    whole = text_bytes.decode(errors="replace")
    place = whole.find(stop)
    assert result.text == "".join(written) == (whole if place < 0 else whole[:place])
    assert result.stopped == ("length" if place < 0 else "stop")


@pytest.mark.parametrize(
    ("tick_s", "written"),
    [(0.06, ["a", "b", "€", "c", "d"]), (0.02, ["a", "b", "€cd"]), (1e-4, ["a", "b€cd"])],
)
def test_pieces_keep_their_pace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tick_s: float, written: list[str]
) -> None:
    """Slow tokens are written one by one, quick ones together, and the first at once; each has a step."""
    clock = Clock()
    monkeypatch.setattr(text, "time", clock)
    text_bytes = "ab€cd".encode()
    source = SessionSource("fixed", lambda rows, length: Fixed(text_bytes, clock, tick_s))
    model = TextModel(source, of_bytes(tmp_path), max_positions=100, ends=frozenset())
    *got, result = model.steps("p", Sampling(len(text_bytes)), pace_s=0.05)
    assert [piece for piece in got if piece] == written
    assert isinstance(result, TextResult)
    assert result.text == "ab€cd"
    assert len(got) == len(text_bytes) + 1
    assert got[0] == "a"  # not when the second is computed


@pytest.mark.parametrize(("tick_s", "turns"), [(0.004, [1] * 8), (0.001, [1, 2, 2, 2, 1]), (1e-5, [1, 7])])
def test_a_step_has_as_many_tokens_as_fit_into_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tick_s: float, turns: list[int]
) -> None:
    """A step has at least one token, and the first step only one, so that other texts do not wait."""
    clock = Clock()
    monkeypatch.setattr(text, "time", clock)
    session = Fixed(b"abcdefgh", clock, tick_s)
    model = TextModel(
        SessionSource("fixed", lambda rows, length: session), of_bytes(tmp_path), max_positions=100, ends=frozenset()
    )
    steps = [(item, session.told) for item in model.steps("p", Sampling(8), pace_s=1e9, turn_s=0.0019)]
    result = steps[-1][0]
    counts = [0, *(count for _, count in steps)]
    assert isinstance(result, TextResult)
    assert result.text == "abcdefgh"
    assert [after - before for before, after in itertools.pairwise(counts) if after > before] == turns


@pytest.mark.parametrize(("turn_s", "written"), [(0.0, ["a", "", "", "b"]), (1e9, ["a", "b"])])
def test_a_stop_is_found_between_pieces(tmp_path: Path, turn_s: float, written: list[str]) -> None:
    """The text ends at once, not when the next piece is due or the step is over."""
    source = SessionSource("fixed", lambda rows, length: Fixed(b"abcdefgh"))
    model = TextModel(source, of_bytes(tmp_path), max_positions=100, ends=frozenset())
    *pieces, result = model.steps("p", Sampling(8, stop=("cd",)), pace_s=1e9, turn_s=turn_s)
    assert isinstance(result, TextResult)
    assert result.text == "ab"
    assert len(result.tokens) == 4
    assert pieces == written


def test_a_long_stop_text_is_found_quickly() -> None:
    """The cost depends on the text that is held back, not on the length of the stop string."""
    stop = "ab" * 500_000
    for _ in range(100):
        assert Sampling(stop=(stop,)).without_stop_prefix("xaba") == "x"
