"""A language model behind a text endpoint, as a candidate: it must return the log-probabilities of a prompt.

Source: OpenAI API reference, "Completions", with `echo` and `logprobs`, as vLLM and others serve it; lm-eval's model
local-completions asks in the same way.
"""

from __future__ import annotations

import http.client
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from ibnorm_export.errors import BackendUnavailable, IBNormError, ModelFileError, quoted, shortened
from ibnorm_export.evaluation.samples import ModelFacts, TokenScores, Window
from ibnorm_export.files import sha256_of
from ibnorm_export.parsing import parse_json

__all__ = ["EndpointCandidate"]

#: How long a batch may take, in seconds, and how large an answer may be, in bytes.
_TIMEOUT_S: Final = 600.0
_LARGEST: Final = 256 << 20

#: Tokens that a server needs room for beyond those that a model of this length reads: the last one that is scored, and
#: the one that it generates.
_ADDED: Final = 2

#: What an address is made of; the name of a model after it may have other characters.
_VISIBLE: Final = re.compile("[!-~]+")

#: No logarithm of a probability is larger; not a number and infinity are refused too.
_LARGEST_NUMBER: Final = 1e30

_HOW_TO_GIVE_A_KEY: Final = "A key is given with --api-key-file FILE, or EvaluationOptions(api_key=KEY) in Python"

_LEGAL: Final = "http://HOST:PORT/v1, or http://HOST:PORT/v1#MODEL where the server has several models"


@dataclass(frozen=True, slots=True)
class _Address:
    """The address of a server, and the name of one of its models."""

    scheme: str
    host: str
    path: str
    model: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.host}{self.path}"


def _parse_address(url: str) -> _Address:
    """Read an address.

    Raises:
        IBNormError: it is malformed, or has parts that are not sent.
    """
    if "@" in url.partition("#")[0]:  # the message does not show what may be a password
        raise IBNormError(
            "the address of a text endpoint has a user name or a password, which reports would show: leave it out. "
            f"The address must be {_LEGAL}. {_HOW_TO_GIVE_A_KEY}"
        )
    try:
        parts = urlsplit(url)
        legal = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # of a bracket that is not closed, or of the port
        legal = False
    if not legal or parts.query or not _VISIBLE.fullmatch(parts.netloc + parts.path):
        shown = quoted(url.partition("?")[0])  # a query may have a key
        raise IBNormError(
            f"{shown} is not the address of a text endpoint; it must be {_LEGAL}, in ASCII and without a query"
        )
    return _Address(parts.scheme, parts.netloc, parts.path.rstrip("/"), parts.fragment)


class EndpointCandidate:
    """A model on a running server with OpenAI's interface.

    The server's weights are not known: cached results belong to the address and the name of the model.

    Args:
        url: http(s)://HOST:PORT/v1, and #MODEL where the server has several models.
        name: name in the report; empty takes that of the model on the server.
        api_key: what the server wants as `Authorization: Bearer KEY`; empty sends none.

    Raises:
        IBNormError: the address is malformed, or names no model of the server, or the server wants another key.
        BackendUnavailable: no server answers.
    """

    def __init__(self, url: str, *, name: str = "", api_key: str = "") -> None:
        self._url = _parse_address(url)
        self._api_key = api_key
        self.seconds = 0.0
        self._model, longest = self._choose(self._url.model)
        self.facts = ModelFacts(max_positions=max(0, longest - _ADDED))
        self.name = name or f"{self._model} ({self._url.host})"
        self.identity = sha256_of(json.dumps([str(self._url), self._model]).encode())

    def _choose(self, wanted: str) -> tuple[str, int]:
        """The name of a model of the server, and the longest text that it takes, in tokens; 0 if that is unknown."""
        status, answer = self._ask("GET", "/models", None)
        listed = answer.get("data") if isinstance(answer, dict) and status == http.client.OK else None
        entries = [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
        models = {entry["id"]: entry for entry in entries if isinstance(entry.get("id"), str)}
        if not models:
            raise IBNormError(f"{self._url}/models lists no model (HTTP {status}); the address must be {_LEGAL}")
        first = next(iter(models))
        if wanted not in models and (wanted or len(models) > 1):
            raise IBNormError(f"{self._url} has the models {quoted(list(models))}; name one: {self._url}#{first}")
        chosen = wanted or first
        longest = models[chosen].get("max_model_len")  # vLLM's
        return chosen, longest if type(longest) is int and longest > _ADDED + 1 else 0

    def _ask(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        """Status and content of an answer."""
        kind = http.client.HTTPSConnection if self._url.scheme == "https" else http.client.HTTPConnection
        headers = {"Content-Type": "application/json"}
        if self._api_key:
            headers["Authorization"] = f"Bearer {self._api_key}"
        try:
            connection = kind(self._url.host, timeout=_TIMEOUT_S)
            try:
                content = None if body is None else json.dumps(body)
                connection.request(method, self._url.path + path, content, headers)
                with connection.getresponse() as answer:  # it may outlive the connection, and has the socket then
                    self._check_access(answer.status)
                    return answer.status, parse_json(answer.read(_LARGEST))
            finally:
                connection.close()
        except ValueError as error:  # of the host's name, or of the JSON
            raise IBNormError(
                f"{self._url}{path} does not answer with JSON ({shortened(str(error))}); the address must be {_LEGAL}"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise BackendUnavailable(
                f"no server answers at {self._url} ({shortened(str(error) or type(error).__name__)}); start it, or "
                "evaluate the folder that it serves"
            ) from error

    def _check_access(self, status: int) -> None:
        if status not in (http.client.UNAUTHORIZED, http.client.FORBIDDEN):
            return
        if self._api_key:
            raise IBNormError(f"{self._url} does not accept the API key (HTTP {status}): give the server's own key")
        raise IBNormError(f"{self._url} requires an API key (HTTP {status}). {_HOW_TO_GIVE_A_KEY}")

    def classify(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Images have no place in a text endpoint.

        Raises:
            ModelFileError: always.
        """
        raise ModelFileError(f"{self._url} is a text endpoint, not an image classifier: evaluate the exported file")

    def score(self, windows: Sequence[Window]) -> Sequence[TokenScores]:
        """Return the scores of each window. They are one request.

        Raises:
            IBNormError: the server does not return the log-probabilities of a prompt.
            BackendUnavailable: no server answers.
        """
        body = {
            "model": self._model,
            "prompt": [window.tokens.tolist() for window in windows],
            "echo": True,
            "logprobs": 1,
            "max_tokens": 1,  # some servers refuse 0
            "temperature": 0,
        }
        start = time.perf_counter()
        status, answer = self._ask("POST", "/completions", body)
        self.seconds += time.perf_counter() - start
        if status != http.client.OK:
            self._refuse(f"HTTP {status}: {shortened(_reason(answer))}")
        try:
            choices = _choices(answer, len(windows))
            return [_scores(_part(c, "logprobs", kind=dict), w) for c, w in zip(choices, windows, strict=True)]
        except ValueError as error:
            self._refuse(f"in its answer, {error}")

    def _refuse(self, reason: str) -> NoReturn:
        raise IBNormError(
            f"{self._url} does not return the log-probabilities of a prompt, which this task needs ({reason}): "
            "evaluate the folder that it serves, or a server that takes echo and logprobs, such as vLLM"
        )


def _reason(answer: Any) -> str:
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    return str(error.get("message", error) if isinstance(error, dict) else error)


#: How a message calls what JSON can hold.
_KINDS: Final = {dict: "an object", list: "a list", int: "a whole number"}


def _part(found: Any, name: str, *, kind: type) -> Any:
    """The value of a key.

    Raises:
        ValueError: there is none, or it is of another kind.
    """
    if not isinstance(found, dict) or name not in found:
        raise ValueError(f"the key {name!r} is missing")
    value = found[name]
    fits = isinstance(value, kind) and not isinstance(value, bool)
    if not fits:
        raise ValueError(f"{name} is {quoted(value)} where {_KINDS[kind]} must be")
    return value


def _choices(answer: Any, count: int) -> list[Any]:
    """The answers to the prompts, in their order.

    Raises:
        ValueError: there is not one for each prompt.
    """
    choices = sorted(_part(answer, "choices", kind=list), key=lambda choice: int(_part(choice, "index", kind=int)))
    if (numbers := [choice["index"] for choice in choices]) != list(range(count)):
        raise ValueError(f"the choices have the indexes {quoted(numbers)} for {count} prompts")
    return choices


def _number(value: Any, where: str) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _LARGEST_NUMBER:
        return float(value)
    raise ValueError(f"{where} has {quoted(value)} where a number must be")


def _scores(found: dict[str, Any], window: Window) -> TokenScores:
    """Of the prompt's tokens, the last ones; the token that the server adds is left out.

    Raises:
        ValueError: there are fewer numbers than tokens, as without `echo`, or something else in their places.
    """
    length, scored = len(window.tokens), window.scored
    values, tops = _part(found, "token_logprobs", kind=list), _part(found, "top_logprobs", kind=list)
    if len(values) < length or len(tops) < length:
        raise ValueError(f"there are {min(len(values), len(tops))} log-probabilities for {length} tokens")
    rows = range(length - scored, length)
    own = np.array([_number(values[row], "token_logprobs") for row in rows])
    best = np.array([_best(tops[row]) for row in rows])
    return TokenScores(own, own >= best)


def _best(likeliest: Any) -> float:
    """The log-probability of the likeliest token, of a position's tokens by their texts."""
    if not isinstance(likeliest, dict) or not likeliest:
        raise ValueError(f"top_logprobs has {quoted(likeliest)} where an object of numbers must be")
    return max(_number(value, "top_logprobs") for value in likeliest.values())
