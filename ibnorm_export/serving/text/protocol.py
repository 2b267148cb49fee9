"""The shapes of OpenAI's text protocol: what a request may say, and how an answer is worded.

Source: OpenAI API reference, "Completions" and "Chat completions".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from pydantic import BaseModel, Field

from ibnorm_export.generation.text_model import TextResult

__all__ = ["CHAT", "COMPLETION", "FINISH", "Body", "Chat", "Completion", "Refused", "Shape", "usage"]

#: Why a text ended, in the protocol's words.
FINISH: Final = {"end": "stop", "stop": "stop", "length": "length", "positions": "length"}


#: What would make another text of it and is not offered, and the values that ask for nothing. Source: the same
#: reference, and the fields that other servers add to it.
_NOT_OFFERED: Final[dict[str, tuple[Any, ...]]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (0,),  # which False equals
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "top_k": (0, -1),
    "min_p": (0,),
    "suffix": ("",),
    "echo": (False,),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "functions": ([],),
}


class Body(BaseModel, extra="allow"):
    """What both kinds of request have. Clients send many other fields, which are ignored where the text is the same."""

    model: str
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=0)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: dict[str, Any] | None = None

    @property
    def not_offered(self) -> list[str]:
        """Fields that ask for something that this endpoint does not do."""
        given = self.model_extra or {}
        return [name for name, neutral in _NOT_OFFERED.items() if given.get(name) not in (None, *neutral)]

    @property
    def stops(self) -> tuple[str, ...]:
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in given if text)


class Completion(Body):
    """Of /v1/completions."""

    prompt: str | list[str]
    max_tokens: int | None = Field(16, ge=1)


class _ChatMessage(BaseModel):
    role: str
    content: str


class Chat(Body):
    """Of /v1/chat/completions."""

    messages: list[_ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)


class Refused(Exception):
    """An answer that is no text.

    Args:
        status: of HTTP.
        message: for a person.
        code: for a program.
        headers: to answer with.
    """

    def __init__(self, status: int, message: str, *, code: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = headers


@dataclass(frozen=True, slots=True)
class Shape:
    """How one of the two endpoints words its answers."""

    prefix: str
    whole: str
    part: str
    choice: Callable[[str, bool], dict[str, Any]]


def _completion_choice(text: str, part: bool) -> dict[str, Any]:
    return {"text": text, "logprobs": None}


def _chat_choice(text: str, part: bool) -> dict[str, Any]:
    return {"delta" if part else "message": {"role": "assistant", "content": text}}


COMPLETION: Final = Shape("cmpl", "text_completion", "text_completion", _completion_choice)
CHAT: Final = Shape("chatcmpl", "chat.completion", "chat.completion.chunk", _chat_choice)


def usage(result: TextResult) -> dict[str, int]:
    """Tokens of prompt and text."""
    prompt, text = result.prompt_tokens, len(result.tokens)
    return {"prompt_tokens": prompt, "completion_tokens": text, "total_tokens": prompt + text}
