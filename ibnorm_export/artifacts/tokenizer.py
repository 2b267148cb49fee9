"""The tokenizer of a checkpoint or exported folder: text to token ids and back."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ibnorm_export import parsing
from ibnorm_export.artifacts.onnx_file import GENAI_CONFIG_FILE
from ibnorm_export.errors import ModelFileError, PromptError, quoted, shortened
from ibnorm_export.files import sha256_of

__all__ = ["TOKENIZER_FILES", "FolderTokenizer", "TextStream", "end_tokens", "read_json", "write_byte_tokenizer"]

#: Files of a tokenizer in a Hugging Face folder.
TOKENIZER_FILES: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)

#: Number of earlier tokens to decode together with new ones. Without them, a word would lose its leading space; a few
#: are enough to contain all bytes of a character that is split between tokens.
_CONTEXT: Final = 8
#: A token of one byte, as tokenizers with byte fallback write it.
_FALLBACK: Final = re.compile("<0x[0-9A-Fa-f]{2}>")


def read_json(path: Path) -> dict[str, object]:
    """Read a JSON object from a file.

    Raises:
        ModelFileError: the file is missing, is not valid JSON, or contains another kind of value.
    """
    try:
        content = parsing.read_json(path)
    except FileNotFoundError as error:
        raise ModelFileError(f"{path} does not exist") from error
    except (ValueError, OSError) as error:
        raise ModelFileError(f"{path} is not valid JSON: {shortened(str(error))}") from error
    if not isinstance(content, dict):
        raise ModelFileError(f"{path} contains {type(content).__name__}; it must be a JSON object")
    return content


def end_tokens(folder: Path) -> frozenset[int]:
    """Read the ids of the tokens that end a text.

    They are those of genai_config.json together with those of generation_config.json, or of config.json if the latter
    has none. genai_config.json can name more: its writer adds the token that ends a turn of a chat.

    Args:
        folder: a checkpoint or an export.

    Returns:
        The ids; empty if no file names one.

    Raises:
        ModelFileError: a file is damaged, or names something other than token ids.
    """
    ends: set[int] = set()
    for name in (GENAI_CONFIG_FILE, "generation_config.json", "config.json"):
        if (folder / name).is_file():
            config = read_json(folder / name)
            model = config.get("model") if name == GENAI_CONFIG_FILE else config
            tokens = model.get("eos_token_id") if isinstance(model, dict) else None
            listed = tokens if isinstance(tokens, list) else [] if tokens is None else [tokens]
            if not all(type(token) is int and 0 <= token < 1 << 31 for token in listed):
                raise ModelFileError(
                    f"{folder / name}: eos_token_id is {quoted(tokens)}; it must be a token id or a list of ids"
                )
            ends.update(listed)
            if tokens is not None and name == "generation_config.json":
                break
    return frozenset(ends)


class TextStream:
    """The text of tokens that arrive one by one.

    The pieces together are what `FolderTokenizer.decode` returns for all tokens, but only new tokens are decoded. A
    piece is returned when no later token can change it. A final U+FFFD is held back, because it may be the start of a
    character. So are byte-fallback tokens until their run ends, because one wrong byte changes the whole run.

    Args:
        decode: returns the text of token ids.
        visible: ids of the tokens that `decode` does not skip.
        fallback: ids of the tokens of one byte each, which `decode` joins.
    """

    def __init__(
        self, decode: Callable[[list[int]], str], visible: frozenset[int], *, fallback: frozenset[int] = frozenset()
    ) -> None:
        self._decode = decode
        self._visible = visible
        self._fallback = fallback
        self._last: list[int] = []
        self._known = 0  # number of tokens of `_last` that have been decoded
        self._sent = 0  # number of characters of their text that have been returned

    def extend(self, tokens: Iterable[int]) -> None:
        """Add tokens."""
        self._last.extend(token for token in tokens if token in self._visible)

    def take(self) -> str:
        """Return the new text that no later token can change."""
        known = len(self._last)
        while known > self._known and self._last[known - 1] in self._fallback:
            known -= 1
        if known == self._known:
            return ""
        text = self._decode(self._last[:known])
        end = len(text) - text.endswith("\ufffd")
        piece = text[self._sent : end]
        self._known, self._sent = known, end
        if len(self._last) == known >= 2 * _CONTEXT:
            context = self._decode(self._last[-_CONTEXT:])
            if context and context[-1] == text[-1]:
                self._last = self._last[-_CONTEXT:]
                self._known, self._sent = _CONTEXT, len(context) - (len(text) - end)
        return piece

    def rest(self) -> str:
        """Return the text that is still held back; call it after the last token."""
        return self._decode(self._last)[self._sent :]


class FolderTokenizer:
    """The tokenizer.json of a folder.

    Args:
        folder: a checkpoint or an export.
        vocabulary: number of rows of the model's embedding; None if that is unknown.

    Raises:
        ModelFileError: there is no tokenizer.json, it is damaged, or it has ids outside the embedding.
    """

    def __init__(self, folder: Path, vocabulary: int | None = None) -> None:
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise ModelFileError(
                f"{folder} has no tokenizer.json, so text cannot be turned into tokens; copy it from the checkpoint, "
                "or write it with AutoTokenizer.from_pretrained(...).save_pretrained"
            )
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the package raises bare Exception for every kind of damage
            raise ModelFileError(f"{file} is not a tokenizer: {shortened(str(error))}") from error
        self._tokenizer.no_truncation()  # files state the length and padding of training; transformers ignores them too
        self._tokenizer.no_padding()
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        self.folder = folder
        """Where it is."""
        self.size = len(vocab)
        """Number of tokens."""
        self.sha256 = sha256_of(file)
        """Hash of tokenizer.json."""
        self.largest = max(vocab.values(), default=-1)
        """The largest token; -1 if there is none."""
        if vocabulary is not None and self.largest >= vocabulary:
            raise ModelFileError(
                f"{file} has token {self.largest}, but the model's embedding has only {vocabulary} rows: they belong "
                "to different models"
            )
        special = {token for token, word in self._tokenizer.get_added_tokens_decoder().items() if word.special}
        self._visible = frozenset(vocab.values()) - special
        self._fallback = frozenset(
            token for word, token in vocab.items() if _FALLBACK.fullmatch(word) and self.decode([token]) != word
        )

    def encode(self, text: str) -> NDArray[np.int64]:
        """Return the token ids (n,) of `text`, with the special tokens that the tokenizer adds.

        Raises:
            PromptError: the text is empty, or contains an unpaired surrogate.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise PromptError(
                f"character {error.start} of the prompt is an unpaired surrogate, which is not valid text"
            ) from error
        ids = np.array(self._tokenizer.encode(text).ids, dtype=np.int64)
        if not ids.size:
            raise PromptError("the prompt is empty; give at least one character")
        return ids

    def encode_with_starts(self, text: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the token ids (n,) of a text, and the character (n,) of the text at which each token begins.

        The starts never fall: a special token, which stands for no character, begins where the token before it does.
        """
        encoding = self._tokenizer.encode(text)
        starts = np.array([start for start, _ in encoding.offsets], dtype=np.int64)
        return np.array(encoding.ids, dtype=np.int64), np.maximum.accumulate(starts) if len(starts) else starts

    def decode(self, ids: NDArray[np.int64] | list[int]) -> str:
        """Return the text of token ids; incomplete characters become U+FFFD."""
        text: str = self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)
        return text

    def stream(self) -> TextStream:
        """Return a decoder for tokens that arrive one by one."""
        return TextStream(self.decode, self._visible, fallback=self._fallback)


def write_byte_tokenizer(folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json for a model whose tokens are bytes: token n is byte n.

    They are the byte-level BPE of GPT-2 without merges, which transformers, tokenizers and onnxruntime-genai can load.
    """
    from tokenizers import decoders, models, pre_tokenizers

    # GPT-2 writes a byte as a printable character: a visible byte as itself, the others as code points from 256 on.
    visible = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    vocabulary = {chr(byte if byte in visible else 256 + hidden.index(byte)): byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
