"""The forms of OpenAI's text protocol: the fields of a request, and the objects in an answer.

Source: OpenAI API reference, "Completions" and "Chat completions".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from pydantic import BaseModel, Field

from ibnorm_export.generation.text_model import TextResult

__all__ = [
    "CHAT",
    "COMPLETION",
    "DEFAULT_MAX_TOKENS",
    "FINISH_REASONS",
    "Body",
    "Chat",
    "Completion",
    "Refused",
    "Shape",
    "usage",
]

#: Tokens of a completion that names no maximum. Source: the same reference.
DEFAULT_MAX_TOKENS: Final = 16

#: Why a text ended, in the protocol's words.
FINISH_REASONS: Final = {"end": "stop", "stop": "stop", "length": "length", "positions": "length"}


#: Fields that would change the text and are not supported, each with the values that change nothing. Source: the same
#: reference, and the fields that other servers add to it.
_UNSUPPORTED: Final[dict[str, tuple[Any, ...]]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (0,),  # also False, which equals 0
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
    """Fields that both kinds of request have. Other fields are ignored if they do not change the text."""

    model: str
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=0)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: dict[str, Any] | None = None

    @property
    def unsupported(self) -> list[str]:
        """Fields that ask for something that this endpoint does not support."""
        extra = self.model_extra or {}
        return [name for name, neutral in _UNSUPPORTED.items() if extra.get(name) not in (None, *neutral)]

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts before which the generated text ends."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in stops if text)


class Completion(Body):
    """The body of /v1/completions."""

    prompt: str | list[str]
    max_tokens: int | None = Field(DEFAULT_MAX_TOKENS, ge=1)


class _ChatMessage(BaseModel):
    role: str
    content: str


class Chat(Body):
    """The body of /v1/chat/completions."""

    messages: list[_ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)


class Refused(Exception):
    """A request that is answered with an error.

    Args:
        status: HTTP status.
        message: the reason, for people.
        code: the reason, for programs.
        headers: headers of the answer.
    """

    def __init__(self, status: int, message: str, *, code: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = headers


@dataclass(frozen=True, slots=True)
class Shape:
    """The form of an answer.

    Args:
        prefix: start of the answer's id.
        whole: type of an answer in one object.
        part: type of one event of a stream.
        choice: makes the choice in an answer from a text; its second argument is true if it is part of a stream.
    """

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
    """Count the tokens of the prompt and the text."""
    prompt, text = result.prompt_tokens, len(result.tokens)
    return {"prompt_tokens": prompt, "completion_tokens": text, "total_tokens": prompt + text}
