"""The text endpoint, called by clients in this process; the suite `serving` runs it."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import selectors
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime_genai as genai
import openai

from benchmarks.rows import Row, Target, limited
from benchmarks.suites.refusing import refusing
from benchmarks.turns import compare, ms, take_turns, timed
from ibnorm_export.generation.sampling import Sampling
from ibnorm_export.generation.sessions import open_sessions
from ibnorm_export.generation.text_model import TextModel, open_folder
from tests.support.running_server import Running, running

__all__ = ["text"]

PROMPT = "The import statement"
#: Tokens of a text: all positions of the small model, a short text, and one of which only the first token matters.
LONG, SHORT, FEW = 480, 128, 8
#: Texts at once, and those of them that may wait for their first token if that is limited.
LIMIT, WAITING = 16, 1
#: Bursts where one text in a hundred is admitted, so that a median has enough values.
BURSTS = 25


@dataclass(frozen=True)
class Stream:
    """One text as a client saw it: status, text, seconds to its first piece and to its end, and refusals before it."""

    status: int
    text: str = ""
    first_s: float = 0.0
    whole_s: float = 0.0
    refusals: int = 0


async def stream(endpoint: str, tokens: int, *, retry: bool = False) -> Stream:
    """Ask for a text over a bare socket, which costs this machine little; `retry` obeys Retry-After."""
    host, _, port = endpoint.rpartition(":")
    request = {"model": "text", "prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "stream": True}
    body = json.dumps(request).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {endpoint}\r\nConnection: close\r\nContent-Type: application/json\r\n"
    )
    for refusals in itertools.count():
        began, first, text = time.perf_counter(), 0.0, ""
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        status = int((await reader.readline()).split()[1])
        headers = {}
        while line := (await reader.readline()).strip():
            name, _, value = line.decode().partition(": ")
            headers[name.lower()] = value
        while line := await reader.readline():
            if line.startswith(b"data: {"):
                first = first or time.perf_counter() - began
                text += json.loads(line[6:])["choices"][0]["text"]
        writer.close()
        if status != 429 or not retry:
            return Stream(status, text, first, time.perf_counter() - began, refusals)
        await asyncio.sleep(int(headers["retry-after-ms"]) / 1e3)
    raise AssertionError  # the loop above has no end


@dataclass(frozen=True)
class Burst:
    """Texts requested at the same moment.

    Args:
        whole_s: seconds until all have ended.
        firsts: seconds to the first piece of each admitted text.
        refused: number of answers with status 429.
        others: descriptions of answers that are neither right nor refused.
    """

    whole_s: float
    firsts: list[float]
    refused: int
    others: list[str]


def burst(endpoint: str, name: str, *, count: int, tokens: int, expected: str) -> Burst:
    """Ask for `count` texts at once over bare sockets.

    Every request is sent before an answer is read. Sending takes 0.05 ms each, so the measured time is the server's.
    """
    host, _, port = endpoint.rpartition(":")
    body = json.dumps({"model": name, "prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "stream": True})
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {endpoint}\r\nConnection: close\r\nContent-Type: application/json\r\n"
    )
    data = f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()
    began, first = [0.0] * count, [0.0] * count
    answers = [bytearray() for _ in range(count)]
    with selectors.DefaultSelector() as waiting:
        for index in range(count):
            began[index] = time.perf_counter()
            client = socket.create_connection((host, int(port)))
            client.sendall(data)
            waiting.register(client, selectors.EVENT_READ, index)
        while waiting.get_map():
            for key, _ in waiting.select():
                part = key.fileobj.recv(1 << 16)  # type: ignore[union-attr]  # a socket
                answers[key.data] += part
                if not first[key.data] and b"data: {" in part:
                    first[key.data] = time.perf_counter() - began[key.data]
                if not part:
                    waiting.unregister(key.fileobj)
                    key.fileobj.close()  # type: ignore[union-attr]
    ended = time.perf_counter()
    status = [int(answer[9:12]) for answer in answers]
    texts = [
        "".join(json.loads(part)["choices"][0]["text"] for part in re.findall(rb"data: (\{.*\})", answer))
        if code == 200
        else ""
        for code, answer in zip(status, answers, strict=True)
    ]
    others = [f"{code} {text!r}" for code, text in zip(status, texts, strict=True) if code != 429 and text != expected]
    return Burst(
        ended - began[0], [at for at, code in zip(first, status, strict=True) if code == 200], status.count(429), others
    )


def genai_only(folder: Path, tokens: int) -> Callable[[], str]:
    """The loop of onnxruntime-genai's own examples with its own tokenizer, without this package."""
    model = genai.Model(str(folder))
    tokenizer = genai.Tokenizer(model)
    prompt = tokenizer.encode(PROMPT)

    def write() -> str:
        params = genai.GeneratorParams(model)
        params.set_search_options(do_sample=False, max_length=len(prompt) + tokens)
        generator, stream, text = genai.Generator(model, params), tokenizer.create_stream(), ""
        generator.append_tokens(prompt)
        for _ in range(tokens):
            generator.generate_next_token()
            text += stream.decode(generator.get_next_tokens()[0])
        return text

    return write


def speed(server: Running, folder: Path, *, in_process: TextModel, turns: int, tokens: int) -> list[Row]:
    """Tokens per second of one stream, through the openai client and in this process in turns."""
    client = openai.OpenAI(base_url=f"http://{server.http}/v1", api_key="none", max_retries=0, timeout=120)
    expected = in_process.generate(PROMPT, Sampling(tokens)).text

    def through() -> None:
        parts = client.completions.create(
            model=folder.name, prompt=PROMPT, max_tokens=tokens, temperature=0, stream=True
        )
        assert "".join(part.choices[0].text for part in parts) == expected

    candidates = {
        "endpoint": timed(through),
        "generate": timed(lambda: in_process.generate(PROMPT, Sampling(tokens))),
        "GenAI": timed(genai_only(folder, tokens)),
    }
    times = take_turns(candidates, rounds=turns, warmup=1)
    rows = []
    for name, text in (
        ("GenAI", "GenAI in this process: generate_next_token and its TokenizerStream"),
        ("generate", "`generate` in this process: this package's loop over GenAI"),
    ):
        figures = {**compare(times, name, over="endpoint"), "endpoint": ms(times, "endpoint"), name: ms(times, name)}
        row_name = f"{folder.name}: one stream, time of {text}, over the time through the endpoint"
        targets = (Target("time over baseline", 0.95, at_least=True),)
        rows.append(Row(row_name, figures, targets=targets, note=f"{tokens} tokens, greedy"))
    return rows


def measure_bursts(
    server: Running, folder: Path, *, in_process: TextModel, tokens: int, times: int
) -> tuple[float, list[Burst]]:
    """Milliseconds to the first token of one stream, and `times` bursts of a hundred clients."""
    expected = in_process.generate(PROMPT, Sampling(tokens)).text
    single = (
        statistics.median(
            [burst(server.http, folder.name, count=1, tokens=tokens, expected=expected).firsts[0] for _ in range(21)]
        )
        * 1e3
    )
    return single, [burst(server.http, folder.name, count=100, tokens=tokens, expected=expected) for _ in range(times)]


def bursts(server: Running, folder: Path, *, in_process: TextModel, tokens: int) -> list[Row]:
    """First tokens in a burst, and what the prompts of half of the admitted texts take by themselves."""
    single, results = measure_bursts(server, folder, in_process=in_process, tokens=tokens, times=5)
    medians = [statistics.median(one.firsts) * 1e3 for one in results]
    source, prompt = open_sessions(folder), np.frombuffer(PROMPT.encode(), np.uint8).astype(np.int64)[None]

    def prompts(rows: int) -> float:
        began = time.perf_counter()
        source.start(rows, prompt.shape[1] + tokens).feed(np.tile(prompt, (rows, 1)))
        return time.perf_counter() - began

    prompts(1)  # the first is slower
    half = LIMIT // 2
    one, together = (statistics.median([prompts(rows) for _ in range(11)]) * 1e3 for rows in (1, half))
    least = min(half * one, together)
    return [
        limited(
            f"{folder.name}: 100 streams at once, limit {LIMIT}, five times: neither right nor refused",
            sum(len(one.others) for one in results),
            at_most=0,
            note=f"{sum(len(one.firsts) for one in results)} right, "
            f"{sum(one.refused for one in results)} refused with 429",
        ),
        limited(
            f"{folder.name}: median first token of texts admitted in the burst, over one stream's",
            round(statistics.median(medians) / single, 2),
            at_most=2.0,
            note=f"one stream {single:.1f} ms; medians of five bursts {min(medians):.0f} to {max(medians):.0f} ms. In "
            f"this process one prompt takes {one:.1f} ms and {half} in one batch take {together:.1f} ms, so half "
            f"of the admitted texts wait {least:.0f} ms or more, {least / single:.1f} times one stream",
        ),
    ]


def few_waiting(server: Running, folder: Path, *, in_process: TextModel, tokens: int) -> list[Row]:
    """The same burst, at an endpoint where only `WAITING` texts may wait for their first token."""
    single, results = measure_bursts(server, folder, in_process=in_process, tokens=tokens, times=BURSTS)
    with refusing() as endpoint:
        refused = [burst(endpoint, folder.name, count=100, tokens=tokens, expected="") for _ in range(21)]
    assert all(one.refused == 100 for one in refused)
    reading = statistics.median([one.whole_s for one in refused[1:]]) * 1e3
    firsts = [first * 1e3 for one in results for first in one.firsts]
    return [
        limited(
            f"{folder.name}: 100 streams at once, --max-waiting {WAITING}, {BURSTS} times: neither right nor refused",
            sum(len(one.others) for one in results),
            at_most=0,
            note=f"{len(firsts)} right, {sum(one.refused for one in results)} refused with 429",
        ),
        limited(
            f"{folder.name}: median first token of admitted texts, --max-waiting {WAITING}, over one stream's",
            round(statistics.median(firsts) / single, 2),
            at_most=2.0,
            note=f"one stream {single:.1f} ms; {len(firsts)} texts in {BURSTS} bursts {min(firsts):.0f} to "
            f"{max(firsts):.0f} ms; uvicorn needs {reading:.1f} ms to refuse a hundred, {reading / single:.1f} "
            "times one stream's first token",
        ),
    ]


async def retrying_clients(server: Running, expected: str) -> list[Row]:
    """A hundred clients, each of which tries again until it has its text."""
    single = statistics.median([(await stream(server.http, SHORT)).first_s for _ in range(21)])
    admitted = await asyncio.gather(*(stream(server.http, SHORT, retry=True) for _ in range(100)))
    wrong = sum(one.text != expected for one in admitted)
    firsts = sorted(one.first_s for one in admitted)
    later = statistics.median(one.first_s for one in admitted if one.refusals)
    return [
        limited(
            "100 streams, each trying again when refused until it has its text: wrong",
            wrong,
            at_most=0,
            note=f"{sum(one.refusals for one in admitted)} refusals on the way",
        ),
        limited(
            "median first token of all 100, from the request that was admitted, over one stream's",
            round(statistics.median(firsts) / single, 2),
            at_most=2.0,
            note=f"one stream {single * 1e3:.1f} ms; {statistics.median(firsts) * 1e3:.1f} ms, nine in ten "
            f"{firsts[89] * 1e3:.1f} ms; after a refusal {later * 1e3:.1f} ms",
        ),
    ]


def text(folder: Path, scratch: Path) -> list[Row]:
    """The text endpoint, with both models: speed of one stream, then a hundred clients against a limit of 16."""
    rows = []
    for name, turns, tokens, short in (("text-60m", 20, SHORT, FEW), ("text", 75, LONG, SHORT)):
        in_process = open_folder(folder / name)
        with running(folder / name, "--concurrency", LIMIT) as server:
            rows += speed(server, folder / name, in_process=in_process, turns=turns, tokens=tokens)
            rows += bursts(server, folder / name, in_process=in_process, tokens=short)
            if name == "text":
                rows += asyncio.run(retrying_clients(server, in_process.generate(PROMPT, Sampling(SHORT)).text))
        with running(folder / name, "--concurrency", LIMIT, "--max-waiting", WAITING) as server:
            rows += few_waiting(server, folder / name, in_process=in_process, tokens=short)
    return rows
