"""The bars of serving: a real Triton on packaged models, and the text endpoint, by clients in this process.

    python benchmarks/serving.py --models build/serving-models --prepare     # export, minutes, no timing
    python benchmarks/serving.py --models build/serving-models --record benchmarks/results/serving.json

Models: a ViT and a LLaMA of the demo's shapes with random weights. Clients and servers share the machine's cores, so
the times are those of both together. Without a tritonserver on PATH, Triton runs the models through this package's
Python backend over the same ONNX Runtime: byte parity then checks the plumbing, not another runtime.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openai
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from ibnorm_export import IBNormSpec, models, native
from ibnorm_export.artifact import ExportedModel
from ibnorm_export.environment import environment
from ibnorm_export.export import ExportOptions, export
from ibnorm_export.genai_export import export_genai
from ibnorm_export.loaded import DType
from ibnorm_export.runners.ort_runner import OrtRunner
from ibnorm_export.serving.repository import PackageOptions, Variant, package
from ibnorm_export.serving.triton_config import Limits
from ibnorm_export.serving.triton_server import find_triton
from ibnorm_export.text import Sampling, open_folder
from ibnorm_export.tokens import write_byte_tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from running_server import Running, members, running

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
CLIENTS = (tritonclient.http, tritonclient.grpc)
PROMPT = "The import statement"


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


def prepare(folder: Path) -> None:
    """Checkpoints, exported files in both types, and a folder for GenAI."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (config, spec) in CONFIGS.items():
        models.save(models.new_model(config, spec), folder / name)
        for dtype in (DType.FP32, DType.FP16):
            export(models.load(folder / name), folder / f"{name}-{dtype.value}.onnx", ExportOptions(dtype=dtype))
    write_byte_tokenizer(folder / "llama")
    export_genai(models.load(folder / "llama", task="text-generation"), folder / "text")


def draw(model: ExportedModel, rng: np.random.Generator, batch: int, sequence: int) -> dict[str, Any]:
    types = {"fp32": np.float32, "fp16": np.float16}
    made: dict[str, Any] = {}
    for tensor in model.inputs:
        shape = [{"batch": batch, "sequence": sequence}.get(str(axis), axis) for axis in tensor.shape]
        if tensor.dtype in types:
            made[tensor.name] = rng.standard_normal(shape).astype(types[tensor.dtype])
        else:
            made[tensor.name] = np.ones(shape, np.int64) if "mask" in tensor.name else rng.integers(0, 256, shape)
    return made


def connect(server: Running, module: Any) -> Any:
    return module.InferenceServerClient(server.http if module is tritonclient.http else server.grpc)


def ask(client: Any, module: Any, model: str, arrays: dict[str, Any]) -> Any:
    given = []
    for name, array in arrays.items():
        tensor = module.InferInput(name, array.shape, np_to_triton_dtype(array.dtype))
        given.append(tensor.set_data_from_numpy(array))
    return client.infer(model, given).as_numpy("logits")


def parity(folder: Path, scratch: Path) -> Row:
    """Answers that differ in any byte, one request at a time."""
    asked = different = 0
    for file in sorted(folder.glob("*.onnx")):
        model = ExportedModel(file)
        made = package(model, scratch / file.stem, PackageOptions(name="m", variant=Variant.BOTH))
        with running(made.path) as server:
            for there, library in (("m", native.ort_library()), ("m-portable", None)):
                here = OrtRunner(file, library=library)
                rng = np.random.default_rng(1)
                for module in CLIENTS:
                    client = connect(server, module)
                    for _ in range(20):
                        arrays = draw(model, rng, int(rng.integers(1, 9)), int(rng.integers(1, 65)))
                        wanted = here.run(arrays)["logits"].tobytes()
                        different += ask(client, module, there, arrays).tobytes() != wanted
                        asked += 1
    note = f"{asked} requests: ViT and LLaMA, fp32 and fp16, fused and portable, HTTP and gRPC"
    return Row("parity: answers that differ from in-process in a byte", different, 0, True, note)


def crowd(folder: Path, scratch: Path) -> list[Row]:
    """200 mixed requests at once; then 200 at once against a queue of 16."""
    model = ExportedModel(folder / "llama-fp32.onnx")
    here = OrtRunner(model.path, library=native.ort_library())
    rng = np.random.default_rng(2)
    work = [draw(model, rng, int(rng.integers(1, 9)), int(rng.integers(1, 65))) for _ in range(200)]
    wanted = [here.run(arrays)["logits"] for arrays in work]

    def one(server: Running, index: int) -> str:
        module = CLIENTS[index % 2]
        try:
            answer = ask(connect(server, module), module, "m", work[index])
        except InferenceServerException as error:
            return "refused" if "maximum queue size" in str(error) else f"failed: {error}"
        return "right" if np.allclose(answer, wanted[index], rtol=1e-4, atol=1e-5) else "wrong"

    rows = []
    for what, limits in (("200", Limits()), ("overload", Limits(max_batch=8, max_queue=16))):
        made = package(model, scratch / what, PackageOptions(name="m", variant=Variant.FUSED, limits=limits))
        with running(made.path) as server, ThreadPoolExecutor(200) as pool:
            began = time.perf_counter()
            told = Counter(pool.map(lambda index, s=server: one(s, index), range(200)))
            took = time.perf_counter() - began
            after = one(server, 0)
        note = f"{dict(told)} in {took:.2f} s; a request after it: {after}"
        if what == "200":
            rows.append(Row("200 concurrent, HTTP and gRPC, mixed sizes: right", told["right"], 200, False, note))
        else:
            unclean = sum(told.values()) - told["right"] - told["refused"] + (after != "right")
            rows.append(Row("overload, queue limit 16, 200 in flight: not clean", unclean, 0, True, note))
    return rows


def ended(folder: Path, scratch: Path) -> Row:
    """10,000 requests, SIGTERM in the middle."""
    model = ExportedModel(folder / "vit-fp32.onnx")
    arrays = draw(model, np.random.default_rng(3), 1, 1)
    wanted = OrtRunner(model.path, library=native.ort_library()).run(arrays)["logits"]
    made = package(model, scratch / "ended", PackageOptions(name="m", variant=Variant.FUSED))
    workers, each = 16, 625
    with running(made.path) as server:

        def worker(number: int) -> Counter[str]:
            module, told = CLIENTS[number % 2], Counter[str]()
            client = connect(server, module)
            for count in range(each):
                if number == 0 and count == each // 2:
                    server.process.send_signal(signal.SIGTERM)
                try:
                    answer = ask(client, module, "m", arrays)
                    told["right" if np.allclose(answer, wanted, rtol=1e-4, atol=1e-5) else "wrong"] += 1
                except (InferenceServerException, OSError):
                    told["refused"] += 1
            return told

        began = time.perf_counter()
        with ThreadPoolExecutor(workers) as pool:
            told = sum(pool.map(worker, range(workers)), Counter[str]())
        took = time.perf_counter() - began
        code = server.process.wait(30)
        left = len(members(server.pid))
    bad = workers * each - told["right"] - told["refused"] + left + (code != 0)
    note = f"{dict(told)} in {took:.1f} s; exit code {code}, processes left {left}"
    return Row("10,000 requests, SIGTERM in the middle: wrong, hanging or left over", bad, 0, True, note)


def text(folder: Path) -> list[Row]:
    """The text endpoint: speed of one stream, then a hundred against a limit of 16."""
    here = open_folder(folder / "text")
    with running(folder / "text", "--concurrency", 16) as server:
        client = openai.OpenAI(base_url=f"http://{server.http}/v1", api_key="none", max_retries=0, timeout=120)

        def stream(tokens: int) -> tuple[str, float, float]:
            began = time.perf_counter()
            first, whole = 0.0, ""
            try:
                parts = client.completions.create(
                    model="text", prompt=PROMPT, max_tokens=tokens, temperature=0, stream=True
                )
                for part in parts:
                    first = first or time.perf_counter() - began
                    whole += part.choices[0].text
            except openai.RateLimitError:
                return "429", 0.0, 0.0
            return whole, first, time.perf_counter() - began

        ratios, firsts, speeds = [], [], []
        wanted = here.generate(PROMPT, Sampling(256)).text
        stream(256)
        for _ in range(9):
            began = time.perf_counter()
            here.generate(PROMPT, Sampling(256))
            inside = time.perf_counter() - began
            written, first, outside = stream(256)
            assert written == wanted
            ratios.append(inside / outside)
            firsts.append(first)
            speeds.append(256 / outside)
        speed = Row(
            "tokens per second through the endpoint over in-process GenAI, one stream",
            round(statistics.median(ratios), 3), 0.95, False,
            f"{statistics.median(speeds):.0f} tokens/s; 256 tokens, greedy; median of 9 pairs, {min(ratios):.3f} to "
            f"{max(ratios):.3f}; in-process is this package's own loop over GenAI",
        )  # fmt: skip
        with ThreadPoolExecutor(100) as pool:
            told = list(pool.map(lambda _: stream(256), range(100)))
    refused = sum(answer == "429" for answer, _, _ in told)
    right = [first for answer, first, _ in told if answer == wanted]
    alone = statistics.median(firsts)
    slow = statistics.median(right) / alone
    return [
        speed,
        Row("100 streams, limit 16: neither right nor 429", 100 - refused - len(right), 0, True,
            f"{len(right)} right, {refused} refused with 429"),
        Row("first token of the admitted over one stream's, median", round(slow, 2), 2.0, True,
            f"alone {alone * 1e3:.1f} ms; admitted {min(right) * 1e3:.1f} to {max(right) * 1e3:.1f} ms"),
    ]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", type=Path, required=True, help="folder of the models")
    parser.add_argument("--prepare", action="store_true", help="make them, and measure nothing")
    parser.add_argument("--record", type=Path, help="write the JSON here")
    options = parser.parse_args()
    if options.prepare:
        prepare(options.models)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        rows = [
            parity(options.models, Path(scratch)),
            *crowd(options.models, Path(scratch)),
            ended(options.models, Path(scratch)),
            *text(options.models),
        ]
    binary = find_triton()
    report = {
        "benchmark": "serving",
        "server": "tritonserver on PATH" if binary.root is None else "tritonserver of nvidia-pytriton, Python backend",
        "environment": environment(),
        "rows": [row.to_json() for row in rows],
        "verdict": "met" if all(rows) else "missed",
    }
    if options.record:
        options.record.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for row in rows:
        print(
            f"{'met   ' if row else 'MISSED'} {row.what}: {row.value:g} ({'<=' if row.at_most else '>='} {row.bar:g})"
        )
        print(f"       {row.note}")
    return 0 if all(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
