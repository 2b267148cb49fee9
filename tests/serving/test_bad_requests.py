"""Every bad request to Triton gets an answer that explains it, and the server keeps running."""

from __future__ import annotations

import json
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.serving.triton.options import PackagedNorms, PackageOptions
from ibnorm_export.serving.triton.repository import package
from tests.support.running_server import PATIENCE_S, Running, running
from tests.support.triton_clients import CLIENTS, ask, connect

GOOD = np.zeros((1, 1, 8, 8), np.float32)
TENSOR = {"name": "pixel_values", "shape": [1, 1, 8, 8], "datatype": "FP32", "data": [0.0] * 64}
INVALID = {tritonclient.http: "400", tritonclient.grpc: "StatusCode.INVALID_ARGUMENT"}
UNKNOWN = {tritonclient.http: "404", tritonclient.grpc: "StatusCode.NOT_FOUND"}


@pytest.fixture(scope="module")
def server(exported_vit: ExportedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("served") / "repository"
    with running(package(exported_vit, folder, options=PackageOptions(variant=PackagedNorms.PORTABLE)).path) as found:
        yield found


@pytest.fixture(autouse=True)
def still_serves(server: Running) -> Iterator[None]:
    """Send a good request after each test."""
    yield
    with connect(server, tritonclient.http) as client:
        assert ask(client, tritonclient.http, "vit", {"pixel_values": GOOD}).shape == (1, 10)


@pytest.mark.parametrize("module", CLIENTS, ids=["http", "grpc"])
@pytest.mark.parametrize(
    ("asked", "statuses", "words"),
    [
        ({"array": GOOD.astype(np.float64)}, INVALID, "data-type is 'FP64', but model 'vit' expects 'FP32'"),
        ({"array": GOOD[..., None]}, INVALID, r"unexpected shape for input 'pixel_values'.*got \[1,1,8,8,1\]"),
        ({"array": GOOD[:, :, :7]}, INVALID, r"unexpected shape for input 'pixel_values'.*got \[1,1,7,8\]"),
        ({"array": np.repeat(GOOD, 9, axis=0)}, INVALID, "batch-size must be <= 8"),
        ({"input": "pixels"}, INVALID, "unexpected inference input 'pixels'"),
        ({"output": "nothing"}, INVALID, "unexpected inference output 'nothing'"),
        ({"model": "nobody"}, UNKNOWN, "unknown model: 'nobody'"),
        ({"model": "../../etc"}, UNKNOWN, "unknown model: '../../etc'|Not Found"),
        ({"version": "7"}, UNKNOWN, "version 7 is not found"),
    ],
    ids=["dtype", "rank", "shape", "batch", "input", "output", "model", "path", "version"],
)
def test_bad_requests_are_refused(
    server: Running, module: Any, asked: dict[str, Any], statuses: Any, words: str
) -> None:
    given = {"array": GOOD, "input": "pixel_values", "output": "logits", "model": "vit", "version": "", **asked}
    with connect(server, module) as client, pytest.raises(InferenceServerException, match=words) as caught:
        ask(
            client,
            module,
            given["model"],
            {given["input"]: given["array"]},
            outputs=[module.InferRequestedOutput(given["output"])],
            model_version=given["version"],
        )
    assert caught.value.status() == statuses[module]


def post(server: Running, path: str, body: bytes, headers: dict[str, str] | None = None) -> tuple[int, str]:
    request = urllib.request.Request(f"http://{server.http}/v2/{path}", data=body, headers=headers or {})
    with pytest.raises(urllib.error.HTTPError) as caught, urllib.request.urlopen(request, timeout=PATIENCE_S):
        pytest.fail("it was accepted")
    with caught.value as error:
        answer = json.load(error)
        assert set(answer) == {"error"}
        return error.code, answer["error"]


@pytest.mark.parametrize(
    ("body", "headers", "status", "words"),
    [
        # Triton 2.51 answers JSON that it cannot parse with 500, because its wrapper of rapidjson reports every failure
        # as `TRITONSERVER_ERROR_INTERNAL`. Wrong values in valid JSON get 400.
        (b"{not json", {}, 500, "failed to parse the request JSON buffer"),
        (b"\xff\xfe", {}, 500, "failed to parse the request JSON buffer"),
        (json.dumps({"inputs": [TENSOR]}).encode()[:-30], {}, 500, "failed to parse the request JSON buffer"),
        (b'{"inputs": [', {"Inference-Header-Content-Length": "12"}, 500, "failed to parse the request JSON buffer"),
        (b"[1, 2]", {}, 500, "Unable to parse 'inputs'"),
        (b"{}", {}, 500, "Unable to parse 'inputs'"),
        (json.dumps({"inputs": [{**TENSOR, "data": [0.0] * 63}]}).encode(), {}, 500, "Unable to parse 'data'"),
        (json.dumps({"inputs": [{**TENSOR, "shape": [-1, 1, 8, 8]}]}).encode(), {}, 500, "Unable to parse 'shape'"),
        (b"", {}, 400, "Expected 256, got 0"),
        (b"{}" * 8, {"Inference-Header-Content-Length": "99999999"}, 400, "inference header size should be in range"),
        (b"{}", {"Inference-Header-Content-Length": "-1"}, 400, "inference header size should be in range"),
        (json.dumps({"inputs": [{**TENSOR, "datatype": "FP99"}]}).encode(), {}, 400, "invalid datatype"),
    ],
    ids=[
        "not-json",
        "not-text",
        "cut",
        "cut-header",
        "list",
        "no-inputs",
        "too-few",
        "negative",
        "empty",
        "long-header",
        "negative-header",
        "datatype",
    ],
)
def test_bad_bodies_are_refused(server: Running, body: bytes, headers: dict[str, str], status: int, words: str) -> None:
    code, message = post(server, "models/vit/infer", body, headers)
    assert (code, words in message) == (status, True), message


@pytest.mark.parametrize("path", ["../../etc", "..%2f..%2fetc", "%2e%2e", "vit/versions/../../../etc"])
def test_paths_in_a_model_name_are_not_followed(server: Running, path: str) -> None:
    code, message = post(server, f"models/{path}/infer", json.dumps({"inputs": [TENSOR]}).encode())
    assert code == 404
    assert message == "Not Found" or "is not found" in message


def test_a_huge_body_is_refused(server: Running) -> None:
    """It is refused for its content. A tenth of its size kills a server with stacks of 8 MiB."""
    code, message = post(server, "models/vit/infer", b" " * (80 << 20))
    assert (code, "The document is empty" in message) == (500, True)


def test_an_incomplete_body_does_not_block_others(server: Running) -> None:
    place, _, port = server.http.rpartition(":")
    with socket.create_connection((place, int(port))) as stream:
        stream.sendall(b"POST /v2/models/vit/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 999\r\n\r\n{")
        stream.settimeout(0.3)
        with pytest.raises(TimeoutError):  # the server waits for the rest
            stream.recv(1)
        with connect(server, tritonclient.http) as client:
            assert ask(client, tritonclient.http, "vit", {"pixel_values": GOOD}).shape == (1, 10)
