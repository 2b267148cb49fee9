"""What a hostile client, page or chat template can do to the text endpoint: get an error, and nothing else."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import uvicorn

from ibnorm_export.errors import ModelFileError, PromptError
from ibnorm_export.serving.text.admission import TextQueue
from ibnorm_export.serving.text.app import create_app
from ibnorm_export.serving.text.chat_template import TemplateSource, read_template
from ibnorm_export.serving.text.http_limits import HEAD_BYTES, URL_BYTES
from ibnorm_export.serving.text.httptools_protocol import limited_protocol
from ibnorm_export.serving.text.middleware import HostMiddleware
from ibnorm_export.serving.text.template_process import TemplateProcess
from ibnorm_export.serving.text_limits import TextLimits

LIMITS = TextLimits(request_bytes=100_000)

#: A request without a body, before its trailers.
CHUNKED = (
    b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    b"transfer-encoding: chunked\r\n\r\n0\r\n"
)

MESSAGES = [{"role": "user", "content": "hello"}]


class Rejecting:
    """A template that rejects every message with characters that UTF-8 lacks."""

    async def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        raise PromptError("no \ud800 " + "x" * 100_000)


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """The endpoint without a model, on a free port."""
    queue = TextQueue(lambda message: None, LIMITS)
    app = HostMiddleware(create_app(queue, "m", max_positions=8, template=Rejecting()), ("named.example",))
    config = uvicorn.Config(app, http=limited_protocol(LIMITS.request_bytes), ws="none", lifespan="off", port=0)
    server = uvicorn.Server(config)
    with socket.socket() as stream:
        stream.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, args=([stream],))
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield stream.getsockname()[1]
        server.should_exit = True
        thread.join()


def exchange(port: int, *parts: bytes) -> tuple[int, Any]:
    """Send bytes, and return the status and the JSON of the answer."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as stream:
        try:
            for part in parts:
                stream.sendall(part)
        except ConnectionError:  # refused while it was still sending
            pass
        answer = b""
        while part := stream.recv(1 << 16):
            answer += part
            head, _, body = answer.partition(b"\r\n\r\n")
            if b"content-length: " + str(len(body)).encode() in head.lower():
                break
    return int(answer.split()[1]), json.loads(answer.partition(b"\r\n\r\n")[2])


def get(port: int, *, path: str = "/health", host: str | None = "localhost", headers: str = "") -> tuple[int, Any]:
    line = "" if host is None else f"host: {host}\r\n"
    return exchange(port, f"GET {path} HTTP/1.1\r\n{line}{headers}\r\n".encode())


def test_usual_requests_are_answered(port: int) -> None:
    assert get(port)[0] == 200
    assert get(port, headers=f"x: {'y' * (HEAD_BYTES - 1000)}\r\n")[0] == 200
    assert get(port, path="/" + "x" * (URL_BYTES - 1))[0] == 404
    body = b'{"model": "m", "messages": []}'
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n"
    assert exchange(port, f"{head}content-type: application/json\r\n\r\n".encode(), body)[0] == 400


@pytest.mark.parametrize(
    ("parts", "status"),
    [
        ([b"GET /" + b"x" * 10_000_000 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n"], 414),
        ([b"GET / HTTP/1.1\r\nhost: localhost\r\nx: " + b"y" * 10_000_000], 431),
        ([b"GET / HTTP/1.1\r\nhost: localhost\r\n", *[b"x: y\r\n" * 10_000] * 100], 431),
        ([b"GET / HTTP/1.1\r\n" + b"x" * 10_000_000], 431),
        ([CHUNKED + b"x: " + b"y" * 3_000_000], 413),
        ([CHUNKED + b"x: y\r\n" * 99_999], 431),
        ([b"this is not HTTP\r\n\r\n"], 400),
        ([b"GET / HTTP/9.9\r\n\r\n"], 400),
    ],
)
def test_too_much_is_refused_while_others_are_served(port: int, parts: list[bytes], status: int) -> None:
    before = psutil.Process().memory_info().rss
    found, answer = exchange(port, *parts)
    assert found == status, answer
    assert answer["error"]["type"] == "invalid_request_error"
    assert psutil.Process().memory_info().rss - before < 60_000_000
    begin = time.monotonic()
    assert get(port)[0] == 200
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:80", "127.0.0.1", "127.8.9.1:1", "[::1]", "[::1]:80", "named.example"]
)
def test_hosts_that_are_served(port: int, host: str) -> None:
    assert get(port, host=host)[0] == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "10.0.0.1", "", None]
)
def test_other_hosts_are_refused(port: int, host: str | None) -> None:
    status, answer = get(port, host=host)
    assert status == 421
    assert "--allowed-host" in answer["error"]["message"]


def test_two_hosts_are_refused(port: int) -> None:
    assert get(port, headers="host: evil.example\r\n")[0] in (400, 421)


def test_a_rejected_message_is_an_error_in_json(port: int) -> None:
    body = json.dumps({"model": "m", "messages": MESSAGES}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n"
    status, answer = exchange(port, f"{head}content-type: application/json\r\n\r\n".encode(), body)
    assert status == 400
    assert answer["error"]["message"].startswith(r"no \ud800 xxx")
    assert len(answer["error"]["message"]) < 2100


LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
BOMB = (
    "{% set ns = namespace(s='x' * 1000) %}{% for a in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}"
)


async def rendered(*texts: str) -> list[str]:
    """What each template gives for the same messages, or its error; one process for each."""
    found = []
    for text in texts:
        process = TemplateProcess(TemplateSource(text, {"bos_token": "<s>"}))
        try:
            await process.start()
            found.append(await process.render(MESSAGES))
        except (PromptError, ModelFileError) as error:
            found.append(f"{type(error).__name__}: {error}")
        finally:
            await process.stop()
    return found


def test_templates_and_their_errors() -> None:
    good = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m['content'] }}{% endfor %}"
    texts = (
        good,
        LOOPS,
        BOMB,
        "{{ 1 // 0 }}",
        "{{ messages[0] + 1 }}",
        "{{ raise_exception('no') }}",
        "{{ 'x' * 5000000 }}",
    )
    found = asyncio.run(rendered(*texts, "{% for %}", "{{ 7 ** 40000000 }}", "{{" + "(" * 5000))
    assert found[0] == "<s><user>hello"
    for answer, words in zip(
        found[1:],
        (
            "PromptError: the chat template exceeds 1 s of processor time",
            "PromptError: the chat template rejects the messages: it needs too much memory",
            "PromptError: the chat template rejects the messages: ZeroDivisionError",
            "PromptError: the chat template rejects the messages: TypeError",
            "PromptError: the chat template rejects the messages: no",
            "PromptError: the prompt of the chat template has 5000000 characters",
            "ModelFileError: the chat template of the tokenizer is damaged",
            "ModelFileError: the chat template exceeds 1 s of processor time",
            "ModelFileError: the chat template of the tokenizer is damaged",
        ),
        strict=True,
    ):
        assert answer.startswith(words)
        assert len(answer) < 500


def test_a_template_that_loops_neither_stops_the_endpoint_nor_the_next_message() -> None:
    text = "{% if messages[0].content == 'loop' %}" + LOOPS + "{% endif %}done"

    async def both() -> tuple[BaseException | str, str, int]:
        process = TemplateProcess(TemplateSource(text, {}))
        await process.start()
        turns = 0
        looping = asyncio.ensure_future(process.render([{"role": "user", "content": "loop"}]))
        waiting = asyncio.ensure_future(process.render(MESSAGES))
        while not looping.done():
            await asyncio.sleep(0.01)
            turns += 1
        found = (await asyncio.gather(looping, return_exceptions=True))[0], await waiting, turns
        # one that is cancelled, as by SIGTERM or a client that disconnects, ends at once
        endless = asyncio.ensure_future(process.render([{"role": "user", "content": "loop"}]))
        await asyncio.sleep(0.1)
        endless.cancel()
        begin = time.monotonic()
        await asyncio.gather(endless, return_exceptions=True)
        assert time.monotonic() - begin < 0.9
        assert await process.render(MESSAGES) == "done"
        await process.stop()
        return found

    error, answer, turns = asyncio.run(both())
    assert isinstance(error, PromptError)
    assert answer == "done"
    assert turns > 20


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chat_template.jinja", b"\xff\xfe"),
        ("tokenizer_config.json", b"[" * 100_000),
        ("tokenizer_config.json", b"{"),
    ],
)
def test_a_damaged_template_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelFileError, match=f"{name} cannot be read"):
        read_template(tmp_path)


@pytest.mark.parametrize("content", ["[]", "{}", '{"chat_template": [{"name": "default", "template": "x"}]}'])
def test_a_folder_without_a_template(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(content)
    assert read_template(tmp_path) is None
