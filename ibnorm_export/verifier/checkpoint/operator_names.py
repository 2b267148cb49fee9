"""Names of PyTorch's operators as words, by which those of a file are found."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

__all__ = ["is_among", "operator_words"]


def operator_words(operator: str) -> list[str]:
    """The words of the name of an operator; a pool takes the largest value, and chooses nothing else."""
    return ["pool"] if "pool" in operator else operator.removeprefix("ibnorm.").lower().split("_")


def is_among(part: str, words: AbstractSet[str]) -> bool:
    """Whether one of the words is `part`, or begins with it if it ends with an asterisk."""
    if part.endswith("*"):
        return any(word.startswith(part[:-1]) for word in words)
    return part in words
