"""Candidates that answer by a rule, so that tests need no model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from ibnorm_export.evaluation.samples import ModelFacts, TokenScores, Window
from ibnorm_export.evaluation.scoring import score_tokens

Rule = Callable[[NDArray[np.float32]], NDArray[np.float32]]


class FakeCandidate:
    """Answers by a function, and counts how often it is asked.

    Args:
        name: name in the report.
        rule: for images (batch, c, h, w) -> logits (batch, classes), for tokens (batch, n) -> (batch, n, vocabulary).
        facts: what is known about it.
        stop_after: number of calls after which it raises KeyboardInterrupt; None never does.
    """

    def __init__(
        self,
        name: str,
        rule: Callable[..., NDArray[np.float32]],
        *,
        facts: ModelFacts | None = None,
        identity: str = "",
        stop_after: int | None = None,
    ) -> None:
        self.name = name
        self.identity = identity or name
        self.facts = ModelFacts() if facts is None else facts
        self.seconds = 0.0
        self.calls = 0
        self._rule = rule
        self._stop_after = stop_after

    def _count(self) -> None:
        if self._stop_after is not None and self.calls >= self._stop_after:
            raise KeyboardInterrupt
        self.calls += 1

    def classify(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        self._count()
        return self._rule(images)

    def score(self, windows: Sequence[Window]) -> Sequence[TokenScores]:
        self._count()
        found = []
        for window in windows:
            logits = self._rule(window.tokens)[len(window.tokens) - 1 - window.scored : -1]
            found.append(score_tokens(logits, window.tokens[-window.scored :]))
        return found
