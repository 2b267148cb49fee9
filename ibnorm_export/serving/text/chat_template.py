"""The chat template of a tokenizer, which turns messages into one prompt.

A template is a program that came with a checkpoint. jinja2's sandbox keeps it from reaching anything, but neither from
running for ever nor from filling the memory: `template_process` runs it with limits. This module imports little,
because that process imports it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox

from ibnorm_export.errors import ModelFileError, PromptError, quoted, shortened
from ibnorm_export.parsing import read_json, read_text

__all__ = ["ChatTemplate", "TemplateSource", "read_template"]


def _raise_exception(message: str) -> str:
    raise jinja2.TemplateError(message)


@dataclass(frozen=True, slots=True)
class TemplateSource:
    """A chat template that has not been compiled.

    Args:
        text: text of the template.
        tokens: special tokens by the names that the template uses: bos_token, eos_token.
    """

    text: str
    tokens: Mapping[str, str]


def read_template(folder: Path, given: Path | None = None) -> TemplateSource | None:
    """Read the template of a folder from chat_template.jinja or tokenizer_config.json; None if there is none.

    Args:
        folder: has the files of the tokenizer.
        given: a file with a template that is used in place of the folder's.

    Raises:
        ModelFileError: a file is damaged, or the given file is missing.
    """
    config: Any = {}
    file = folder / "tokenizer_config.json"
    try:
        if file.is_file():
            config = read_json(file)
        own = folder / "chat_template.jinja" if given is None else given
        if given is not None or own.is_file():
            file = own
            text: Any = read_text(file)
        else:
            text = config.get("chat_template") if isinstance(config, dict) else None
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{file} cannot be read: {shortened(str(error))}") from error
    if not isinstance(text, str):
        return None
    tokens = {}
    for name in ("bos_token", "eos_token"):
        value = config.get(name) if isinstance(config, dict) else None
        tokens[name] = str(value.get("content", "")) if isinstance(value, dict) else str(value or "")
    return TemplateSource(text, tokens)


class ChatTemplate:
    """A template of a Hugging Face tokenizer, which runs in jinja2's sandbox.

    Args:
        source: the template.

    Raises:
        ModelFileError: the text is not a valid template.
    """

    def __init__(self, source: TemplateSource) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
        environment.globals["raise_exception"] = _raise_exception
        try:
            self._template = environment.from_string(source.text)
        # Deliberately broad, here and below: the template is somebody else's program, and constant expressions are
        # computed when it is compiled.
        except Exception as error:
            raise ModelFileError(f"the chat template of the tokenizer is damaged: {_reason(error)}") from error
        self._tokens = dict(source.tokens)

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Return the prompt that asks for the assistant's next message.

        Raises:
            PromptError: the template rejects the messages, or fails.
        """
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, **self._tokens)
        except Exception as error:
            raise PromptError(f"the chat template rejects the messages: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "it needs too much memory"
    return shortened(str(error)) if isinstance(error, jinja2.TemplateError) else quoted(error)
