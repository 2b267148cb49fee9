"""What an evaluation is made of: samples, the protocol of a task and of a candidate, and the result of each sample."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ibnorm_export.evaluation.report import ClassResult, Comparison, Confusion, Metric

__all__ = [
    "Candidate",
    "EvaluationTask",
    "Measurement",
    "ModelFacts",
    "PerSampleResult",
    "ResultTable",
    "Sample",
    "TokenScores",
    "Window",
]


@dataclass(frozen=True, slots=True)
class Window:
    """A piece of a text, of which a language model scores the last tokens.

    Args:
        tokens: (length,).
        scored: number of tokens at the end whose probability is asked for; all tokens before each of them are its
            context. It is smaller than the length, because the first token has no context.
    """

    tokens: NDArray[np.int64]
    scored: int


@dataclass(frozen=True, slots=True)
class TokenScores:
    """What a language model makes of the scored tokens of a window.

    Args:
        log_probabilities: (scored,), natural logarithms.
        greedy: (scored,), whether the token is the likeliest one.
    """

    log_probabilities: NDArray[np.float64]
    greedy: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What tasks must know about a model before they ask it. What is unknown is 0 or empty.

    Args:
        folder: where its tokenizer and the settings of its image processor may be.
        vocabulary: number of tokens of a language model.
        max_positions: the longest text of a language model, in tokens.
        classes: number of classes of a classifier.
        class_names: their names, in order.
        image: shape of the image that it takes (channels, height, width).
    """

    folder: Path | None = None
    vocabulary: int = 0
    _: KW_ONLY
    max_positions: int = 0
    classes: int = 0
    class_names: tuple[str, ...] = ()
    image: tuple[int, ...] = ()


class Candidate(Protocol):
    """A model on a runtime. It answers one of the two questions; the other one raises an error."""

    @property
    def name(self) -> str:
        """Name in the report, the same for no other candidate."""

    @property
    def identity(self) -> str:
        """Hash of everything that determines its answers: weights, runtime, version, kernels."""

    @property
    def facts(self) -> ModelFacts:
        """What is known about the model before it runs."""

    @property
    def seconds(self) -> float:
        """Time that its runtime has taken so far, in seconds."""

    def classify(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the logits (batch, classes) of images (batch, channels, height, width)."""

    def score(self, windows: Sequence[Window]) -> Sequence[TokenScores]:
        """Return the scores of each window."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One input of a task.

    Args:
        name: where it is in the data, e.g. "cat/001.png"; stable between runs.
        content: what the task asks about: an image as the model takes it, or a `Window`.
        truth: what the task compares the answer with.
        unreadable: why it could not be read; empty if it was.
    """

    name: str
    content: Any = None
    _: KW_ONLY
    truth: Any = None
    unreadable: str = ""


@dataclass(frozen=True, slots=True)
class PerSampleResult:
    """What a candidate made of one sample.

    Args:
        name: name of the sample.
        answer: the answer, as the list of changed answers shows it; empty if the task has no single answer.
        values: one number for each of `EvaluationTask.columns`.
        unreadable: why the sample could not be read; empty if it was.
    """

    name: str
    answer: str = ""
    _: KW_ONLY
    values: tuple[float, ...] = ()
    unreadable: str = ""


@dataclass(frozen=True, slots=True)
class ResultTable:
    """The numbers of all readable samples of one candidate.

    Args:
        columns: (samples,) by name of the column, in the order of the samples.
    """

    columns: Mapping[str, NDArray[np.float64]]

    def __len__(self) -> int:
        return min(map(len, self.columns.values()), default=0)

    def __getitem__(self, column: str) -> NDArray[np.float64]:
        return self.columns[column]


@dataclass(frozen=True, slots=True)
class Measurement:
    """The figures of one candidate; see `CandidateResult`."""

    metrics: tuple[Metric, ...]
    curves: Mapping[str, tuple[tuple[float, float], ...]] = field(default_factory=dict)
    classes: tuple[ClassResult, ...] = ()
    confusions: tuple[Confusion, ...] = ()


class EvaluationTask(Protocol):
    """A stream of samples, and what is made of the answers. It holds no more than one batch in memory."""

    @property
    def name(self) -> str:
        """Its name on the command line."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """Everything but the data that results depend on, as JSON values."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the numbers of each result."""

    @property
    def total(self) -> int:
        """Number of samples; 0 if that is unknown."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know about how the data is read."""

    @property
    def batch(self) -> int:
        """Number of samples that a candidate is asked about at a time."""

    def samples(self, start: int) -> Iterator[Sample]:
        """Yield the samples from number `start` on, always in the same order."""

    def answer(self, candidate: Candidate, samples: Sequence[Sample]) -> Sequence[PerSampleResult]:
        """Ask a candidate about readable samples, and return a result for each."""

    def truth(self, result: PerSampleResult) -> str:
        """The right answer to a sample, as the list of changed answers shows it; empty if there is none."""

    def measure(self, table: ResultTable) -> Measurement:
        """The figures of one candidate; the first metric is the one that decides."""

    def compare(self, table: ResultTable, reference: ResultTable, *, max_drop: float) -> tuple[Comparison, ...]:
        """Compare a candidate with the reference on the same samples; the first comparison is the one that decides."""
