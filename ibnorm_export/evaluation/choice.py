"""Multiple choice: does the model think the right answer likelier than the wrong ones?

Records of a .jsonl file have a question, choices and the number of the right one. A choice is scored by the sum of the
log-probabilities of its tokens after the question and a space, as lm-eval's tasks of type multiple_choice do with their
default settings: "accuracy" takes the likeliest choice, "accuracy by length" divides by the number of characters first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TextIO

import numpy as np
from numpy.typing import NDArray

from ibnorm_export.artifacts.tokenizer import FolderTokenizer
from ibnorm_export.errors import IBNormError, PromptError, quoted, shortened
from ibnorm_export.evaluation.options import EvaluationOptions
from ibnorm_export.evaluation.report import Comparison
from ibnorm_export.evaluation.samples import (
    Candidate,
    Measurement,
    PerSampleResult,
    ResultTable,
    Sample,
    Window,
)
from ibnorm_export.evaluation.shares import compare_shares, share_metric
from ibnorm_export.evaluation.tokenizers import common_positions, find_tokenizer
from ibnorm_export.parsing import parse_json

__all__ = ["Choice", "ChoiceData", "Question", "choice_task"]

#: Questions of a batch, unless --batch states another number.
_BATCH: Final = 4

#: Characters of a line, and choices of a question.
_LINE: Final = 1 << 20
_MOST_CHOICES: Final = 64

_KEYS: Final = (("question", "query", "ctx"), ("choices", "endings"), ("answer", "label", "gold"))

_WHAT: Final = (
    'it must be a .jsonl file with records such as {"question": "2 + 2 =", "choices": ["3", "4"], "answer": 1}; '
    "nothing is downloaded"
)


@dataclass(frozen=True, slots=True)
class Question:
    """A question, its choices, and the number of the right one."""

    text: str
    choices: tuple[str, ...]
    right: int


class ChoiceData:
    """The questions of a .jsonl file, one after the other.

    Args:
        path: the file.

    Raises:
        IBNormError: there is no such file, or no question in it, or a record is not a question.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file() or self.path.suffix.lower() != ".jsonl":
            problem = "is not a .jsonl file" if self.path.exists() else "does not exist"
            raise IBNormError(f"{self.path} {problem}; {_WHAT}")
        self.total = sum(1 for _ in self.questions())
        if not self.total:
            raise IBNormError(f"{self.path} has no question; {_WHAT}")

    def questions(self) -> Iterator[Question]:
        """Yield every question.

        Raises:
            IBNormError: the file cannot be read, or a record is not a question.
        """
        with self.path.open(encoding="utf-8-sig") as stream:
            number = 0
            while line := self._next_line(stream, number):
                number += 1
                if not line.strip():
                    continue
                try:
                    yield _question(parse_json(line))
                except (ValueError, TypeError) as error:
                    raise IBNormError(f"{self.path}, line {number}: {shortened(str(error))}; {_WHAT}") from error

    def _next_line(self, stream: TextIO, number: int) -> str:
        try:
            return stream.readline(_LINE)
        except (OSError, ValueError) as error:  # text that is not UTF-8 is a ValueError
            raise IBNormError(f"{self.path} cannot be read after line {number}: {shortened(str(error))}") from error


def _question(record: Any) -> Question:
    if not isinstance(record, dict):
        raise TypeError(f"{quoted(record)} is not an object")
    text, choices, right = (next((record[key] for key in keys if key in record), None) for keys in _KEYS)
    if isinstance(choices, dict):  # the hub's form of ARC
        choices = choices.get("text")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"the question is {quoted(text)}")
    if (
        not isinstance(choices, list)
        or not 2 <= len(choices) <= _MOST_CHOICES
        or not all(isinstance(choice, str) and choice for choice in choices)
    ):
        raise ValueError(f"the choices are {quoted(choices)}, not 2 to {_MOST_CHOICES} texts")
    if isinstance(right, str) and right.isascii() and right.isdigit():
        right = int(right)
    if type(right) is not int or not 0 <= right < len(choices):
        raise ValueError(f"the answer is {quoted(right)}, not the number of a choice from 0 to {len(choices) - 1}")
    return Question(text, tuple(choices), right)


class Choice:
    """The task "choice"; see `EvaluationTask`. A sample is a question.

    Args:
        data: the questions.
        tokenizer: the tokenizer of the model.
        max_length: tokens before a token that is scored; longer questions lose their beginning. 0 keeps everything.
        batch: questions that a candidate is asked about at a time.
        limit: number of questions; None takes all.
    """

    name = "choice"
    columns = ("correct", "correct_by_length", "prediction", "right")
    notes: tuple[str, ...] = ()

    def __init__(
        self, data: ChoiceData, tokenizer: FolderTokenizer, *, max_length: int, batch: int, limit: int | None = None
    ) -> None:
        self._data = data
        self._tokenizer = tokenizer
        self._max_length = max_length
        self.batch = batch
        self.total = min(data.total, limit or data.total)

    @property
    def settings(self) -> Mapping[str, Any]:
        """What results depend on."""
        return {
            "task": self.name,
            "max_length": self._max_length,
            "limit": self.total,
            "batch": self.batch,
            "tokenizer": self._tokenizer.sha256,
        }

    def samples(self, start: int) -> Iterator[Sample]:
        """Yield the questions from number `start` on."""
        for number, question in enumerate(self._data.questions()):
            if number >= self.total:
                return
            if number >= start:
                try:
                    windows = [self._window(question.text, choice) for choice in question.choices]
                except PromptError as error:
                    yield Sample(str(number), unreadable=str(error))
                else:
                    yield Sample(str(number), windows, truth=question)

    def _window(self, question: str, choice: str) -> Window:
        """Spaces at the end of the question belong to the choice, so that words are tokenised as in a text."""
        context = question.rstrip()
        whole = self._tokenizer.encode(f"{context}{question[len(context) :]} {choice}")
        scored = len(whole) - len(self._tokenizer.encode(context))
        if scored < 1:
            raise PromptError(f"the choice {quoted(choice)} adds no token to the question")
        if self._max_length:
            whole = whole[-(self._max_length + 1) :]
        return Window(whole, min(scored, len(whole) - 1))

    def answer(self, candidate: Candidate, samples: Sequence[Sample]) -> Sequence[PerSampleResult]:
        """Ask a candidate about questions, and return a result for each."""
        scores = iter(candidate.score([window for sample in samples for window in sample.content]))
        found = []
        for sample in samples:
            question: Question = sample.truth
            sums = np.array([next(scores).log_probabilities.sum() for _ in question.choices])
            chosen, by_length = (
                _likeliest(values) for values in (sums, sums / [float(len(choice)) for choice in question.choices])
            )
            values = (chosen == question.right, by_length == question.right, chosen, question.right)
            answer = "not a number" if chosen < 0 else f"choice {chosen}"
            found.append(PerSampleResult(sample.name, answer, values=tuple(map(float, values))))
        return found

    def truth(self, result: PerSampleResult) -> str:
        """The number of the right choice."""
        return f"choice {int(result.values[3])}"

    def measure(self, table: ResultTable) -> Measurement:
        """Accuracy, and accuracy by length."""
        return Measurement(
            (
                share_metric("accuracy", table["correct"]),
                share_metric("accuracy by length", table["correct_by_length"]),
            )
        )

    def compare(self, table: ResultTable, reference: ResultTable, *, max_drop: float) -> tuple[Comparison, ...]:
        """Drops of accuracy, which decides, and of accuracy by length."""
        return tuple(
            compare_shares(f"drop of {name}", table[column], reference=reference[column], max_drop=limit)
            for name, column, limit in (
                ("accuracy", "correct", max_drop),
                ("accuracy by length", "correct_by_length", None),
            )
        )


def _likeliest(values: NDArray[np.float64]) -> int:
    """The number of the largest value; -1 if one is not a number."""
    return -1 if np.isnan(values).any() else int(values.argmax())


def choice_task(candidates: Sequence[Candidate], data: str | Path, *, options: EvaluationOptions) -> Choice:
    """Make the task for candidates that all read the same tokens.

    Raises:
        IBNormError: there are no questions, or no tokenizer of the model.
    """
    vocabulary = min((c.facts.vocabulary for c in candidates if c.facts.vocabulary), default=0)
    positions = common_positions(candidates, options.max_length)
    return Choice(
        ChoiceData(data),
        find_tokenizer(candidates, options.tokenizer, vocabulary=vocabulary),
        max_length=options.max_length or positions,
        batch=options.batch or _BATCH,
        limit=options.limit,
    )
