"""How a Triton server starts, why it may not start, and how it stops."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tritonclient.http

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.errors import BackendUnavailable, IBNormError, ModelFileError
from ibnorm_export.serving.options import ServeOptions
from ibnorm_export.serving.triton.binary import find_triton
from ibnorm_export.serving.triton.options import PackagedNorms, PackageOptions
from ibnorm_export.serving.triton.repository import package
from ibnorm_export.serving.triton.server import triton_server
from tests.support.running_server import PATIENCE_S, command, listening, members, running
from tests.support.triton_clients import ask, connect, draw


def test_an_onnx_file_is_served(exported_vit: ExportedModel) -> None:
    with running(exported_vit.path) as server:
        assert listening(server.pid) == {"127.0.0.1"}
        arrays = draw(exported_vit, np.random.default_rng(10), 2, 1)
        with connect(server, tritonclient.http) as client:
            answer = ask(client, tritonclient.http, "vit", arrays)
        assert answer.shape == (2, 10)


def test_a_crash_is_reported_with_the_end_of_the_log(exported_vit: ExportedModel, tmp_path: Path) -> None:
    made = package(exported_vit, tmp_path / "r", options=PackageOptions(variant=PackagedNorms.PORTABLE))
    with running(made.path) as server:
        os.kill(server.pid, signal.SIGSEGV)
        _, text = server.process.communicate(timeout=PATIENCE_S)
        assert server.process.returncode == 2
        assert "killed by signal SIGSEGV" in text
        assert "its log ends with" in text


def test_a_read_only_repository_is_served(exported_vit: ExportedModel, tmp_path: Path) -> None:
    made = package(exported_vit, tmp_path / "r", options=PackageOptions(variant=PackagedNorms.FUSED))
    before = {f: f.stat().st_mtime_ns for f in made.path.rglob("*")}
    for folder in (made.path, *(f for f in made.path.rglob("*") if f.is_dir())):
        folder.chmod(0o555)
    try:
        with triton_server(made.path, ServeOptions(http_port=0, grpc_port=0, metrics_port=0)) as server:
            assert server.ready()
            group = server.pid
        assert not members(group)
        assert {f: f.stat().st_mtime_ns for f in made.path.rglob("*")} == before  # root could have written to it
    finally:
        for folder in (made.path, *(f for f in made.path.rglob("*") if f.is_dir())):
            folder.chmod(0o755)


def test_a_changed_repository_is_not_served(exported_vit: ExportedModel, tmp_path: Path) -> None:
    made = package(exported_vit, tmp_path / "r", options=PackageOptions(variant=PackagedNorms.FUSED))
    library = made.path / "vit" / "libibnorm_ort.so"
    original = library.read_bytes()

    def refused(words: str) -> None:
        with pytest.raises(ModelFileError, match=words), triton_server(made.path, ServeOptions(http_port=0)):
            pytest.fail("it was started")

    model = made.path / "vit" / "1" / "model.onnx"
    weights = model.read_bytes()
    model.write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    refused(r"model\.onnx was changed after packaging: its SHA-256")
    model.unlink()
    refused(r"model\.onnx is missing")
    model.write_bytes(weights)
    library.write_bytes(original + b"\0")
    refused(r"libibnorm_ort.so was changed after packaging.*Write the folder again|restore the file")
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
    refused("does not list; it is not loaded")
    config.write_text(text)
    manifest.write_text("{")
    refused("is damaged")
    manifest.unlink()
    refused("has no manifest.json")


def test_port_in_use(exported_vit: ExportedModel, tmp_path: Path) -> None:
    made = package(exported_vit, tmp_path / "r", options=PackageOptions(variant=PackagedNorms.PORTABLE))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = subprocess.run(command("serve", made.path, "--http-port", port), capture_output=True, text=True)
    assert done.returncode == 2
    assert f"127.0.0.1:{port}: Address already in use; choose another port with --http-port" in done.stderr


def test_a_missing_triton_server_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    monkeypatch.setattr("ibnorm_export.serving.triton.binary._PACKAGE", "no-such-distribution")
    with pytest.raises(BackendUnavailable, match="pip install --no-deps nvidia-pytriton") as caught:
        find_triton()
    assert caught.value.exit_code == 3


def test_a_triton_server_on_path_is_preferred(
    exported_vit: ExportedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own backends load op libraries by absolute path, so it gets a copy of the configs with new paths."""
    fake = tmp_path / "bin" / "tritonserver"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\ncat "${1#*=}"/*/config.pbtxt >&2\nexit 9\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}{os.pathsep}{os.environ['PATH']}")
    made = package(exported_vit, tmp_path / "r", options=PackageOptions(variant=PackagedNorms.FUSED))
    log = tmp_path / "log"
    options = ServeOptions(log=log, http_port=0, grpc_port=0, metrics_port=0)
    with pytest.raises(IBNormError, match="ended with exit code 9"), triton_server(made.path, options):
        pytest.fail("it cannot be ready")
    assert f'op_library_filename: "{made.path}/vit/libibnorm_ort.so"' in log.read_text()


def test_ports_out_of_range(tmp_path: Path) -> None:
    with pytest.raises(IBNormError, match="65535"):
        ServeOptions(http_port=70000)
    options = ServeOptions(http_port=8000, grpc_port=8000)
    with pytest.raises(IBNormError, match="must differ"), triton_server(tmp_path, options):
        pytest.fail("it was started")
