"""What an operator sets about the text endpoint: its name, template, key and log."""

from __future__ import annotations

import re
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Final

from ibnorm_export.errors import ConfigError, quoted, shortened
from ibnorm_export.parsing import read_text

__all__ = ["TextSettings", "check_api_key", "read_api_key"]

#: What a header can carry in one word.
_KEY: Final = re.compile(r"[!-~]{1,1024}")
_NAME: Final = re.compile(r"[!-~]{1,256}")


@dataclass(frozen=True, slots=True)
class TextSettings:
    """How the text endpoint presents itself.

    Args:
        model_name: name of the model for clients; empty means the folder's name.
        chat_template: a file with a chat template, used in place of the tokenizer's.
        api_key: what clients must send as `Authorization: Bearer KEY`; empty accepts everybody.
        log_requests: write one line of JSON for each request to standard error.

    Raises:
        ConfigError: the name or the key has characters that do not fit into a header.
    """

    model_name: str = ""
    chat_template: Path | None = None
    _: KW_ONLY
    api_key: str = field(default="", repr=False)
    log_requests: bool = False

    def __post_init__(self) -> None:
        if self.model_name and not _NAME.fullmatch(self.model_name):
            raise ConfigError(
                f"the model's name is {quoted(self.model_name)}; it must be at most 256 ASCII characters without spaces"
            )
        check_api_key(self.api_key)
        if self.chat_template is not None:
            object.__setattr__(self, "chat_template", Path(self.chat_template))


def check_api_key(key: str) -> None:
    """Check that a key fits into a header; an empty one means that there is none.

    Raises:
        ConfigError: it does not.
    """
    if not isinstance(key, str) or (key and not _KEY.fullmatch(key)):  # the message does not show the key
        raise ConfigError("the API key must be at most 1024 ASCII characters without spaces")


def read_api_key(path: str | Path) -> str:
    """Read an API key from a file: its only line.

    A file keeps the key out of the list of processes, which every user of a machine can read.

    Raises:
        ConfigError: the file cannot be read, is empty, or has more than one line.
    """
    try:
        lines = read_text(Path(path)).split()
    except (OSError, ValueError) as error:
        raise ConfigError(f"the file of the API key cannot be read: {shortened(str(error))}") from error
    if len(lines) != 1:
        raise ConfigError(f"{path} must hold one API key and nothing else; it has {len(lines)} words")
    return lines[0]
