"""A real tritonserver on the unmodified repository, and clients that know nothing of this package.

On a machine without a tritonserver on PATH the ONNX Runtime backend is `onnxruntime_backend/model.py`, over the
same runtime as in-process: byte parity then shows that the plumbing is right, not that another runtime agrees.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from running_server import Running, command, members, running
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from ibnorm_export import models, native
from ibnorm_export.artifact import ExportedModel
from ibnorm_export.errors import BackendUnavailable, IBNormError, ModelFileError
from ibnorm_export.runners.base import Endpoint
from ibnorm_export.runners.ort_runner import OrtRunner
from ibnorm_export.serving.repository import PackageOptions, Variant, package
from ibnorm_export.serving.triton_config import Limits
from ibnorm_export.serving.triton_server import ServerOptions, find_triton, serve
from ibnorm_export.verify import VerifyOptions, verify

Arrays = dict[str, np.ndarray[Any, Any]]


def draw(model: ExportedModel, rng: np.random.Generator, batch: int, sequence: int) -> Arrays:
    types = {"fp32": np.float32, "fp16": np.float16}
    made: Arrays = {}
    for tensor in model.inputs:
        shape = [{"batch": batch, "sequence": sequence}.get(str(axis), axis) for axis in tensor.shape]
        if tensor.dtype in types:
            made[tensor.name] = rng.standard_normal(shape).astype(types[tensor.dtype])
        else:
            made[tensor.name] = rng.integers(0, 2, shape) if "mask" not in tensor.name else np.ones(shape, np.int64)
    return made


def ask(client: Any, module: Any, model: str, arrays: Arrays) -> np.ndarray[Any, Any]:
    given = []
    for name, array in arrays.items():
        tensor = module.InferInput(name, array.shape, np_to_triton_dtype(array.dtype))
        given.append(tensor.set_data_from_numpy(array))
    answer: np.ndarray[Any, Any] = client.infer(model, given).as_numpy("logits")
    return answer


CLIENTS = pytest.mark.parametrize("module", [tritonclient.http, tritonclient.grpc], ids=["http", "grpc"])


def connect(server: Running, module: Any) -> Any:
    return module.InferenceServerClient(server.http if module is tritonclient.http else server.grpc)


@CLIENTS
@pytest.mark.parametrize("variant", ["fused", "portable"])
def test_same_bytes_as_in_process(served: tuple[ExportedModel, str, Running], variant: str, module: Any) -> None:
    model, name, server = served
    library = native.ort_library() if variant == "fused" else None
    here = OrtRunner(model.path, library=library)
    client = connect(server, module)
    rng = np.random.default_rng(5)
    for batch, sequence in ((1, 1), (3, 17), (4, 64), (2, 5)):
        arrays = draw(model, rng, batch, sequence)
        answer = ask(client, module, name if library else f"{name}-portable", arrays)
        wanted = here.run(arrays)["logits"]
        assert (answer.dtype, answer.shape) == (wanted.dtype, wanted.shape)
        assert answer.tobytes() == wanted.tobytes()


def test_two_hundred_at_once(served: tuple[ExportedModel, str, Running]) -> None:
    """Mixed batches and lengths over HTTP and gRPC together; rows that were batched may differ in the last bits."""
    model, name, server = served
    here = OrtRunner(model.path, library=native.ort_library())
    rng = np.random.default_rng(6)
    work = [draw(model, rng, int(rng.integers(1, 5)), int(rng.integers(1, 33))) for _ in range(200)]
    tolerance = 2e-2 if name.endswith("fp16") else 1e-5  # another batch is another order of summation

    def one(index: int) -> np.ndarray[Any, Any]:
        module = (tritonclient.http, tritonclient.grpc)[index % 2]
        return ask(connect(server, module), module, name, work[index])

    with ThreadPoolExecutor(200) as pool:
        answers = list(pool.map(one, range(200)))
    assert len(answers) == 200
    for arrays, answer in zip(work, answers, strict=True):
        np.testing.assert_allclose(answer, here.run(arrays)["logits"], rtol=tolerance, atol=tolerance)


def test_verify_through_the_server(served: tuple[ExportedModel, str, Running], request: pytest.FixtureRequest) -> None:
    model, name, server = served
    loaded = models.load(request.getfixturevalue(f"{name.split('-')[0]}_checkpoint"))
    for url, there in ((server.http, name), (f"grpc://{server.grpc}", f"{name}-portable")):
        report = verify(model, loaded, VerifyOptions("triton", endpoint=Endpoint(url, there)))
        assert report, report.findings
        assert report.numeric is not None
        assert [output.norms for output in report.numeric.outputs] == ["as served"]
    with pytest.raises(BackendUnavailable, match=r"has the models|no Triton"):
        verify(model, loaded, VerifyOptions("triton", endpoint=Endpoint("127.0.0.1:9", name)))
    report = verify(model, loaded, VerifyOptions("triton", endpoint=Endpoint(server.http)))
    assert "choose with --name" in str(report.findings)


def post(url: str, body: bytes, headers: dict[str, str] | None = None) -> tuple[int, str]:
    try:
        request = urllib.request.Request(url, data=body, headers=headers or {})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_bad_requests(served: tuple[ExportedModel, str, Running]) -> None:
    """What an independent client gets for each: an answer, in words, and a server that goes on."""
    model, name, server = served
    good = draw(model, np.random.default_rng(7), 1, 4)
    first = next(iter(good))
    bad: list[tuple[str, Arrays, str]] = [
        (name, {**good, first: good[first].astype(np.float64)}, "data-type"),
        (name, {**good, first: good[first][..., None]}, "shape"),
        (name, {**good, first: np.repeat(good[first], 9, axis=0)}, "batch|shape"),
        (name, {"pixels" if key == first else key: array for key, array in good.items()}, "input"),
        ("nobody", good, "unknown model"),
        ("../../etc", good, "unknown model|Not Found|not found"),
    ]
    for module in (tritonclient.http, tritonclient.grpc):
        client = connect(server, module)
        for there, arrays, words in bad:
            with pytest.raises(InferenceServerException, match=words):
                ask(client, module, there, arrays)
        tensor = module.InferInput(first, good[first].shape, np_to_triton_dtype(good[first].dtype))
        tensor.set_data_from_numpy(good[first])
        with pytest.raises(InferenceServerException, match="output"):
            client.infer(name, [tensor], outputs=[module.InferRequestedOutput("nothing")])
        with pytest.raises(InferenceServerException, match="version"):
            client.infer(name, [tensor], model_version="7")
    url = f"http://{server.http}/v2/models/{name}/infer"
    for body, headers in (
        (b"{not json", {}),
        (b"", {}),
        (b"[1, 2]", {}),
        (b'{"inputs": [', {"Inference-Header-Content-Length": "12"}),
        (b"{}" * 8, {"Inference-Header-Content-Length": "99999999"}),
    ):
        code, said = post(url, body, headers)
        assert code >= 400, (body, code)
        assert "error" in said  # Triton 2.51 calls some of them 500
    place, _, port = server.http.rpartition(":")
    with socket.create_connection((place, int(port))) as stream:  # a body that is never sent whole
        stream.sendall(f"POST /v2/models/{name}/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 999\r\n\r\n{{".encode())
    assert ask(connect(server, tritonclient.http), tritonclient.http, name, good).size


def test_huge_body(served: tuple[ExportedModel, str, Running]) -> None:
    """Refused for its content; never a crash. A server with stacks of 8 MiB dies of it."""
    _, name, server = served
    try:
        code, _ = post(f"http://{server.http}/v2/models/{name}/infer", b" " * (80 << 20))
        assert code >= 400
    except OSError:
        pass  # the server hung up before it read everything: a refusal too
    _, port = server.http.rsplit(":", 1)
    assert connect(server, tritonclient.http).is_server_ready(), port


def test_overload_is_refused_and_passes(exported_llama: ExportedModel, tmp_path: Path) -> None:
    options = PackageOptions(name="m", variant=Variant.FUSED, limits=Limits(max_batch=0, max_queue=16))
    arrays = draw(exported_llama, np.random.default_rng(8), 8, 64)
    wanted = OrtRunner(exported_llama.path, library=native.ort_library()).run(arrays)["logits"].tobytes()
    with running(package(exported_llama, tmp_path / "r", options).path) as server:

        def one(index: int) -> str:
            module = (tritonclient.http, tritonclient.grpc)[index % 2]
            try:
                return "right" if ask(connect(server, module), module, "m", arrays).tobytes() == wanted else "wrong"
            except InferenceServerException as error:
                return "refused" if "maximum queue size" in str(error) else str(error)

        with ThreadPoolExecutor(200) as pool:
            told = list(pool.map(one, range(200)))
        assert set(told) <= {"right", "refused"}, set(told)
        assert told.count("right") >= 16
        assert one(0) == "right"


def test_sigterm_in_the_middle(exported_llama: ExportedModel, tmp_path: Path) -> None:
    """Every request is answered right or refused; none hangs; `running` checks that no process is left."""
    made = package(exported_llama, tmp_path / "r", PackageOptions(name="m", variant=Variant.FUSED))
    arrays = draw(exported_llama, np.random.default_rng(9), 1, 16)
    wanted = OrtRunner(exported_llama.path, library=native.ort_library()).run(arrays)["logits"]
    with running(made.path) as server:
        clients: dict[int, Any] = {}

        def worker(number: int) -> list[str]:
            client, told = connect(server, tritonclient.grpc), []
            for count in range(60):
                if number == 0 and count == 30:
                    server.process.send_signal(signal.SIGTERM)
                try:
                    answer = ask(client, tritonclient.grpc, "m", arrays)
                    told.append("right" if np.allclose(answer, wanted, atol=1e-5) else "wrong")
                except InferenceServerException:
                    told.append("refused")
            client.close()
            return told

        with ThreadPoolExecutor(16) as pool:
            began = time.monotonic()
            told = [word for words in pool.map(worker, range(16)) for word in words]
        assert time.monotonic() - began < 60
        assert len(told) == 960
        assert set(told) == {"right", "refused"}
        assert not clients
        assert server.process.wait(15) == 0


def test_serves_an_onnx_file_as_it_is(exported_vit: ExportedModel) -> None:
    with running(exported_vit.path) as server:
        arrays = draw(exported_vit, np.random.default_rng(10), 2, 1)
        answer = ask(connect(server, tritonclient.http), tritonclient.http, "vit", arrays)
        assert answer.shape == (2, 10)


def test_a_crash_is_told_with_the_servers_last_words(exported_vit: ExportedModel, tmp_path: Path) -> None:
    made = package(exported_vit, tmp_path / "r", PackageOptions(variant=Variant.PORTABLE))
    with running(made.path) as server:
        os.kill(server.pid, signal.SIGSEGV)
        _, text = server.process.communicate(timeout=15)
        assert server.process.returncode == 2
        assert "killed by signal SIGSEGV" in text
        assert "its last words" in text


def test_read_only_repository(exported_vit: ExportedModel, tmp_path: Path) -> None:
    made = package(exported_vit, tmp_path / "r", PackageOptions(variant=Variant.FUSED))
    before = {f: f.stat().st_mtime_ns for f in made.path.rglob("*")}
    for folder in (made.path, *(f for f in made.path.rglob("*") if f.is_dir())):
        folder.chmod(0o555)
    try:
        with serve(made.path, ServerOptions(http_port=0, grpc_port=0, metrics_port=0)) as server:
            assert server.ready()
            group = server.pid
        assert not members(group)
        assert {f: f.stat().st_mtime_ns for f in made.path.rglob("*")} == before  # root may write: it did not
    finally:
        for folder in (made.path, *(f for f in made.path.rglob("*") if f.is_dir())):
            folder.chmod(0o755)


def test_changed_after_packaging(exported_vit: ExportedModel, tmp_path: Path) -> None:
    made = package(exported_vit, tmp_path / "r", PackageOptions(variant=Variant.FUSED))
    library = made.path / "vit" / "libibnorm_ort.so"
    original = library.read_bytes()

    def refused(words: str) -> None:
        with pytest.raises(ModelFileError, match=words), serve(made.path, ServerOptions(http_port=0)):
            pytest.fail("it was served")

    library.write_bytes(original + b"\0")
    refused(r"libibnorm_ort.so was changed after packaging.*Write the folder again|put the file back")
    library.unlink()
    refused("libibnorm_ort.so is missing")
    library.write_bytes(original)
    manifest = made.path / "manifest.json"
    told = json.loads(manifest.read_text())
    entry = told["libraries"]["vit/libibnorm_ort.so"]
    manifest.write_text(json.dumps({**told, "libraries": {"vit/libibnorm_ort.so": {**entry, "machine": "aarch64"}}}))
    refused("portable variant")
    newer = {**entry, "schema": {**entry["schema"], "version": 2}}
    manifest.write_text(json.dumps({**told, "libraries": {"vit/libibnorm_ort.so": newer}}))
    refused("with this version of ibnorm-export")
    manifest.write_text(json.dumps(told))
    config = made.path / "vit" / "config.pbtxt"
    text = config.read_text()
    config.write_text(text.replace("libibnorm_ort.so", "other.so"))
    (made.path / "vit" / "other.so").write_bytes(original)
    refused("does not name; it is not loaded")
    config.write_text(text)
    manifest.write_text("{")
    refused("is damaged")
    manifest.unlink()
    refused("has no manifest.json")


def test_port_in_use(exported_vit: ExportedModel, tmp_path: Path) -> None:
    made = package(exported_vit, tmp_path / "r", PackageOptions(variant=Variant.PORTABLE))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = subprocess.run(command("serve", made.path, "--http-port", port), capture_output=True, text=True)
    assert done.returncode == 2
    assert f"127.0.0.1:{port}: Address already in use; choose another with --http-port" in done.stderr


def test_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    monkeypatch.setattr("ibnorm_export.serving.triton_server._PACKAGE", "no-such-distribution")
    with pytest.raises(BackendUnavailable, match="pip install --no-deps nvidia-pytriton") as caught:
        find_triton()
    assert caught.value.exit_code == 3


def test_triton_on_path_comes_first(
    exported_vit: ExportedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its own backends: op libraries must be there by absolute path, so configs are rewritten in a copy."""
    fake = tmp_path / "bin" / "tritonserver"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\ncat "${1#*=}"/*/config.pbtxt >&2\nexit 9\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}{os.pathsep}{os.environ['PATH']}")
    made = package(exported_vit, tmp_path / "r", PackageOptions(variant=Variant.FUSED))
    log = tmp_path / "log"
    options = ServerOptions(log=log, http_port=0, grpc_port=0, metrics_port=0)
    with pytest.raises(IBNormError, match="ended with exit code 9"), serve(made.path, options):
        pytest.fail("it cannot be ready")
    assert f'op_library_filename: "{made.path}/vit/libibnorm_ort.so"' in log.read_text()


def test_ports_out_of_range() -> None:
    with pytest.raises(IBNormError, match="must differ"):
        ServerOptions(http_port=8000, grpc_port=8000)
    with pytest.raises(IBNormError, match="65535"):
        ServerOptions(http_port=70000)
