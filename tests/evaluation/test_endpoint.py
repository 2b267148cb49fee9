"""A language model behind a text endpoint, as a candidate."""

from __future__ import annotations

import gc
import json
import math
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ibnorm_export import EvaluationOptions, IBNormError, evaluate
from ibnorm_export.artifacts.tokenizer import write_byte_tokenizer
from ibnorm_export.cli import main
from ibnorm_export.errors import BackendUnavailable, ExitCode, ModelFileError
from ibnorm_export.evaluation.endpoint_candidate import EndpointCandidate
from tests.support.fake_candidates import FakeCandidate
from tests.support.json_documents import read_document

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


def with_logprobs(found: object) -> tuple[int, Any]:
    """An answer to one prompt."""
    return 200, {"choices": [{"index": 0, "logprobs": found}]}


def with_numbers(own: object, likeliest: object) -> tuple[int, Any]:
    """An answer to one prompt of up to 40 tokens, with the same at every position."""
    return with_logprobs({"token_logprobs": [own] * 40, "top_logprobs": [likeliest] * 40})


class Server:
    """A server of one rule on a free port. It may want a key."""

    def __init__(self) -> None:
        self.models: Any = {"data": [{"id": "toy"}]}
        self.answer: Answer = complete
        self.key = ""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def _send(self, status: int, content: Any) -> None:
                if outer.key and self.headers["Authorization"] != f"Bearer {outer.key}":
                    status, content = 401, b"who are you?"
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


@pytest.mark.parametrize("task", ["perplexity", "choice"])
def test_a_prompt_and_the_token_that_is_generated_fit_the_server(server: Server, data: Path, task: str) -> None:
    """vLLM states how many tokens it takes, and refuses more."""
    server.models = {"data": [{"id": "toy", "max_model_len": 40}]}
    asked: list[int] = []

    def answer(body: dict[str, Any]) -> tuple[int, Any]:
        asked.extend(len(prompt) + body["max_tokens"] for prompt in body["prompt"])
        return complete(body)

    server.answer = answer
    questions = data.parent / "questions.jsonl"
    questions.write_text(json.dumps({"question": TEXT, "choices": ["one", "two"], "answer": 0}), encoding="utf-8")
    texts = data if task == "perplexity" else questions
    evaluate(server.url, task=task, data=texts, options=EvaluationOptions(tokenizer=data.parent))
    assert 38 <= max(asked) <= 40


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
        (lambda _: (200, {"object": "text_completion"}), "in its answer, the key 'choices' is missing"),
        (lambda _: (200, []), "the key 'choices' is missing"),
        (lambda _: (200, {"choices": {}}), "choices is {} where a list must be"),
        (lambda _: (200, {"choices": []}), "the choices have the indexes [] for 1 prompts"),
        (lambda _: (200, {"choices": ["text"]}), "the key 'index' is missing"),
        (lambda _: (200, {"choices": [{"index": "0"}]}), "index is '0' where a whole number must be"),
        (
            lambda _: (200, {"choices": [{"index": 1, "logprobs": {}}]}),
            "the choices have the indexes [1] for 1 prompts",
        ),
        (lambda _: (200, {"choices": [{"index": 0, "text": "x"}]}), "the key 'logprobs' is missing"),
        (lambda _: with_logprobs(None), "logprobs is None where an object must be"),
        (lambda _: with_logprobs([0.0]), "logprobs is [0.0] where an object must be"),
        (lambda _: with_logprobs({"token_logprobs": [0.0] * 40}), "the key 'top_logprobs' is missing"),
        (lambda _: with_numbers(0.0, None), "top_logprobs has None where an object of numbers must be"),
        (lambda _: with_numbers(0.0, [0.0]), "top_logprobs has [0.0] where an object of numbers must be"),
        (lambda _: with_numbers(0.0, {}), "top_logprobs has {} where an object of numbers must be"),
        (lambda _: with_numbers(0.0, {"x": "0"}), "top_logprobs has '0' where a number must be"),
        (lambda _: with_numbers(None, {"x": 0.0}), "token_logprobs has None where a number must be"),
        (lambda _: with_numbers(10**400, {"x": 0.0}), "token_logprobs has 1000"),
        (lambda _: with_numbers(math.nan, {"x": 0.0}), "token_logprobs has nan where a number must be"),
        (
            lambda _: with_logprobs({"token_logprobs": [0.0], "top_logprobs": [{}]}),
            "there are 1 log-probabilities for 32 tokens",
        ),
    ],
)
def test_a_server_without_log_probabilities_of_prompts_is_refused(
    server: Server, data: Path, answer: Answer, message: str
) -> None:
    server.answer = answer
    options = EvaluationOptions(tokenizer=data.parent, max_length=32, batch=1, limit=1)
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


def test_a_key_is_sent_and_its_absence_is_stated(server: Server, data: Path) -> None:
    server.key = "sk-secret"
    options = EvaluationOptions(tokenizer=data.parent, max_length=32)
    message = r"/v1 requires an API key \(HTTP 401\)\. A key is given with --api-key-file FILE"
    with pytest.raises(IBNormError, match=message):
        evaluate(server.url, task="perplexity", data=data, options=options)
    with pytest.raises(IBNormError, match=r"does not accept the API key \(HTTP 401\)") as refused:
        evaluate(server.url, task="perplexity", data=data, options=replace(options, api_key="sk-other"))
    options = replace(options, api_key="sk-secret")
    report = evaluate(server.url, task="perplexity", data=data, options=options)
    assert not [text for text in (str(refused.value), str(report), repr(report), repr(options)) if "sk-" in text]
    with pytest.raises(IBNormError, match="the API key must be at most 1024 ASCII characters without spaces"):
        replace(options, api_key="two\nlines")


def test_a_key_is_sent_to_one_server_only(data: Path) -> None:
    options = EvaluationOptions(api_key="sk-secret")
    models = ["https://vendor.example/v1#a", "https://vendor.example/v1#b", "http://box.example:8000/v1"]
    expected = "one API key would be sent to http://box.example:8000 and https://vendor.example: evaluate"
    with pytest.raises(IBNormError, match=expected):
        evaluate(models, task="perplexity", data=data, options=options)


@pytest.mark.parametrize("url", ["http://user:pa/ss@host:80/v1", "https://sk-secret/x@host/v1"])
def test_a_password_with_a_slash_is_not_shown(url: str) -> None:
    with pytest.raises(IBNormError, match="has a user name or a password") as refused:
        EndpointCandidate(url)
    assert "ss@" not in str(refused.value) and "sk-" not in str(refused.value)


def test_no_connection_stays_open_after_an_error(server: Server) -> None:
    """Python warns of a socket that is left open when it collects what the traceback kept, and warnings are errors."""
    server.key = "sk-secret"

    def refuse() -> None:
        with pytest.raises(IBNormError, match="requires an API key") as found:
            EndpointCandidate(server.url)
        assert found.value

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        refuse()
        gc.collect()
    assert not [str(warning.message) for warning in caught]


def test_the_command_reads_the_key_from_a_file(
    server: Server, data: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    server.key = "sk-secret"
    file = data.parent / "key"
    file.write_text("sk-secret\n")
    words = ["evaluate", server.url, "--task", "perplexity", "--data", data, "--tokenizer", data.parent]
    monkeypatch.setattr(sys, "argv", ["ibnorm-export", *map(str, [*words, "--max-length", 32, "--api-key-file", file])])
    assert main.main() == ExitCode.SUCCESS, capfd.readouterr().err


@pytest.mark.parametrize(
    "url",
    [
        "http://",
        "ftp://h/v1",
        "http://[::1",
        "http://h:99999/v1",
        "http://h:port/v1",
        "http://h/v 1",
        "http://h/v1?k=1",
    ],
)
def test_a_malformed_address_is_refused(url: str) -> None:
    with pytest.raises(IBNormError, match="is not the address of a text endpoint; it must be http://HOST:PORT/v1"):
        EndpointCandidate(url)


@pytest.mark.parametrize("url", ["http://me:pass@127.0.0.1:9/v1", "http://me:pass@[::1", "https://pass@host:99999"])
def test_a_password_in_an_address_is_refused_and_not_shown(url: str) -> None:
    with pytest.raises(IBNormError, match="has a user name or a password") as found:
        EndpointCandidate(url)
    assert "me:" not in str(found.value)
    assert "pass@" not in str(found.value)


def test_what_is_not_an_endpoint(server: Server) -> None:
    server.models = b"<html>"
    with pytest.raises(IBNormError, match="does not answer with JSON"):
        EndpointCandidate(server.url)
    for models in ({"error": "none"}, {"data": 5}, {"data": {"id": "toy"}}, {"data": [{"id": None}, "toy"]}):
        server.models = models
        with pytest.raises(IBNormError, match="lists no model"):
            EndpointCandidate(server.url)
    with pytest.raises(BackendUnavailable, match=r"no server answers at http://127\.0\.0\.1:9/v1"):
        EndpointCandidate("http://127.0.0.1:9/v1")


def test_the_json_lists_no_file_for_an_endpoint(
    server: Server, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """An empty name would be the current folder, with everything in it."""
    working = tmp_path / "working"
    working.mkdir()
    (working / "other.txt").write_text("other")
    monkeypatch.chdir(working)
    words = ["evaluate", server.url, "--task", "perplexity", "--data", data, "--tokenizer", data.parent, "--json"]
    monkeypatch.setattr(sys, "argv", ["ibnorm-export", *map(str, words), "--max-length", "32"])
    assert main.main() == ExitCode.SUCCESS
    assert [file["path"] for file in read_document(capfd.readouterr().out, "evaluate")["files"]] == [str(data)]


def test_an_endpoint_classifies_no_images(server: Server) -> None:
    with pytest.raises(ModelFileError, match="is a text endpoint, not an image classifier"):
        EndpointCandidate(server.url).classify(np.zeros((1, 3, 2, 2), dtype=np.float32))
