"""Perplexity: how well a language model predicts texts.

Windows of `max_length` tokens move over each document by `stride` tokens. Each token is scored once: in the first
window all but the first token of the document, in every later one the tokens that are new, with the rest of the window
as their context. This is the convention of the guide "Perplexity of fixed-length models" of transformers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ibnorm_export.artifacts.tokenizer import FolderTokenizer
from ibnorm_export.benchmark.statistics import Decision
from ibnorm_export.errors import IBNormError
from ibnorm_export.evaluation.options import EvaluationOptions
from ibnorm_export.evaluation.report import Comparison, Metric
from ibnorm_export.evaluation.samples import (
    Candidate,
    Measurement,
    PerSampleResult,
    ResultTable,
    Sample,
    Window,
)
from ibnorm_export.evaluation.statistics import (
    bootstrap_ratio_interval,
    decide,
    units_needed,
)
from ibnorm_export.evaluation.texts import Document, TextData
from ibnorm_export.evaluation.tokenizers import common_positions, find_tokenizer
from ibnorm_export.progress import Progress

__all__ = ["Perplexity", "perplexity_task", "windows_of"]

#: The longest window that is chosen when none is asked for, in tokens.
_LONGEST: Final = 1024

#: Logits of a batch, as numbers: 128 MB in fp32.
_LOGITS: Final = 1 << 25
_MOST_ROWS: Final = 8

#: Losses are added up by the length of the context: 1, 2 to 3, 4 to 7, ... tokens.
_CONTEXTS: Final = 16

#: With at least this many documents, resamples draw documents; else windows, whose losses depend on their neighbours.
_DOCUMENTS: Final = 30

#: Rounding of a mean loss, in nats.
_ROUNDING: Final = 1e-6

#: Part of the note about a model that predicts nothing.
_GUESSING: Final = "is no better than a guess among"

_WORD: Final = re.compile(r"\S+")


def windows_of(length: int, *, max_length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield (begin, end, scored) of each window over a document of `length` tokens.

    The window has the tokens from `begin` to `end`, and scores the last `scored` of them.
    """
    begin, before = 0, 1  # the first token has no context
    while before < length:
        end = min(begin + max_length, length)
        yield begin, end, end - before
        before = end
        begin += stride


class Perplexity:
    """The task "perplexity"; see `EvaluationTask`. A sample is a window.

    Args:
        data: the texts.
        tokenizer: the tokenizer of the model.
        max_length: tokens of a window.
        stride: tokens that a window is moved by.
        batch: windows that a candidate is asked about at a time.
        limit: number of windows; None takes all.
        seed: seed of the bootstrap.
    """

    name = "perplexity"
    columns = (
        *("loss", "tokens", "words", "bytes", "greedy", "document", "context"),
        *(f"loss_{index}" for index in range(_CONTEXTS)),
    )

    def __init__(
        self,
        data: TextData,
        tokenizer: FolderTokenizer,
        *,
        max_length: int,
        stride: int,
        batch: int,
        limit: int | None = None,
        seed: int = 0,
    ) -> None:
        self._data = data
        self._tokenizer = tokenizer
        self._seed = seed
        self._max_length = max_length
        self._stride = stride
        self._limit = limit
        self.batch = batch
        self.total = limit or 0
        self.notes: tuple[str, ...] = ()

    @property
    def settings(self) -> Mapping[str, Any]:
        """What results depend on."""
        return {
            "task": self.name,
            "max_length": self._max_length,
            "stride": self._stride,
            "limit": self._limit,
            "batch": self.batch,
            "tokenizer": self._tokenizer.sha256,
        }

    def count(self, progress: Progress) -> None:
        """Count the windows, which tokenises all texts once, and check that there is something to score.

        Raises:
            IBNormError: no document has two tokens, or the only one is shorter than a window.
        """
        documents = windows = longest = 0
        for document in self._data.documents():
            length = len(self._tokenizer.encode_with_starts(document.text)[0])
            documents += 1
            longest = max(longest, length)
            windows += sum(1 for _ in windows_of(length, max_length=self._max_length, stride=self._stride))
            progress(f"counting: {windows} windows", 0, 0)
            if self._limit is not None and windows >= self._limit:
                break
        where = self._data.path
        if longest < 2:
            raise IBNormError(
                f"{where} has no text of at least two tokens, so nothing can be predicted: give a longer one"
            )
        if documents == 1 and longest < self._max_length:
            raise IBNormError(
                f"{where} has {longest} tokens, fewer than a window of {self._max_length}: give a longer text, or "
                f"--max-length {longest}"
            )
        if longest < self._max_length:
            self.notes = (
                f"no document has as many tokens as a window ({self._max_length}); the longest has {longest}",
            )
        self.total = min(windows, self._limit or windows)

    def samples(self, start: int) -> Iterator[Sample]:
        """Yield the windows from number `start` on."""
        number = 0
        for index, document in enumerate(self._data.documents()):
            for sample in self._windows(document, index):
                if self._limit is not None and number >= self._limit:
                    return
                if number >= start:
                    yield sample
                number += 1

    def _windows(self, document: Document, index: int) -> Iterator[Sample]:
        tokens, starts = self._tokenizer.encode_with_starts(document.text)
        words = np.array([match.start() for match in _WORD.finditer(document.text)], dtype=np.int64)
        ends = np.append(starts, len(document.text))  # of the text before each token
        pieces = windows_of(len(tokens), max_length=self._max_length, stride=self._stride)
        for number, (begin, end, scored) in enumerate(pieces):
            first, last = int(ends[end - scored]), int(ends[end])
            counts = np.searchsorted(words, [first, last])
            size = len(document.text[first:last].encode("utf-8", errors="surrogatepass"))
            yield Sample(
                f"{document.name}#{number}",
                Window(tokens[begin:end], scored),
                truth=(int(counts[1] - counts[0]), size, index),
            )

    def answer(self, candidate: Candidate, samples: Sequence[Sample]) -> Sequence[PerSampleResult]:
        """Ask a candidate about windows, and return a result for each."""
        scores = candidate.score([sample.content for sample in samples])
        found = []
        for sample, score in zip(samples, scores, strict=True):
            window: Window = sample.content
            words, size, document = sample.truth
            context = len(window.tokens) - window.scored
            losses = -score.log_probabilities
            buckets = np.minimum(_bucket(np.arange(context, len(window.tokens))), _CONTEXTS - 1)
            by_context = np.bincount(buckets, weights=losses, minlength=_CONTEXTS)
            values = (
                float(losses.sum()),
                float(window.scored),
                float(words),
                float(size),
                float(score.greedy.sum()),
                float(document),
                float(context),
                *by_context.tolist(),
            )
            found.append(PerSampleResult(sample.name, values=values))
        return found

    def truth(self, result: PerSampleResult) -> str:
        """A window has no single answer."""
        return ""

    def measure(self, table: ResultTable) -> Measurement:
        """Perplexity per token and per word, bits per byte, and the share of tokens that are the likeliest one."""
        loss, tokens = table["loss"], table["tokens"]
        document = table["document"]
        ratios = {
            name: bootstrap_ratio_interval(*_units(document, loss, table[name]), seed=self._seed)
            for name in ("tokens", "words", "bytes")
        }
        (token, *token_ends), (word, *word_ends), (byte, *byte_ends) = ratios.values()
        hits, hits_low, hits_high = bootstrap_ratio_interval(
            *_units(document, table["greedy"], tokens), seed=self._seed
        )
        if token >= math.log(self._tokenizer.size) - _ROUNDING and not any(_GUESSING in note for note in self.notes):
            self.notes += (
                f"a perplexity of {math.exp(min(token, 700.0)):.3g} {_GUESSING} {self._tokenizer.size} tokens: "
                "if the weights are random, differences of perplexity mean nothing",
            )
        bits = 1.0 / math.log(2.0)
        metrics = (
            _exponential("perplexity per token", token, token_ends),
            _exponential("per word", word, word_ends)
            if table["words"].any()
            else Metric("per word", math.nan, low=math.nan, high=math.nan),
            Metric("bits per byte", byte * bits, low=byte_ends[0] * bits, high=byte_ends[1] * bits),
            Metric("next token right", hits, low=max(0.0, hits_low), high=min(1.0, hits_high), share=True),
        )
        return Measurement(metrics, curves={"perplexity by context": _by_context(table)})

    def compare(self, table: ResultTable, reference: ResultTable, *, max_drop: float) -> tuple[Comparison, ...]:
        """The relative increase of perplexity, by a paired bootstrap."""
        difference = table["loss"] - reference["loss"]
        sums, weights = _units(table["document"], difference, table["tokens"])
        increase, low, high = (
            math.expm1(value) if value < 700.0 else math.inf
            for value in bootstrap_ratio_interval(sums, weights, seed=self._seed)
        )
        kind = "documents" if len(sums) != len(difference) else "windows"
        method = f"paired bootstrap over {len(sums)} {kind}"
        needed = None
        if math.isfinite(increase):
            decision = decide(low, high, max_drop=max_drop)
            if decision is Decision.CANNOT_TELL:
                units = units_needed(len(sums), drop=increase, low=low, high=high, max_drop=max_drop)
                needed = None if units is None else math.ceil(units * len(difference) / len(sums))
        else:
            decision, method = Decision.FAIL, "a loss is not a finite number"
        return (
            Comparison(
                "increase of perplexity",
                increase,
                low=low,
                high=high,
                max_drop=max_drop,
                decision=decision,
                samples=len(difference),
                samples_needed=needed,
                method=method,
            ),
        )


def _bucket(contexts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Whole part of the binary logarithm."""
    found: NDArray[np.int64] = np.frexp(contexts)[1].astype(np.int64) - 1
    return found


def _units(document: NDArray[np.float64], *series: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
    """Add up windows by document if there are enough documents; else return the windows."""
    starts = np.flatnonzero(np.diff(document, prepend=-1.0))
    if len(starts) < _DOCUMENTS:
        return series
    return tuple(np.add.reduceat(values, starts) for values in series)


def _exponential(name: str, value: float, ends: Sequence[float]) -> Metric:
    low, high = (math.exp(end) if end < 700.0 else math.inf for end in ends)
    return Metric(name, math.exp(value) if value < 700.0 else math.inf, low=low, high=high)


def _by_context(table: ResultTable) -> tuple[tuple[float, float], ...]:
    """Points (tokens of context, perplexity): the smallest context of each group."""
    first = table["context"].astype(np.int64)
    last = first + table["tokens"].astype(np.int64)
    points = []
    for index in range(_CONTEXTS):
        low, high = 1 << index, (1 << (index + 1)) if index < _CONTEXTS - 1 else 1 << 62
        count = int(np.maximum(np.minimum(last, high) - np.maximum(first, low), 0).sum())
        if count:
            mean = float(table[f"loss_{index}"].sum()) / count
            points.append((float(low), math.exp(mean) if mean < 700.0 else math.inf))
    return tuple(points)


def perplexity_task(
    candidates: Sequence[Candidate], data: str | Path, *, options: EvaluationOptions, progress: Progress
) -> Perplexity:
    """Make the task for candidates that all read the same tokens.

    Raises:
        IBNormError: there is no text, or no tokenizer of the model, or a window that does not suit the model.
    """
    vocabulary = min((c.facts.vocabulary for c in candidates if c.facts.vocabulary), default=0)
    positions = common_positions(candidates, options.max_length)
    texts = TextData(data)
    tokenizer = find_tokenizer(candidates, options.tokenizer, vocabulary=vocabulary)
    max_length = options.max_length or min(_LONGEST, positions or _LONGEST)
    stride = max(1, max_length // 2) if options.stride is None else options.stride
    if stride >= max_length:
        raise IBNormError(
            f"--stride is {stride}; it must be at most {max_length - 1}, so that the first new token of a window of "
            f"{max_length} has a context"
        )
    rows = options.batch or min(_MOST_ROWS, max(1, _LOGITS // (max_length * max(1, vocabulary or tokenizer.size))))
    task = Perplexity(
        texts,
        tokenizer,
        max_length=max_length,
        stride=stride,
        batch=rows,
        limit=options.limit,
        seed=options.seed,
    )
    task.count(progress)
    return task
