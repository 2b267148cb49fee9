"""The chat template of a tokenizer, which turns messages into one prompt."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox

from ibnorm_export.artifacts.tokenizer import read_json
from ibnorm_export.errors import ModelFileError, PromptError, shortened
from ibnorm_export.parsing import read_text

__all__ = ["ChatTemplate"]


def _raise_exception(message: str) -> str:
    raise jinja2.TemplateError(message)


class ChatTemplate:
    """A template of a Hugging Face tokenizer, which runs in jinja2's sandbox.

    Args:
        text: text of the template.
        tokens: special tokens by the names that the template uses: bos_token, eos_token.

    Raises:
        ModelFileError: the text is not a valid template.
    """

    def __init__(self, text: str, tokens: Mapping[str, str]) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
        environment.globals["raise_exception"] = _raise_exception
        try:
            self._template = environment.from_string(text)
        except jinja2.TemplateError as error:
            raise ModelFileError(f"the chat template of the tokenizer is damaged: {error}") from error
        self._tokens = dict(tokens)

    @classmethod
    def from_folder(cls, folder: Path) -> ChatTemplate | None:
        """Read the template of a folder from chat_template.jinja or tokenizer_config.json; None if there is none."""
        config: dict[str, Any] = {}
        if (folder / "tokenizer_config.json").is_file():
            config = read_json(folder / "tokenizer_config.json")
        file = folder / "chat_template.jinja"
        try:
            text = read_text(file) if file.is_file() else config.get("chat_template")
        except (OSError, ValueError) as error:
            raise ModelFileError(f"{file} is not UTF-8 text: {shortened(str(error))}") from error
        if not isinstance(text, str):
            return None
        tokens = {}
        for name in ("bos_token", "eos_token"):
            value = config.get(name)
            tokens[name] = str(value.get("content", "")) if isinstance(value, dict) else str(value or "")
        return cls(text, tokens)

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Return the prompt that asks for the assistant's next message.

        Raises:
            PromptError: the template rejects the messages.
        """
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, **self._tokens)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise PromptError(f"the chat template rejects the messages: {error}") from error
