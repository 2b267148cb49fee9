"""A language model behind a text endpoint, as a candidate."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ibnorm_export import EvaluationOptions, IBNormError, evaluate
from ibnorm_export.artifacts.tokenizer import write_byte_tokenizer
from ibnorm_export.errors import BackendUnavailable, ModelFileError
from ibnorm_export.evaluation.endpoint_candidate import EndpointCandidate
from tests.support.fake_candidates import FakeCandidate

Answer = Callable[[dict[str, Any]], tuple[int, Any]]

TEXT = "The quick brown fox jumps over the lazy dog. " * 8


def rule(tokens: np.ndarray) -> np.ndarray:
    """Logits of the tokens that follow: the next byte is likely, and others by their distance."""
    distance = np.abs(np.arange(256) - ((tokens + 1) % 256)[:, None])
    return (-0.05 * distance).astype(np.float32)


def complete(body: dict[str, Any]) -> tuple[int, Any]:
    """Answer like a server that takes `echo` and `logprobs`, in float64; choices come in the opposite order."""
    choices = []
    for index, prompt in enumerate(body["prompt"]):
        logits = rule(np.array(prompt)).astype(np.float64)
        rows = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        own = [None, *(float(rows[n, token]) for n, token in enumerate(prompt[1:])), float(rows[-1].max())]
        tops = [None, *({"x": float(row.max())} for row in rows)]
        choices.append({"index": index, "logprobs": {"token_logprobs": own, "top_logprobs": tops}})
    return 200, {"choices": choices[::-1]}


class Server:
    """A server of one rule on a free port."""

    def __init__(self) -> None:
        self.models: Any = {"data": [{"id": "toy"}]}
        self.answer: Answer = complete
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def _send(self, status: int, content: Any) -> None:
                raw = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def do_GET(self) -> None:
                self._send(200, outer.models)

            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"])
                self._send(*outer.answer(json.loads(self.rfile.read(length))))

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"


@pytest.fixture
def server() -> Iterator[Server]:
    started = Server()
    thread = threading.Thread(target=started.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield started
    started.http.shutdown()
    thread.join()
    started.http.server_close()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_byte_tokenizer(tmp_path)
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


def test_an_endpoint_scores_as_the_model_that_it_serves(server: Server, data: Path) -> None:
    options = EvaluationOptions(tokenizer=data.parent, max_length=32, batch=3)
    own = FakeCandidate("model", rule)
    report = evaluate(server.url, task="perplexity", data=data, against=own, options=options)
    served = report.candidates[1]
    assert served.name == f"toy ({server.url.split('/')[2]})"
    assert served.metrics[0].value == pytest.approx(report.candidates[0].metrics[0].value, rel=1e-5)
    assert served.metrics[3].value == report.candidates[0].metrics[3].value  # the share of tokens that are likeliest
    assert served.seconds > 0.0


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda _: (400, {"error": {"message": "echo is not supported"}}), "HTTP 400: echo is not supported"),
        (lambda _: (200, {"choices": [{"index": 0, "logprobs": None, "text": "x"}]}), "its answer lacks them"),
        (lambda _: (200, {"choices": []}), "its answer lacks them"),
        (
            lambda body: (
                200,
                {"choices": [{"index": 0, "logprobs": {"token_logprobs": [0.0], "top_logprobs": [{}]}}]},
            ),
            "1 numbers for 32 tokens",
        ),
    ],
)
def test_a_server_without_log_probabilities_of_prompts_is_refused(
    server: Server, data: Path, answer: Answer, message: str
) -> None:
    server.answer = answer
    options = EvaluationOptions(tokenizer=data.parent, max_length=32, batch=1)
    with pytest.raises(IBNormError, match="does not return the log-probabilities of a prompt") as found:
        evaluate(server.url, task="perplexity", data=data, options=options)
    assert message in str(found.value)
    assert "evaluate the folder that it serves" in str(found.value)


def test_the_model_is_chosen_among_those_of_the_server(server: Server) -> None:
    server.models = {"data": [{"id": "a"}, {"id": "b"}]}
    assert EndpointCandidate(f"{server.url}/#b").name.startswith("b (")
    with pytest.raises(IBNormError, match=r"has the models .*'a', 'b'.*; name one: http://127\S+/v1#a"):
        EndpointCandidate(server.url)
    with pytest.raises(IBNormError, match="has the models"):
        EndpointCandidate(f"{server.url}#c")


def test_what_is_not_an_endpoint(server: Server) -> None:
    server.models = b"<html>"
    with pytest.raises(IBNormError, match="does not answer with JSON"):
        EndpointCandidate(server.url)
    server.models = {"error": "none"}
    with pytest.raises(IBNormError, match="lists no model"):
        EndpointCandidate(server.url)
    with pytest.raises(IBNormError, match="is not the address of a text endpoint"):
        EndpointCandidate("http://")
    with pytest.raises(BackendUnavailable, match=r"no server answers at http://127\.0\.0\.1:9/v1"):
        EndpointCandidate("http://127.0.0.1:9/v1")


def test_an_endpoint_classifies_no_images(server: Server) -> None:
    with pytest.raises(ModelFileError, match="is a text endpoint, not an image classifier"):
        EndpointCandidate(server.url).classify(np.zeros((1, 3, 2, 2), dtype=np.float32))
