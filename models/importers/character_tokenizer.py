"""nanoGPT's meta.pkl as a tokenizer.json: one token for each character."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from ibnorm_export.errors import CheckpointError
from ibnorm_export.models.containers.safe_pickle import RefusedClassError, UnreadableError, read_pickle

__all__ = ["write_character_tokenizer"]

#: No vocabulary of characters is larger; a larger file is something else.
_MAX_BYTES: Final = 64 << 20


def _read_meta(path: Path) -> dict[str, int]:
    """The token of each character.

    Raises:
        CheckpointError: the file is not nanoGPT's meta.pkl, or contains code.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise CheckpointError(f"{path} is larger than any vocabulary of characters")
        with path.open("rb") as stream:
            meta: Any = read_pickle(stream, {})
    except RefusedClassError as error:
        raise CheckpointError(
            f"{path} is not a plain pickle: it names {error.name}; nanoGPT's meta.pkl has only dicts"
        ) from error
    except (UnreadableError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or is not a pickle: {error}") from error
    tokens = meta.get("stoi") if isinstance(meta, dict) else None
    if (
        not isinstance(tokens, dict)
        or not all(isinstance(c, str) and len(c) == 1 and type(n) is int for c, n in tokens.items())
        or sorted(tokens.values()) != list(range(len(tokens)))
    ):
        raise CheckpointError(
            f"{path} is not nanoGPT's meta.pkl: `stoi` must map single characters to the tokens 0, 1, 2, ..."
        )
    return tokens


def write_character_tokenizer(meta: Path, folder: Path) -> int:
    """Write tokenizer.json and tokenizer_config.json for a model whose tokens are characters.

    Args:
        meta: nanoGPT's meta.pkl.
        folder: where to write.

    Returns:
        The number of tokens.

    Raises:
        CheckpointError: the file is not nanoGPT's meta.pkl, or contains code.
    """
    from tokenizers import Tokenizer, decoders, models

    tokens = _read_meta(meta)
    # A BPE without merges keeps each character apart, the space and the newline too.
    tokenizer = Tokenizer(models.BPE(vocab=tokens, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": false}\n', encoding="utf-8"
    )
    return len(tokens)
