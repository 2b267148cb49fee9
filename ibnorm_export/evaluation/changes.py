"""The samples to which a candidate gives another answer than the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from ibnorm_export.evaluation.journal import Journal
from ibnorm_export.evaluation.report import ChangedAnswer
from ibnorm_export.evaluation.samples import PerSampleResult

__all__ = ["changed_answers"]

#: Changed answers that a report holds; the file of results has all of them.
_KEPT: Final = 200


def changed_answers(
    candidate: Journal, reference: Journal, *, truth: Callable[[PerSampleResult], str]
) -> tuple[int, tuple[ChangedAnswer, ...]]:
    """Compare answers sample by sample; memory does not grow with their number.

    Args:
        candidate, reference: results of the same samples.
        truth: the right answer, as it is shown.

    Returns:
        The number of changed answers, and the first of them.
    """
    number = 0
    kept: list[ChangedAnswer] = []
    for own, other in zip(candidate.results(), reference.results(), strict=True):
        if own.answer != other.answer:
            number += 1
            if len(kept) < _KEPT:
                kept.append(ChangedAnswer(own.name, truth(own), other.answer, own.answer))
    return number, tuple(kept)
