"""Bars of the text endpoint, by clients in this process; `serving.py` runs them."""

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
from scipy.stats import binom

from benchmarks.publish import Row
from benchmarks.suites.refusing import refusing
from ibnorm_export.benchmark.options import Timing
from ibnorm_export.generation.sampling import Sampling
from ibnorm_export.generation.sessions import open_sessions
from ibnorm_export.generation.text_model import TextModel, open_folder
from tests.support.running_server import Running, running

__all__ = ["text"]

PROMPT = "The import statement"
#: Tokens of a text: as many as the small model has positions for, a short one, and one that is there for its first.
LONG, SHORT, FEW = 480, 128, 8
#: Texts at once, and of them without a first token, where that is limited.
LIMIT, WAITING = 16, 1
#: Where one text in a hundred is let in: as many for a median.
BURSTS = 25


@dataclass(frozen=True)
class Stream:
    """One text, as a client saw it: status, text, seconds to its first piece and in all, and refusals before it."""

    status: int
    text: str = ""
    first_s: float = 0.0
    whole_s: float = 0.0
    refusals: int = 0


async def stream(endpoint: str, tokens: int, again: bool = False) -> Stream:
    """A text over a bare socket, so that a hundred clients cost this machine little; `again` obeys Retry-After."""
    host, _, port = endpoint.rpartition(":")
    wanted = {"model": "text", "prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "stream": True}
    body = json.dumps(wanted).encode()
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
        if status != 429 or not again:
            return Stream(status, text, first, time.perf_counter() - began, refusals)
        await asyncio.sleep(int(headers["retry-after-ms"]) / 1e3)
    raise AssertionError  # the loop above has no end


@dataclass(frozen=True)
class Burst:
    """Texts asked for in one instant: seconds in all, and to the first piece of those admitted, refusals, what was
    wrong."""

    whole_s: float
    firsts: list[float]
    refused: int
    others: list[str]


def burst(endpoint: str, name: str, count: int, tokens: int, wanted: str) -> Burst:
    """Bare sockets again, and every request is sent before an answer is read: 0.05 ms each, so that the time is the
    server's. Of asyncio's clients, all hundred connect before the first writes."""
    host, _, port = endpoint.rpartition(":")
    body = json.dumps({"model": name, "prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "stream": True})
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {endpoint}\r\nConnection: close\r\nContent-Type: application/json\r\n"
    )
    data = f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()
    began, first, told = [0.0] * count, [0.0] * count, [bytearray() for _ in range(count)]
    with selectors.DefaultSelector() as waiting:
        for index in range(count):
            began[index] = time.perf_counter()
            client = socket.create_connection((host, int(port)))
            client.sendall(data)
            waiting.register(client, selectors.EVENT_READ, index)
        while waiting.get_map():
            for key, _ in waiting.select():
                part = key.fileobj.recv(1 << 16)  # type: ignore[union-attr]  # a socket
                told[key.data] += part
                if not first[key.data] and b"data: {" in part:
                    first[key.data] = time.perf_counter() - began[key.data]
                if not part:
                    waiting.unregister(key.fileobj)
                    key.fileobj.close()  # type: ignore[union-attr]
    ended = time.perf_counter()
    status = [int(answer[9:12]) for answer in told]
    texts = [
        "".join(json.loads(part)["choices"][0]["text"] for part in re.findall(rb"data: (\{.*\})", answer))
        if code == 200
        else ""
        for code, answer in zip(status, told, strict=True)
    ]
    others = [f"{code} {text!r}" for code, text in zip(status, texts, strict=True) if code != 429 and text != wanted]
    return Burst(
        ended - began[0], [at for at, code in zip(first, status, strict=True) if code == 200], status.count(429), others
    )


def genai_alone(folder: Path, tokens: int) -> Callable[[], str]:
    """The loop of onnxruntime-genai's own examples, with its own tokenizer: nothing of this package."""
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


def interval(values: list[float]) -> tuple[float, float]:
    """In which the median lies with at least 95%: order statistics, whatever the distribution."""
    out = max(1, int(binom.ppf(0.025, len(values), 0.5)))
    ordered = sorted(values)
    return ordered[out - 1], ordered[-out]


def speed(server: Running, folder: Path, here: TextModel, turns: int, tokens: int) -> list[Row]:
    """Tokens per second of one stream, through the openai client and in this process by turns."""
    client = openai.OpenAI(base_url=f"http://{server.http}/v1", api_key="none", max_retries=0, timeout=120)
    wanted = here.generate(PROMPT, Sampling(tokens)).text

    def through() -> None:
        parts = client.completions.create(
            model=folder.name, prompt=PROMPT, max_tokens=tokens, temperature=0, stream=True
        )
        assert "".join(part.choices[0].text for part in parts) == wanted

    ways = {
        "through": through,
        "generate": lambda: here.generate(PROMPT, Sampling(tokens)),
        "alone": genai_alone(folder, tokens),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(turns + 1):
        for name, way in ways.items():
            time.sleep(Timing().rest_ms / 1e3)  # until the threads of the previous candidate stop spinning
            began = time.perf_counter()
            way()
            if turn:  # the first of each is slower
                seconds[name].append(time.perf_counter() - began)
    rows = []
    for name, inside in (
        ("alone", "in-process GenAI alone: generate_next_token and its TokenizerStream"),
        ("generate", "`generate` in-process, this package's loop over GenAI"),
    ):
        ratios = [one / other for one, other in zip(seconds[name], seconds["through"], strict=True)]
        per_token = {way: statistics.median(taken) / tokens * 1e3 for way, taken in seconds.items()}
        low, high = interval(ratios)
        note = (
            f"{tokens} tokens, greedy; median of {len(ratios)} turns, with 95% in {low:.3f} to {high:.3f}; "
            f"{per_token['through']:.3f} ms a token over {per_token[name]:.3f}"
        )
        what = f"tokens per second of one stream of {folder.name}, endpoint over {inside}"
        rows.append(Row(what, round(statistics.median(ratios), 3), 0.95, False, note))
    return rows


def hundreds(server: Running, folder: Path, here: TextModel, tokens: int, times: int) -> tuple[float, list[Burst]]:
    """Milliseconds to one stream's first token, and a hundred clients in one instant, so many times."""
    wanted = here.generate(PROMPT, Sampling(tokens)).text
    alone = statistics.median([burst(server.http, folder.name, 1, tokens, wanted).firsts[0] for _ in range(21)]) * 1e3
    return alone, [burst(server.http, folder.name, 100, tokens, wanted) for _ in range(times)]


def bursts(server: Running, folder: Path, here: TextModel, tokens: int) -> list[Row]:
    """First tokens in a burst; beside it what half of the prompts alone take."""
    alone, told = hundreds(server, folder, here, tokens, 5)
    medians = [statistics.median(one.firsts) * 1e3 for one in told]
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
        Row(
            f"{folder.name}: 100 streams at once, limit {LIMIT}, five times: neither right nor 429",
            sum(len(one.others) for one in told),
            0,
            True,
            f"{sum(len(one.firsts) for one in told)} right, {sum(one.refused for one in told)} refused with 429",
        ),
        Row(
            f"{folder.name}: first token of those admitted in the burst itself over one stream's, median",
            round(statistics.median(medians) / alone, 2),
            2.0,
            True,
            f"alone {alone:.1f} ms; medians of five bursts {min(medians):.0f} to {max(medians):.0f} ms. Of the "
            f"prompts alone, in this process, one takes {one:.1f} ms and {half} in one batch {together:.1f} ms: half "
            f"of those admitted wait {least:.0f} ms or more, {least / alone:.1f} times one stream",
        ),
    ]


def few_waiting(server: Running, folder: Path, here: TextModel, tokens: int) -> list[Row]:
    """The same burst at an endpoint that lets `WAITING` texts wait for their first token."""
    alone, told = hundreds(server, folder, here, tokens, BURSTS)
    with refusing() as endpoint:
        refused = [burst(endpoint, folder.name, 100, tokens, "") for _ in range(21)]
    assert all(one.refused == 100 for one in refused)
    reading = statistics.median([one.whole_s for one in refused[1:]]) * 1e3
    firsts = [first * 1e3 for one in told for first in one.firsts]
    return [
        Row(
            f"{folder.name}: 100 streams at once, --max-waiting {WAITING}, {BURSTS} times: neither right nor 429",
            sum(len(one.others) for one in told),
            0,
            True,
            f"{len(firsts)} right, {sum(one.refused for one in told)} refused with 429",
        ),
        Row(
            f"{folder.name}: first token of those admitted, --max-waiting {WAITING}, over one stream's, median",
            round(statistics.median(firsts) / alone, 2),
            2.0,
            True,
            f"alone {alone:.1f} ms; of {len(firsts)} in {BURSTS} bursts {min(firsts):.0f} to {max(firsts):.0f} ms; to "
            f"refuse a hundred, and do nothing else, uvicorn needs {reading:.1f} ms, {reading / alone:.1f} times one "
            "stream's first token",
        ),
    ]


async def again(server: Running, wanted: str) -> list[Row]:
    """A hundred clients of which each tries again until it has its text."""
    alone = statistics.median([(await stream(server.http, SHORT)).first_s for _ in range(21)])
    admitted = await asyncio.gather(*(stream(server.http, SHORT, again=True) for _ in range(100)))
    wrong = sum(one.text != wanted for one in admitted)
    firsts = sorted(one.first_s for one in admitted)
    later = statistics.median(one.first_s for one in admitted if one.refusals)
    return [
        Row(
            "100 streams, each trying again when refused until it has its text: wrong",
            wrong,
            0,
            True,
            f"{sum(one.refusals for one in admitted)} refusals on the way",
        ),
        Row(
            "first token of all 100 over one stream's, from the request that was admitted, not the first try, median",
            round(statistics.median(firsts) / alone, 2),
            2.0,
            True,
            f"alone {alone * 1e3:.1f} ms; {statistics.median(firsts) * 1e3:.1f} ms, nine in ten "
            f"{firsts[89] * 1e3:.1f} ms; those who came again {later * 1e3:.1f} ms",
        ),
    ]


def text(folder: Path, scratch: Path) -> list[Row]:
    """The text endpoint, with both models: speed of one stream, then a hundred clients against a limit of 16."""
    rows = []
    for name, turns, tokens, short in (("text-60m", 20, SHORT, FEW), ("text", 75, LONG, SHORT)):
        here = open_folder(folder / name)
        with running(folder / name, "--concurrency", LIMIT) as server:
            rows += speed(server, folder / name, here, turns, tokens)
            rows += bursts(server, folder / name, here, short)
            if name == "text":
                rows += asyncio.run(again(server, here.generate(PROMPT, Sampling(SHORT)).text))
        with running(folder / name, "--concurrency", LIMIT, "--max-waiting", WAITING) as server:
            rows += few_waiting(server, folder / name, here, short)
    return rows
