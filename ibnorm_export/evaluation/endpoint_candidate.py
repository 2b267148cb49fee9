"""A language model behind a text endpoint, as a candidate: it must return the log-probabilities of a prompt.

Source: OpenAI API reference, "Completions", with `echo` and `logprobs`, as vLLM and others serve it; lm-eval's model
local-completions asks in the same way.
"""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Sequence
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

_LEGAL: Final = "http://HOST:PORT/v1, or http://HOST:PORT/v1#MODEL where the server has several models"


class EndpointCandidate:
    """A model on a running server with OpenAI's interface.

    The server's weights are not known: cached results belong to the address and the name of the model.

    Args:
        url: http(s)://HOST:PORT/v1, and #MODEL where the server has several models.
        name: name in the report; empty takes that of the model on the server.

    Raises:
        IBNormError: the address is malformed, or names no model of the server.
        BackendUnavailable: no server answers.
    """

    def __init__(self, url: str, *, name: str = "") -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise IBNormError(f"{quoted(url)} is not the address of a text endpoint; it must be {_LEGAL}")
        self._url = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
        self.facts = ModelFacts()
        self.seconds = 0.0
        self._model = self._choose(parts.fragment)
        self.name = name or f"{self._model} ({parts.netloc})"
        self.identity = sha256_of(json.dumps([self._url, self._model]).encode())

    def _choose(self, wanted: str) -> str:
        status, answer = self._ask("GET", "/models", None)
        listed = answer.get("data") if isinstance(answer, dict) and status == http.client.OK else None
        models = [str(entry.get("id")) for entry in listed or () if isinstance(entry, dict)]
        if not models:
            raise IBNormError(f"{self._url}/models lists no model (HTTP {status}); the address must be {_LEGAL}")
        if wanted in models:
            return wanted
        if wanted or len(models) > 1:
            raise IBNormError(f"{self._url} has the models {quoted(models)}; name one: {self._url}#{models[0]}")
        return models[0]

    def _ask(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        """Status and content of an answer."""
        parts = urlsplit(self._url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        try:
            connection = kind(parts.netloc, timeout=_TIMEOUT_S)
            try:
                content = None if body is None else json.dumps(body)
                connection.request(method, parts.path + path, content, {"Content-Type": "application/json"})
                answer = connection.getresponse()
                return answer.status, parse_json(answer.read(_LARGEST))
            finally:
                connection.close()
        except ValueError as error:  # of the port, or of the JSON
            raise IBNormError(
                f"{self._url}{path} does not answer with JSON ({shortened(str(error))}); the address must be {_LEGAL}"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise BackendUnavailable(
                f"no server answers at {self._url} ({shortened(str(error) or type(error).__name__)}); start it, or "
                "evaluate the folder that it serves"
            ) from error

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
            choices = sorted(answer["choices"], key=lambda choice: int(choice["index"]))
            return [_scores(choice["logprobs"], window) for choice, window in zip(choices, windows, strict=True)]
        except (KeyError, TypeError, ValueError) as error:
            self._refuse(f"its answer lacks them: {type(error).__name__} {quoted(error)}")

    def _refuse(self, reason: str) -> NoReturn:
        raise IBNormError(
            f"{self._url} does not return the log-probabilities of a prompt, which this task needs ({reason}): "
            "evaluate the folder that it serves, or a server that takes echo and logprobs, such as vLLM"
        )


def _reason(answer: Any) -> str:
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    return str(error.get("message", error) if isinstance(error, dict) else error)


def _scores(found: Any, window: Window) -> TokenScores:
    """Of the prompt's tokens, the last ones; the token that the server adds is left out.

    Raises:
        ValueError: there are fewer numbers than tokens, as without `echo`.
    """
    length, scored = len(window.tokens), window.scored
    values, tops = found["token_logprobs"], found["top_logprobs"]
    if len(values) < length or len(tops) < length:
        raise ValueError(f"{len(values)} numbers for {length} tokens")
    rows = range(length - scored, length)
    own = np.array([float(values[row]) for row in rows])
    best = np.array([max(map(float, tops[row].values())) for row in rows])
    return TokenScores(own, own >= best)
