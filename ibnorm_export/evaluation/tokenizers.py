"""The tokenizer that all candidates of an evaluation share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from ibnorm_export.artifacts.tokenizer import FolderTokenizer
from ibnorm_export.errors import IBNormError
from ibnorm_export.evaluation.samples import Candidate

__all__ = ["common_positions", "find_tokenizer"]

#: The smallest share of the model's rows that its own tokenizer uses; models pad their vocabulary by a few percent.
_USED_ROWS: Final = 0.9


def common_positions(candidates: Sequence[Candidate], max_length: int | None) -> int:
    """The longest text that every candidate takes, in tokens; 0 if that is unknown.

    Args:
        candidates: language models.
        max_length: what the user asks for, which may not be longer.

    Raises:
        IBNormError: it is.
    """
    positions = min((c.facts.max_positions for c in candidates if c.facts.max_positions), default=0)
    if positions and max_length is not None and max_length > positions:
        raise IBNormError(f"--max-length is {max_length}; the model has {positions} positions")
    return positions


def find_tokenizer(candidates: Sequence[Candidate], folder: Path | None, *, vocabulary: int) -> FolderTokenizer:
    """The tokenizer of the options or of the first candidate that has one; those of candidates must agree.

    Raises:
        IBNormError: no candidate has one, or two have different ones, or it is not the model's.
    """
    if folder is not None:
        found = FolderTokenizer(folder)
    else:
        folders = [c.facts.folder for c in candidates if c.facts.folder is not None]
        owners = [place for place in folders if (place / "tokenizer.json").is_file()]
        if not owners:
            raise IBNormError(
                "no candidate has a tokenizer.json; name the folder of the model's tokenizer with --tokenizer, e.g. "
                "the checkpoint"
            )
        tokenizers = [FolderTokenizer(place) for place in owners]
        found, folder = tokenizers[0], owners[0]
        for place, other in zip(owners, tokenizers, strict=True):
            if other.sha256 != found.sha256:
                raise IBNormError(
                    f"{place / 'tokenizer.json'} differs from {folder / 'tokenizer.json'}: the candidates belong to "
                    "different models, or name the right one with --tokenizer"
                )
    if vocabulary and (found.size < _USED_ROWS * vocabulary or found.largest >= vocabulary):
        what = f"has {found.size} tokens, but the model has {vocabulary}"
        if found.largest >= vocabulary:
            what = f"has the token {found.largest}, but the last token of the model is {vocabulary - 1}"
        raise IBNormError(
            f"{folder / 'tokenizer.json'} {what}: it is the tokenizer of another model; name the right one with "
            "--tokenizer"
        )
    return found
