"""A real tritonserver on an unmodified repository, with Triton's own clients.

Without a tritonserver on PATH, `onnxruntime_backend/model.py` runs the model with the same runtime as in-process. Equal
bytes then show that nothing is lost on the way, not that another runtime agrees.
"""

from __future__ import annotations

import itertools
import signal
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tritonclient.http
from geventhttpclient.response import HTTPConnectionClosed
from tritonclient.utils import InferenceServerException

from ibnorm_export import models
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.tensors import DType
from ibnorm_export.errors import BackendUnavailable, IBNormError
from ibnorm_export.op import native
from ibnorm_export.runtimes.ort import OrtRunner
from ibnorm_export.runtimes.runner import Endpoint
from ibnorm_export.serving.triton.config import TritonLimits
from ibnorm_export.serving.triton.options import PackagedNorms, PackageOptions
from ibnorm_export.serving.triton.repository import package
from ibnorm_export.verifier.tolerances import BOUNDS
from ibnorm_export.verifier.verify import VerifyOptions, verify
from tests.support.running_server import PATIENCE_S, Running, running
from tests.support.triton_clients import CLIENTS, REFUSED, ask, connect, draw

ALONE = TritonLimits(max_batch=0)  # without batching, an answer has exactly one right value
BOTH_CLIENTS = pytest.mark.parametrize("module", CLIENTS, ids=["http", "grpc"])


def answers(model: ExportedModel, work: list[dict[str, Any]]) -> list[bytes]:
    """Compute the answers in-process, with fused kernels."""
    here = OrtRunner(model.path, library=native.ort_library())
    return [here.run(arrays)["logits"].tobytes() for arrays in work]


@BOTH_CLIENTS
@pytest.mark.parametrize("variant", ["fused", "portable"])
def test_same_bytes_as_in_process(served: tuple[ExportedModel, str, Running], variant: str, module: ModuleType) -> None:
    model, name, server = served
    library = native.ort_library() if variant == "fused" else None
    here = OrtRunner(model.path, library=library)
    rng = np.random.default_rng(5)
    with connect(server, module) as client:
        for batch, sequence in ((1, 1), (3, 17), (4, 64), (2, 5)):
            arrays = draw(model, rng, batch, sequence)
            answer = ask(client, module, name if library else f"{name}-portable", arrays)
            wanted = here.run(arrays)["logits"]
            assert (answer.dtype, answer.shape) == (wanted.dtype, wanted.shape)
            assert answer.tobytes() == wanted.tobytes()


def test_the_fused_kernels_are_used(served: tuple[ExportedModel, str, Running]) -> None:
    """The variants differ in their last bits, so the test above would notice a missing library."""
    model, name, server = served
    arrays = draw(model, np.random.default_rng(5), 4, 64)
    with connect(server, tritonclient.http) as client:
        fused = ask(client, tritonclient.http, name, arrays)
        portable = ask(client, tritonclient.http, f"{name}-portable", arrays)
    assert fused.tobytes() != portable.tobytes()


def test_two_hundred_concurrent_requests(served: tuple[ExportedModel, str, Running]) -> None:
    """Mixed batches and lengths over HTTP and gRPC at once; every answer is byte-identical."""
    model, name, server = served
    rng = np.random.default_rng(6)
    work = [draw(model, rng, int(rng.integers(1, 5)), int(rng.integers(1, 33))) for _ in range(200)]

    def one(index: int) -> bytes:
        module = CLIENTS[index % 2]
        with connect(server, module) as client:
            return ask(client, module, name, work[index]).tobytes()

    with ThreadPoolExecutor(200) as pool:
        assert list(pool.map(one, range(200))) == answers(model, work)


def test_requests_are_batched(exported_llama: ExportedModel, tmp_path: Path) -> None:
    """Requests with equal shapes are computed together, and each gets its own rows."""
    options = PackageOptions(
        name="m", variant=PackagedNorms.FUSED, limits=TritonLimits(max_batch=8, queue_delay_us=200_000)
    )
    rng = np.random.default_rng(11)
    work = [draw(exported_llama, rng, 1 + index % 2, 9) for index in range(64)]
    here = OrtRunner(exported_llama.path, library=native.ort_library())
    with running(package(exported_llama, tmp_path / "r", options=options).path) as server:

        def one(index: int) -> np.ndarray[Any, Any]:
            module = CLIENTS[index % 2]
            with connect(server, module) as client:
                return ask(client, module, "m", work[index])

        with ThreadPoolExecutor(64) as pool:
            told = list(pool.map(one, range(64)))
        with connect(server, tritonclient.http) as client:
            statistics = client.get_inference_statistics("m")["model_stats"][0]
            with pytest.raises(InferenceServerException, match="batch-size must be <= 8"):
                ask(client, tritonclient.http, "m", draw(exported_llama, rng, 9, 4))
    requested, runs = (int(statistics[key]) for key in ("inference_count", "execution_count"))
    assert requested >= 96  # 32 requests of one row and 32 of two
    assert runs <= 40
    # the size of the batch changes the order of summation: both orders are within the floor of the tolerances
    tolerance = 2 * BOUNDS[DType.FP32].floor
    for arrays, answer in zip(work, told, strict=True):
        wanted = here.run(arrays)["logits"]
        assert answer.shape == wanted.shape
        assert np.linalg.norm(answer - wanted) <= tolerance * np.linalg.norm(wanted)


def test_verify_through_the_server(served: tuple[ExportedModel, str, Running], request: pytest.FixtureRequest) -> None:
    model, name, server = served
    loaded = models.load(request.getfixturevalue(f"{name.split('-')[0]}_checkpoint"))
    for url, there in ((server.http, name), (f"grpc://{server.grpc}", f"{name}-portable")):
        report = verify(model, loaded, options=VerifyOptions("triton", endpoint=Endpoint(url, there)))
        here = verify(model, loaded, options=VerifyOptions("ort-cpu"))
        assert bool(report) is bool(here) is True, (report.findings, here.findings)
        assert report.numeric is not None
        assert [output.norms for output in report.numeric.outputs] == ["as served"]
    with pytest.raises(BackendUnavailable, match=r"no Triton server answers HTTP at 127\.0\.0\.1:9"):
        verify(model, loaded, options=VerifyOptions("triton", endpoint=Endpoint("127.0.0.1:9", name)))
    for url, there, said in (
        (server.http, "", "has the models .*; choose with --name"),
        (server.http, "nobody", "unknown model: 'nobody' is not found; choose with --name"),
        (server.grpc, name, "no Triton server answers HTTP at"),
        (f"grpc://{server.http}", name, "no Triton server answers gRPC at"),
        ("127.0.0.1:99999", name, "it must be HOST:PORT"),
        ("127.0.0.1:http", name, "it must be HOST:PORT"),
    ):
        with pytest.raises(IBNormError, match=said):
            verify(model, loaded, options=VerifyOptions("triton", endpoint=Endpoint(url, there)))


def test_verify_fails_if_the_server_has_another_model(
    served: tuple[ExportedModel, str, Running], request: pytest.FixtureRequest
) -> None:
    """Wrong numbers from a server fail, as they do in-process."""
    model, name, server = served
    family = name.split("-")[0]
    loaded = models.load(request.getfixturevalue(f"{family}_checkpoint"))
    next(iter(loaded.module.parameters())).data.mul_(1.5)
    report = verify(model, loaded, options=VerifyOptions("triton", endpoint=Endpoint(server.http, name)))
    assert not report
    assert "logits" in str(report.findings)


def test_overload_is_refused_and_recovers_afterwards(exported_llama: ExportedModel, tmp_path: Path) -> None:
    options = PackageOptions(name="m", variant=PackagedNorms.FUSED, limits=TritonLimits(max_batch=0, max_queue=16))
    arrays = draw(exported_llama, np.random.default_rng(8), 8, 64)
    wanted = answers(exported_llama, [arrays])[0]
    with running(package(exported_llama, tmp_path / "r", options=options).path) as server:

        def one(index: int) -> str:
            module = CLIENTS[index % 2]
            try:
                with connect(server, module) as client:
                    return "right" if ask(client, module, "m", arrays).tobytes() == wanted else "wrong"
            except InferenceServerException as error:
                return "refused" if error.status() == REFUSED[module] else str(error)

        with ThreadPoolExecutor(200) as pool:
            told = Counter(pool.map(one, range(200)))
        assert set(told) == {"right", "refused"}
        assert told["right"] >= 16
        assert one(0) == one(1) == "right"


def test_sigterm_between_requests(exported_llama: ExportedModel, tmp_path: Path) -> None:
    """Every request gets the right answer or is refused, and none hangs. `running` checks that no process is left."""
    made = package(
        exported_llama, tmp_path / "r", options=PackageOptions(name="m", variant=PackagedNorms.FUSED, limits=ALONE)
    )
    arrays = draw(exported_llama, np.random.default_rng(9), 1, 16)
    wanted = answers(exported_llama, [arrays])[0]
    asked = itertools.count()
    with running(made.path) as server:

        def one(client: Any, module: ModuleType) -> str:
            try:
                return "right" if ask(client, module, "m", arrays).tobytes() == wanted else "wrong"
            except (InferenceServerException, ConnectionRefusedError):
                return "refused"
            except (ConnectionError, HTTPConnectionClosed):
                return "hung up on"  # sent while the endpoint closed

        def worker(number: int) -> list[str]:
            """Send requests until five have been refused."""
            module, told = CLIENTS[number % 2], list[str]()
            with connect(server, module) as client:
                while told.count("refused") < 5:
                    if next(asked) == 480:
                        server.process.send_signal(signal.SIGTERM)
                    told.append(one(client, module))
            return told

        with ThreadPoolExecutor(16) as pool:
            told = list(pool.map(worker, range(16)))
        for words in told:
            refused = words.index("refused")
            hung_up = words[refused - 1] == "hung up on"
            assert set(words[: refused - hung_up]) == {"right"}
            assert set(words[refused:]) <= {"refused", "hung up on"}
            assert words.count("hung up on") <= 1
        assert sum(words.count("right") for words in told) >= 464  # those that ended before the signal
        assert server.process.wait(PATIENCE_S) == 0


@BOTH_CLIENTS
def test_endpoints_that_change_the_server_are_closed(
    served: tuple[ExportedModel, str, Running], module: ModuleType
) -> None:
    _, name, server = served
    with connect(server, module) as client:
        assert client.is_model_ready(name)
        client.get_model_repository_index()
        client.get_inference_statistics(name)
        for change in (
            lambda: client.get_trace_settings(),
            lambda: client.update_trace_settings(settings={"trace_file": "/tmp/trace"}),
            lambda: client.get_log_settings(),
            lambda: client.update_log_settings({"log_file": "/tmp/log"}),
            lambda: client.get_system_shared_memory_status(),
            lambda: client.register_system_shared_memory("x", "/x", 1),
            lambda: client.get_cuda_shared_memory_status(),
            lambda: client.load_model(name),
            lambda: client.unload_model(name),
        ):
            with pytest.raises(InferenceServerException):
                change()
        assert client.is_model_ready(name)


def test_they_are_open_if_asked_for(exported: dict[str, ExportedModel], tmp_path: Path) -> None:
    options = PackageOptions(name="m", variant=PackagedNorms.PORTABLE)
    with (
        running(package(exported["vit-fp32"], tmp_path / "r", options=options).path, "--admin") as server,
        connect(server, tritonclient.http) as client,
    ):
        assert "log_file" in client.get_log_settings()
        assert client.get_system_shared_memory_status() == []
        client.unload_model("m")
        client.load_model("m")
        assert client.is_model_ready("m")
