"""A real Triton on packaged models, called by its own clients; the suite `serving` runs it.

Without a tritonserver on PATH, Triton runs the models through this package's Python backend over the same ONNX Runtime:
byte parity then checks the transport, not a different runtime.
"""

from __future__ import annotations

import itertools
import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from geventhttpclient.response import HTTPConnectionClosed
from tritonclient.utils import InferenceServerException

from benchmarks.rows import Row, limited
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.tensors import DType
from ibnorm_export.op import native
from ibnorm_export.runtimes.ort import OrtRunner
from ibnorm_export.serving.triton.config import TritonLimits
from ibnorm_export.serving.triton.options import PackagedNorms, PackageOptions
from ibnorm_export.serving.triton.repository import package
from ibnorm_export.verifier.tolerances import BOUNDS
from tests.support.running_server import Running, members, running
from tests.support.triton_clients import CLIENTS, REFUSED, ask, connect, draw

__all__ = ["concurrent_requests", "parity", "sigterm_under_load"]

#: Without batching an answer has exactly one right value, to the byte.
UNBATCHED = TritonLimits(max_batch=0)
#: Rows of a batch may be summed in a different order than single rows. Each is within the floor of `BOUNDS` of the
#: truth, so two of them are within twice the floor of each other (norm-wise).
BATCHED = 2 * BOUNDS[DType.FP32].floor
#: `serve` gives requests in flight 5 s. A request that takes twice as long counts as hanging.
HANGS_S = 10.0


def relative_difference(answer: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    """Norm-wise relative difference."""
    return float(np.linalg.norm(answer - expected) / np.linalg.norm(expected))


def parity(folder: Path, scratch: Path) -> list[Row]:
    """Count the answers that differ in any byte, one request at a time."""
    requests = different = 0
    for file in sorted(folder.glob("*.onnx")):
        model = ExportedModel(file)
        packaged = package(
            model, scratch / file.stem, options=PackageOptions(name="m", variant=PackagedNorms.BOTH, limits=UNBATCHED)
        )
        with running(packaged.path) as server:
            for there, library in (("m", native.ort_library()), ("m-portable", None)):
                in_process = OrtRunner(file, library=library)
                rng = np.random.default_rng(1)
                for module in CLIENTS:
                    with connect(server, module) as client:
                        for _ in range(20):
                            arrays = draw(model, rng, int(rng.integers(1, 9)), int(rng.integers(1, 65)))
                            expected = in_process.run(arrays)["logits"].tobytes()
                            different += ask(client, module, there, arrays).tobytes() != expected
                            requests += 1
    note = f"{requests} requests: ViT and LLaMA, fp32 and fp16, fused and portable, HTTP and gRPC"
    return [limited("parity: answers that differ from in-process in a byte", different, at_most=0, note=note)]


def concurrent_requests(folder: Path, scratch: Path) -> list[Row]:
    """Send 200 mixed requests at once: byte for byte, then with batched rows, then against a queue of 16."""
    model = ExportedModel(folder / "llama-fp32.onnx")
    in_process = OrtRunner(model.path, library=native.ort_library())
    rng = np.random.default_rng(2)
    work = [draw(model, rng, int(rng.integers(1, 9)), int(rng.integers(1, 65))) for _ in range(200)]
    expected = [in_process.run(arrays)["logits"] for arrays in work]

    def one(server: Running, index: int, batched: bool) -> str:
        module = CLIENTS[index % 2]
        try:
            with connect(server, module) as client:
                answer = ask(client, module, "m", work[index])
        except InferenceServerException as error:
            return "refused" if error.status() == REFUSED[module] else f"failed: {error}"
        same = answer.tobytes() == expected[index].tobytes()
        return "right" if same or (batched and relative_difference(answer, expected[index]) <= BATCHED) else "wrong"

    rows: list[Row] = []
    for what, limits in (
        ("200 concurrent, HTTP and gRPC, mixed sizes: right to the byte", UNBATCHED),
        (f"the same with dynamic batching: right to {BATCHED:g}", TritonLimits()),
        ("overload, queue limit 16, 200 in flight: not clean", TritonLimits(max_batch=0, max_queue=16)),
    ):
        packaged = package(
            model,
            scratch / f"crowd-{len(rows)}",
            options=PackageOptions(name="m", variant=PackagedNorms.FUSED, limits=limits),
        )
        batched = limits.max_batch > 0
        with running(packaged.path) as server, ThreadPoolExecutor(200) as pool:
            began = time.perf_counter()
            counts = Counter(pool.map(lambda index, s=server, b=batched: one(s, index, b), range(200)))
            took = time.perf_counter() - began
            after = one(server, 0, batched)
        note = f"{dict(counts)} in {took:.2f} s; a request after it: {after}"
        if limits.max_queue > 16:
            rows.append(limited(what, counts["right"], at_least=200, note=note))
        else:
            unclean = (
                sum(counts.values())
                - counts["right"]
                - counts["refused"]
                + (after != "right")
                + (not counts["refused"])
            )
            rows.append(limited(what, unclean, at_most=0, note=note))
    return rows


def sigterm_under_load(folder: Path, scratch: Path) -> list[Row]:
    """Send 10,000 requests, with SIGTERM in the middle."""
    model = ExportedModel(folder / "vit-fp32.onnx")
    arrays = draw(model, np.random.default_rng(3), 1, 1)
    expected = OrtRunner(model.path, library=native.ort_library()).run(arrays)["logits"].tobytes()
    packaged = package(
        model, scratch / "ended", options=PackageOptions(name="m", variant=PackagedNorms.FUSED, limits=UNBATCHED)
    )
    workers, each = 16, 625
    requests = itertools.count(1)
    with running(packaged.path) as server:

        def worker(number: int) -> tuple[Counter[str], float]:
            module, counts, longest = CLIENTS[number % 2], Counter[str](), 0.0
            with connect(server, module) as client:
                for _ in range(each):
                    if next(requests) == workers * each // 2:
                        server.process.send_signal(signal.SIGTERM)
                    began = time.perf_counter()
                    try:
                        answer = ask(client, module, "m", arrays).tobytes()
                        counts["right" if answer == expected else "wrong"] += 1
                    except InferenceServerException:
                        counts["refused"] += 1
                    except ConnectionRefusedError:
                        counts["connection refused"] += 1
                    except (
                        ConnectionError,
                        HTTPConnectionClosed,
                    ):  # sent while the endpoint closed; at most once for each client
                        counts["disconnected"] += 1
                    longest = max(longest, time.perf_counter() - began)
            return counts, longest

        with ThreadPoolExecutor(workers) as pool:
            done = list(pool.map(worker, range(workers)))
        code = server.process.wait(30)
        left = len(members(server.pid))
    counts, longest = sum((part for part, _ in done), Counter[str]()), max(part for _, part in done)
    bad = counts["wrong"] + max(0, counts["disconnected"] - workers // 2) + left + (code != 0) + (longest > HANGS_S)
    note = f"{dict(counts)}; the longest took {longest:.2f} s; exit code {code}, processes left {left}"
    return [limited("10,000 requests, SIGTERM in the middle: wrong, hanging or left over", bad, at_most=0, note=note)]
