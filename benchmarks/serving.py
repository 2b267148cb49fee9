"""The bars of serving: a real Triton on packaged models, and the text endpoint, by clients in this process.

    python benchmarks/serving.py --models build/serving-models --prepare     # export, minutes, no timing
    python benchmarks/serving.py --models build/serving-models --record benchmarks/results/serving.json

Models: a ViT and a LLaMA of the demo's shapes, and for text LLaMA-60M with its vocabulary of 32000 too; random weights.
Clients and servers share the machine's cores, so the times are those of both together. Without a tritonserver on PATH,
Triton runs the models through this package's Python backend over the same ONNX Runtime: byte parity then checks the
plumbing, not another runtime.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import re
import selectors
import signal
import socket
import statistics
import string
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as genai
import openai
from geventhttpclient.response import HTTPConnectionClosed
from scipy.stats import binom
from tritonclient.utils import InferenceServerException

from ibnorm_export import IBNormSpec, models, native
from ibnorm_export.artifact import ExportedModel
from ibnorm_export.environment import environment
from ibnorm_export.export import ExportOptions, export
from ibnorm_export.genai_export import export_genai
from ibnorm_export.loaded import DType
from ibnorm_export.parity import BOUNDS
from ibnorm_export.runners.ort_runner import OrtRunner
from ibnorm_export.serving.repository import PackageOptions, Variant, package
from ibnorm_export.serving.triton_config import Limits
from ibnorm_export.serving.triton_server import find_triton
from ibnorm_export.sessions import open_sessions
from ibnorm_export.text import Sampling, TextModel, open_folder
from ibnorm_export.tokens import write_byte_tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from running_server import Running, members, running
from triton_clients import CLIENTS, REFUSED, ask, connect, draw

CONFIGS = {
    "llama": (
        {"model_type": "llama", "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4,
         "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 256, "max_position_embeddings": 512,
         "tie_word_embeddings": True},
        IBNormSpec("L", bias=False),
    ),
    "vit": (
        {"model_type": "vit", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
         "num_attention_heads": 4, "image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 10},
        IBNormSpec("T"),
    ),
}  # fmt: skip
PROMPT = "The import statement"
#: Tokens of a text: as many as the small model has positions for, a short one, and one that is there for its first.
LONG, SHORT, FEW = 480, 128, 8
#: Texts at once.
LIMIT = 16
#: No batching: then an answer has one right value, to the byte.
ALONE = Limits(max_batch=0)
#: Rows that were computed together may differ from those computed alone by another order of summation: each is within
#: the floor of `BOUNDS` of the truth, so they are within two of it of each other (norm-wise).
BATCHED = 2 * BOUNDS[DType.FP32].floor
#: `serve` gives requests in flight 5 s; a request that takes twice as long hangs.
HANGS_S = 10.0


@dataclass(frozen=True)
class Row:
    """One bar: true when it is met."""

    what: str
    value: float
    bar: float
    at_most: bool
    note: str

    def __bool__(self) -> bool:
        return self.value <= self.bar if self.at_most else self.value >= self.bar

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": "met" if self else "missed"}


def off(answer: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> float:
    """Norm-wise relative difference."""
    return float(np.linalg.norm(answer - wanted) / np.linalg.norm(wanted))


def give_words(folder: Path, vocabulary: int) -> None:
    """Make a tokenizer of bytes one of `vocabulary` tokens: the others are words, which no prompt is cut into."""
    file = folder / "tokenizer.json"
    made = json.loads(file.read_text(encoding="utf-8"))
    words = ("\u0120" + "".join(letters) for letters in itertools.product(string.ascii_lowercase, repeat=4))
    made["model"]["vocab"] |= {word: token for token, word in zip(range(256, vocabulary), words, strict=False)}
    file.write_text(json.dumps(made), encoding="utf-8")


def prepare(folder: Path) -> None:
    """Checkpoints, exported files in both types, and a folder for GenAI."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (config, spec) in CONFIGS.items():
        models.save(models.new_model(config, spec), folder / name)
        for dtype in (DType.FP32, DType.FP16):
            export(models.load(folder / name), folder / f"{name}-{dtype.value}.onnx", ExportOptions(dtype=dtype))
    models.save(models.new_model("llama-60m", IBNormSpec("L", bias=False)), folder / "llama-60m")
    for checkpoint, name in (("llama", "text"), ("llama-60m", "text-60m")):
        write_byte_tokenizer(folder / checkpoint)
        if name == "text-60m":
            give_words(folder / checkpoint, 32000)
        export_genai(models.load(folder / checkpoint, task="text-generation"), folder / name)


def parity(folder: Path, scratch: Path) -> list[Row]:
    """Answers that differ in any byte, one request at a time."""
    asked = different = 0
    for file in sorted(folder.glob("*.onnx")):
        model = ExportedModel(file)
        made = package(model, scratch / file.stem, PackageOptions(name="m", variant=Variant.BOTH, limits=ALONE))
        with running(made.path) as server:
            for there, library in (("m", native.ort_library()), ("m-portable", None)):
                here = OrtRunner(file, library=library)
                rng = np.random.default_rng(1)
                for module in CLIENTS:
                    with connect(server, module) as client:
                        for _ in range(20):
                            arrays = draw(model, rng, int(rng.integers(1, 9)), int(rng.integers(1, 65)))
                            wanted = here.run(arrays)["logits"].tobytes()
                            different += ask(client, module, there, arrays).tobytes() != wanted
                            asked += 1
    note = f"{asked} requests: ViT and LLaMA, fp32 and fp16, fused and portable, HTTP and gRPC"
    return [Row("parity: answers that differ from in-process in a byte", different, 0, True, note)]


def crowd(folder: Path, scratch: Path) -> list[Row]:
    """200 mixed requests at once: byte for byte; then with rows batched; then against a queue of 16."""
    model = ExportedModel(folder / "llama-fp32.onnx")
    here = OrtRunner(model.path, library=native.ort_library())
    rng = np.random.default_rng(2)
    work = [draw(model, rng, int(rng.integers(1, 9)), int(rng.integers(1, 65))) for _ in range(200)]
    wanted = [here.run(arrays)["logits"] for arrays in work]

    def one(server: Running, index: int, batched: bool) -> str:
        module = CLIENTS[index % 2]
        try:
            with connect(server, module) as client:
                answer = ask(client, module, "m", work[index])
        except InferenceServerException as error:
            return "refused" if error.status() == REFUSED[module] else f"failed: {error}"
        same = answer.tobytes() == wanted[index].tobytes()
        return "right" if same or (batched and off(answer, wanted[index]) <= BATCHED) else "wrong"

    rows = []
    for what, limits in (
        ("200 concurrent, HTTP and gRPC, mixed sizes: right to the byte", ALONE),
        (f"the same with dynamic batching: right to {BATCHED:g}", Limits()),
        ("overload, queue limit 16, 200 in flight: not clean", Limits(max_batch=0, max_queue=16)),
    ):
        made = package(
            model, scratch / f"crowd-{len(rows)}", PackageOptions(name="m", variant=Variant.FUSED, limits=limits)
        )
        batched = limits.max_batch > 0
        with running(made.path) as server, ThreadPoolExecutor(200) as pool:
            began = time.perf_counter()
            told = Counter(pool.map(lambda index, s=server, b=batched: one(s, index, b), range(200)))
            took = time.perf_counter() - began
            after = one(server, 0, batched)
        note = f"{dict(told)} in {took:.2f} s; a request after it: {after}"
        if limits.max_queue > 16:
            rows.append(Row(what, told["right"], 200, False, note))
        else:
            unclean = sum(told.values()) - told["right"] - told["refused"] + (after != "right") + (not told["refused"])
            rows.append(Row(what, unclean, 0, True, note))
    return rows


def ended(folder: Path, scratch: Path) -> list[Row]:
    """10,000 requests, SIGTERM in the middle."""
    model = ExportedModel(folder / "vit-fp32.onnx")
    arrays = draw(model, np.random.default_rng(3), 1, 1)
    wanted = OrtRunner(model.path, library=native.ort_library()).run(arrays)["logits"].tobytes()
    made = package(model, scratch / "ended", PackageOptions(name="m", variant=Variant.FUSED, limits=ALONE))
    workers, each = 16, 625
    asked = itertools.count(1)
    with running(made.path) as server:

        def worker(number: int) -> tuple[Counter[str], float]:
            module, told, longest = CLIENTS[number % 2], Counter[str](), 0.0
            with connect(server, module) as client:
                for _ in range(each):
                    if next(asked) == workers * each // 2:
                        server.process.send_signal(signal.SIGTERM)
                    began = time.perf_counter()
                    try:
                        answer = ask(client, module, "m", arrays).tobytes()
                        told["right" if answer == wanted else "wrong"] += 1
                    except InferenceServerException:
                        told["refused"] += 1
                    except ConnectionRefusedError:
                        told["nobody listens"] += 1
                    except (ConnectionError, HTTPConnectionClosed):  # sent as the endpoint closed: once a client
                        told["hung up on"] += 1
                    longest = max(longest, time.perf_counter() - began)
            return told, longest

        with ThreadPoolExecutor(workers) as pool:
            done = list(pool.map(worker, range(workers)))
        code = server.process.wait(30)
        left = len(members(server.pid))
    told, longest = sum((part for part, _ in done), Counter[str]()), max(part for _, part in done)
    bad = told["wrong"] + max(0, told["hung up on"] - workers // 2) + left + (code != 0) + (longest > HANGS_S)
    note = f"{dict(told)}; the longest took {longest:.2f} s; exit code {code}, processes left {left}"
    return [Row("10,000 requests, SIGTERM in the middle: wrong, hanging or left over", bad, 0, True, note)]


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
    """Texts asked for in one instant: seconds to the first piece of those admitted, refusals, and what was wrong."""

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
    status = [int(answer[9:12]) for answer in told]
    texts = [
        "".join(json.loads(part)["choices"][0]["text"] for part in re.findall(rb"data: (\{.*\})", answer))
        if code == 200 else "" for code, answer in zip(status, told, strict=True)
    ]  # fmt: skip
    others = [f"{code} {text!r}" for code, text in zip(status, texts, strict=True) if code != 429 and text != wanted]
    return Burst([at for at, code in zip(first, status, strict=True) if code == 200], status.count(429), others)


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


def bursts(server: Running, folder: Path, here: TextModel, tokens: int) -> list[Row]:
    """A hundred clients in one instant, five times; beside it what half of the prompts alone take."""
    wanted = here.generate(PROMPT, Sampling(tokens)).text
    alone = statistics.median([burst(server.http, folder.name, 1, tokens, wanted).firsts[0] for _ in range(21)]) * 1e3
    told = [burst(server.http, folder.name, 100, tokens, wanted) for _ in range(5)]
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
        Row(f"{folder.name}: 100 streams at once, limit {LIMIT}, five times: neither right nor 429",
            sum(len(one.others) for one in told), 0, True,
            f"{sum(len(one.firsts) for one in told)} right, {sum(one.refused for one in told)} refused with 429"),
        Row(f"{folder.name}: first token of those admitted in the burst itself over one stream's, median",
            round(statistics.median(medians) / alone, 2), 2.0, True,
            f"alone {alone:.1f} ms; medians of five bursts {min(medians):.0f} to {max(medians):.0f} ms. Of the "
            f"prompts alone, in this process, one takes {one:.1f} ms and {half} in one batch {together:.1f} ms: half "
            f"of those admitted wait {least:.0f} ms or more, {least / alone:.1f} times one stream"),
    ]  # fmt: skip


async def again(server: Running, wanted: str) -> list[Row]:
    """A hundred clients of which each tries again until it has its text."""
    alone = statistics.median([(await stream(server.http, SHORT)).first_s for _ in range(21)])
    admitted = await asyncio.gather(*(stream(server.http, SHORT, again=True) for _ in range(100)))
    wrong = sum(one.text != wanted for one in admitted)
    firsts = sorted(one.first_s for one in admitted)
    later = statistics.median(one.first_s for one in admitted if one.refusals)
    return [
        Row("100 streams, each trying again when refused until it has its text: wrong", wrong, 0, True,
            f"{sum(one.refusals for one in admitted)} refusals on the way"),
        Row("first token of all 100 over one stream's, from the request that was admitted, not the first try, median",
            round(statistics.median(firsts) / alone, 2), 2.0, True,
            f"alone {alone * 1e3:.1f} ms; {statistics.median(firsts) * 1e3:.1f} ms, nine in ten "
            f"{firsts[89] * 1e3:.1f} ms; those who came again {later * 1e3:.1f} ms"),
    ]  # fmt: skip


def text(folder: Path, scratch: Path) -> list[Row]:
    """The text endpoint, with both models: speed of one stream, then a hundred clients against a limit of 16."""
    rows = []
    for name, turns, tokens, short in (("text-60m", 12, SHORT, FEW), ("text", 15, LONG, SHORT)):
        here = open_folder(folder / name)
        with running(folder / name, "--concurrency", LIMIT) as server:
            rows += speed(server, folder / name, here, turns, tokens)
            rows += bursts(server, folder / name, here, short)
            if name == "text":
                rows += asyncio.run(again(server, here.generate(PROMPT, Sampling(SHORT)).text))
    return rows


STAGES = {"parity": parity, "crowd": crowd, "ended": ended, "text": text}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", type=Path, required=True, help="folder of the models")
    parser.add_argument("--prepare", action="store_true", help="make them, and measure nothing")
    parser.add_argument("--only", choices=STAGES, action="append", help="these parts; others stay in --record's file")
    parser.add_argument("--record", type=Path, help="write the JSON here")
    options = parser.parse_args()
    if options.prepare:
        prepare(options.models)
        return 0
    chosen = options.only or list(STAGES)
    rows: list[dict[str, Any]] = []
    if options.record and options.record.exists():
        found = json.loads(options.record.read_text(encoding="utf-8"))["rows"]
        rows = [row for row in found if row.get("stage") in set(STAGES) - set(chosen)]
    with tempfile.TemporaryDirectory() as scratch:
        for name in chosen:
            for row in STAGES[name](options.models, Path(scratch)):
                rows.append({"stage": name, **row.to_json()})
                sign = "<=" if row.at_most else ">="
                print(f"{'met   ' if row else 'MISSED'} {row.what}: {row.value:g} ({sign} {row.bar:g})")
                print(f"       {row.note}", flush=True)
    rows.sort(key=lambda row: list(STAGES).index(row["stage"]))
    binary = find_triton()
    met = all(row["verdict"] == "met" for row in rows)
    report = {
        "benchmark": "serving",
        "server": "tritonserver on PATH" if binary.root is None else "tritonserver of nvidia-pytriton, Python backend",
        "environment": environment(),
        "rows": rows,
        "verdict": "met" if met else "missed",
    }
    if options.record:
        options.record.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
