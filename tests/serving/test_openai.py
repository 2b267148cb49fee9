"""The text endpoint over onnxruntime-genai, as the `openai` client and plain HTTP see it."""

from __future__ import annotations

import itertools
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from fastapi.testclient import TestClient

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.errors import BackendUnavailable, ModelFileError
from ibnorm_export.generation.sampling import Sampling
from ibnorm_export.generation.text_model import open_folder
from ibnorm_export.runtimes.runner import Endpoint
from ibnorm_export.runtimes.triton import TritonRunner
from ibnorm_export.serving.text.admission import TextQueue
from ibnorm_export.serving.text.app import create_app
from ibnorm_export.serving.text.chat_template import ChatTemplate, TemplateSource
from ibnorm_export.serving.text_limits import TextLimits
from tests.support.running_server import PATIENCE_S, Running, command, running

LIMIT = 16


@pytest.fixture(scope="session")
def endpoint(noise: Path) -> Iterator[str]:
    with running(noise, "--concurrency", LIMIT, "--max-request", 5000) as server:
        yield f"http://{server.http}"


@pytest.fixture(scope="session")
def client(endpoint: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{endpoint}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S)


def test_same_text_as_in_process(client: openai.OpenAI, noise: Path) -> None:
    model = open_folder(noise)
    for temperature, seed in ((0.0, 1), (1.0, 7), (1.0, 8)):
        wanted = model.generate("import", Sampling(24, temperature, top_p=1.0, seed=seed))
        answer = client.completions.create(
            model="noise", prompt="import", max_tokens=24, temperature=temperature, seed=seed
        )
        assert answer.choices[0].text == wanted.text
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage is not None
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (6, 24)
        parts = list(
            client.completions.create(
                model="noise",
                prompt="import",
                max_tokens=24,
                temperature=temperature,
                seed=seed,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
        assert "".join(part.choices[0].text for part in parts if part.choices) == wanted.text
        assert parts[-2].choices[0].finish_reason == "length"
        assert len(parts) <= 12, "quick tokens go together"
        assert parts[-1].usage is not None
        assert parts[-1].usage.total_tokens == 30


def test_chat(client: openai.OpenAI, noise: Path) -> None:
    wanted = open_folder(noise).generate("<user>Hello<assistant>", Sampling(12, 0.0))
    messages: Any = [{"role": "user", "content": "Hello"}]
    answer = client.chat.completions.create(model="noise", messages=messages, max_tokens=12, temperature=0)
    assert answer.choices[0].message.content == wanted.text
    parts = client.chat.completions.create(
        model="noise", messages=messages, max_completion_tokens=12, temperature=0, stream=True
    )
    assert "".join(part.choices[0].delta.content or "" for part in parts) == wanted.text


@pytest.mark.parametrize("stream", [False, True])
def test_stop(client: openai.OpenAI, noise: Path, stream: bool) -> None:
    """The text ends before the first stop text, even if that spans several pieces."""
    whole = open_folder(noise).generate("stop", Sampling(40, 1.0, top_p=1.0, seed=3)).text
    stop = whole[20:23]
    wanted = whole[: whole.index(stop)]
    given: Any = {
        "model": "noise",
        "prompt": "stop",
        "max_tokens": 40,
        "temperature": 1,
        "seed": 3,
        "stop": [stop, "\0never"],
    }
    if stream:
        parts = list(client.completions.create(**given, stream=True))
        text, reason = "".join(part.choices[0].text for part in parts), parts[-1].choices[0].finish_reason
    else:
        answer = client.completions.create(**given)
        text, reason = answer.choices[0].text, answer.choices[0].finish_reason
    assert (text, reason) == (wanted, "stop")


def test_models_and_health(client: openai.OpenAI, endpoint: str) -> None:
    assert [model.id for model in client.models.list()] == ["noise"]
    assert client.models.retrieve("noise").id == "noise"
    with urllib.request.urlopen(f"{endpoint}/health", timeout=PATIENCE_S) as answer:
        assert json.load(answer) == {"status": "ok", "running": 0, "waiting": 0, "limit": LIMIT}


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({"model": "other"}, 404, "does not exist"),
        ({"model": "../../etc/passwd"}, 404, "does not exist"),
        ({"prompt": "x" * 600}, 400, "positions"),
        ({"prompt": ""}, 400, "empty"),
        ({"prompt": ["a", "b"]}, 400, "one prompt in each request"),
        ({"temperature": -1}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"n": 2}, 400, "n: not supported"),
        ({"n": 0}, 400, "n: not supported"),
        ({"logprobs": 1, "echo": True}, 400, "logprobs, echo: not supported"),
        ({"presence_penalty": 0.5, "suffix": "x"}, 400, "presence_penalty, suffix: not supported"),
        ({"extra_body": {"top_k": 5, "response_format": {"type": "json_object"}}}, 400, "top_k, response_format: not"),
        ({"stop": ["a", "b", "c", "d", "e"]}, 400, "stop takes at most 4 texts"),
        ({"stop": "z" * 1025}, 400, "of at most 1024 characters"),
        ({"stop": ["a", "z" * 1025]}, 400, "of at most 1024 characters"),
        ({"prompt": "x" * 6000}, 413, "5000 bytes"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_requests_are_refused(
    client: openai.OpenAI, change: dict[str, Any], status: int, words: str, stream: bool
) -> None:
    given: Any = {"model": "noise", "prompt": "x", "max_tokens": 2, "stream": stream, **change}
    with pytest.raises(openai.APIStatusError, match=words) as caught:
        client.completions.create(**given)
    assert caught.value.status_code == status


def test_fields_that_change_nothing_are_accepted(client: openai.OpenAI) -> None:
    """Clients send many of these fields by default."""
    given: Any = {"model": "noise", "prompt": "import", "max_tokens": 8, "temperature": 0}
    plain = client.completions.create(**given)
    neutral: dict[str, Any] = {"n": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "echo": False}
    more = {"tools": [], "response_format": {"type": "text"}, "top_k": -1, "repetition_penalty": 1.0, "metadata": {}}
    answer = client.completions.create(**given, **neutral, logprobs=None, user="me", extra_body=more)
    assert answer.choices[0].text == plain.choices[0].text


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{not json", "the body is not valid JSON: Expecting property name enclosed in double quotes, at character 1"),
        (b'{"model": "noise", "prompt": "x', "the body is not valid JSON: Unterminated string starting at"),
        (b"", "the body: Field required"),
        (b"[]", "the body: Input should be a valid dictionary"),
        (b'{"model": "noise"}', "prompt: Field required"),
        (b"\xff\xfe", "the body is not valid JSON: Expecting value, at character 0"),
        (b'{"model": "noise", "prompt": "a\\ud800"}', "character 1 of the prompt is an unpaired surrogate"),
    ],
    ids=["not-json", "truncated", "empty", "list", "no-prompt", "not-text", "half-a-character"],
)
def test_bad_bodies_are_refused(endpoint: str, body: bytes, words: str) -> None:
    request = urllib.request.Request(
        f"{endpoint}/v1/completions", data=body, headers={"Content-Type": "application/json"}
    )
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=PATIENCE_S)
    with caught.value as error:
        assert error.code == 400
        told = json.load(error)["error"]
        assert told["type"] == "invalid_request_error"
        assert words in told["message"]
        assert "\n" not in told["message"]


def test_a_large_body_without_a_length_is_refused(endpoint: str) -> None:
    """A chunked body has no Content-Length; the endpoint counts its bytes and keeps running."""
    place, _, port = endpoint.removeprefix("http://").rpartition(":")
    with socket.create_connection((place, int(port)), timeout=PATIENCE_S) as stream:
        stream.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        stream.sendall(b"1770\r\n" + b"x" * 6000 + b"\r\n0\r\n\r\n")
        assert b" 413 " in stream.recv(4096).split(b"\r\n")[0]
    with urllib.request.urlopen(f"{endpoint}/health", timeout=PATIENCE_S) as answer:
        assert answer.status == 200


def test_paths_in_a_model_name_are_not_followed(endpoint: str) -> None:
    for path in ("models/../../etc/passwd", "models/..%2f..%2fetc", "models/%2e%2e"):
        with pytest.raises(urllib.error.HTTPError) as caught, urllib.request.urlopen(f"{endpoint}/v1/{path}"):
            pytest.fail("it was found")
        with caught.value as error:
            assert error.code == 404
            assert json.load(error)["error"]["type"] == "invalid_request_error"


def test_messages_that_the_template_rejects(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "boom"}]
    with pytest.raises(openai.BadRequestError, match="no booms"):
        client.chat.completions.create(model="noise", messages=messages, max_tokens=2)


def test_a_hundred_streams(noise: Path) -> None:
    """With room for 16, the others are refused with 429 and Retry-After while the worker is suspended."""
    model = open_folder(noise)
    wanted = [model.generate(f"n{i}", Sampling(32, 0.0)).text for i in range(4)]
    with running(noise, "--concurrency", LIMIT) as server, ThreadPoolExecutor(100) as pool:
        client = openai.OpenAI(base_url=f"http://{server.http}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S)

        def one(index: int) -> str:
            try:
                parts = client.completions.create(
                    model="noise", prompt=f"n{index % 4}", max_tokens=32, temperature=0, stream=True
                )
                text = "".join(part.choices[0].text for part in parts)
            except openai.RateLimitError as error:
                spread = 500 <= int(error.response.headers["Retry-After-Ms"]) <= 1500
                return "429" if error.response.headers["Retry-After"] == "1" and spread else "no Retry-After"
            return "right" if text == wanted[index % 4] else f"wrong: {text!r}"

        started = psutil.Process(server.pid).children()
        (worker,) = (one for one in started if "ibnorm_export.serving.text.worker" in one.cmdline())
        worker.suspend()
        answers = [pool.submit(one, index) for index in range(100)]
        refused = list(itertools.islice(as_completed(answers, timeout=PATIENCE_S), 100 - LIMIT))
        worker.resume()
        assert {answer.result() for answer in refused} == {"429"}
        assert [answer.result() for answer in answers if answer not in refused] == ["right"] * LIMIT
        assert one(0) == "right"


def test_a_client_that_disconnects_cancels_its_text(client: openai.OpenAI, endpoint: str) -> None:
    parts = client.completions.create(model="noise", prompt="long", max_tokens=500, temperature=1, stream=True)
    next(iter(parts))
    parts.close()
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        with urllib.request.urlopen(f"{endpoint}/health", timeout=PATIENCE_S) as answer:
            if json.load(answer)["running"] == 0:
                return
        time.sleep(0.05)
    pytest.fail("the text was not cancelled")


def test_sigterm_lets_a_text_finish(noise: Path) -> None:
    whole = open_folder(noise).generate("import", Sampling(500, 0.0))
    assert len(whole.tokens) == 500  # no end token stops it early, so it takes a while
    with running(noise, "--finish-seconds", PATIENCE_S) as server:
        assert {c.laddr.ip for c in psutil.Process(server.pid).net_connections("tcp")} == {"127.0.0.1"}
        client = openai.OpenAI(base_url=f"http://{server.http}/v1", api_key="none", max_retries=0)
        given: Any = {"model": "noise", "prompt": "import", "max_tokens": 500, "temperature": 0, "stream": True}
        streams = [client.completions.create(**given) for _ in range(8)]  # several, so that they take a while
        texts = [next(iter(stream)).choices[0].text for stream in streams]
        server.process.send_signal(signal.SIGTERM)
        for text, stream in zip(texts, streams, strict=True):
            assert text + "".join(part.choices[0].text for part in stream) == whole.text
        assert server.process.wait(PATIENCE_S) == 0
        with pytest.raises(openai.APIConnectionError):
            client.completions.create(model="noise", prompt="end", max_tokens=2)


def test_port_in_use(noise: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = subprocess.run(command("serve", noise, "--http-port", port), capture_output=True, text=True)
    assert done.returncode == 2
    assert f"127.0.0.1:{port}: Address already in use; choose another port with --http-port" in done.stderr


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_out_of_range(noise: Path, port: int) -> None:
    done = subprocess.run(command("serve", noise, "--http-port", port), capture_output=True, text=True)
    assert done.returncode == 2
    assert f"http_port is {port}; it must be 0 to 65535; 0 means any free port" in done.stderr


def test_the_endpoint_is_not_mistaken_for_a_triton_server(endpoint: str, exported_vit: ExportedModel) -> None:
    """Both listen on port 8000 by default, and a server that is not Triton may answer anything."""
    with pytest.raises(
        BackendUnavailable, match=r"no Triton server answers HTTP .* does not exist; this endpoint serves"
    ):
        TritonRunner(exported_vit, Endpoint(endpoint.removeprefix("http://")))


def test_paths_that_are_not_served() -> None:
    """The answer has OpenAI's form, and names the paths that exist; chat without a template does not."""
    app = create_app(TextQueue(lambda message: None, TextLimits()), "noise", max_positions=64)
    server = TestClient(app)
    for path, why in (("/v1/chat/completions", " (the tokenizer has no chat template)"), ("/v1/embeddings", "")):
        answer = server.post(path, json={"model": "noise"})
        assert answer.status_code == 404
        said = answer.json()["error"]["message"]
        served = "/health, /v1/models, /metrics, /v1/completions"
        assert said.startswith(f"{path} does not exist; this endpoint serves {served}")
        assert said.endswith(f"/v1/completions{why}")


def test_without_uvloop_and_httptools(noise: Path) -> None:
    """As on Windows, uvicorn falls back to asyncio and h11."""
    without = "import sys; sys.modules.update(uvloop=None, httptools=None); "
    start = [sys.executable, "-c", f"{without}from ibnorm_export.cli.__main__ import run; run()"]
    process = subprocess.Popen(
        [*start, "serve", str(noise), "--http-port=0", "--json"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        told = "".join(iter(process.stdout.readline, "}\n")) + "}"
        client = openai.OpenAI(base_url=f"http://{json.loads(told)['http']}/v1", api_key="none", max_retries=0)
        parts = client.completions.create(model="noise", prompt="import", max_tokens=8, temperature=0, stream=True)
        wanted = open_folder(noise).generate("import", Sampling(8, 0.0)).text
        assert "".join(part.choices[0].text for part in parts) == wanted
    finally:
        process.terminate()
        process.communicate(timeout=PATIENCE_S)


def test_time_limit(noise: Path) -> None:
    with running(noise, "--max-seconds", 0.005) as server:
        client = openai.OpenAI(base_url=f"http://{server.http}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.APIStatusError, match=r"more than 0\.005 s") as caught:
            client.completions.create(model="noise", prompt="import", max_tokens=500, temperature=0)
        assert caught.value.status_code == 504


def test_changed_library_is_not_loaded(noise: Path, tmp_path: Path) -> None:
    copy = tmp_path / "noise"
    shutil.copytree(noise, copy)
    with (copy / "libibnorm_ort.so").open("ab") as stream:
        stream.write(b"\0")
    with pytest.raises(ModelFileError, match=r"libibnorm_ort\.so was changed after packaging.*it is not loaded"):
        open_folder(copy)


def test_templates_run_in_a_sandbox() -> None:
    with pytest.raises(ModelFileError, match="rejects the messages"):
        ChatTemplate(TemplateSource("{{ ''.__class__.__mro__[1].__subclasses__() }}", {})).render(
            [{"role": "user", "content": "x"}]
        )
    with pytest.raises(ModelFileError, match="only users speak"):
        ChatTemplate(TemplateSource("{{ raise_exception('only users speak') }}", {})).render([])
    with pytest.raises(ModelFileError, match="damaged"):
        ChatTemplate(TemplateSource("{% for %}", {}))


def test_a_template_that_loops_stops_neither_the_endpoint_nor_its_end(noise: Path, tmp_path: Path) -> None:
    folder = tmp_path / "noise"
    shutil.copytree(noise, folder)
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    (folder / "chat_template.jinja").write_text(loops)
    body = json.dumps({"model": "noise", "messages": [{"role": "user", "content": "x"}]}).encode()

    def ask(server: Running) -> tuple[int, dict[str, Any]]:
        request = urllib.request.Request(
            f"http://{server.http}/v1/chat/completions", body, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)
        except OSError:  # the endpoint has ended
            return 0, {}

    with running(folder) as server, ThreadPoolExecutor(4) as pool:
        asked = pool.submit(ask, server)
        slowest = 0.0
        while not asked.done():
            begin = time.monotonic()
            with urllib.request.urlopen(f"http://{server.http}/health", timeout=PATIENCE_S) as answer:
                assert answer.status == 200
            slowest = max(slowest, time.monotonic() - begin)
        status, error = asked.result()
        assert status == 400
        assert "the chat template exceeds 1 s of processor time" in error["error"]["message"]
        assert slowest < 5.0  # on a busy machine; the template alone would take hours
        for _ in range(3):
            pool.submit(ask, server)
        time.sleep(0.2)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(PATIENCE_S) == 0
