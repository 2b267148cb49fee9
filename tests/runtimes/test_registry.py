"""What a backend takes, and what is said where something is missing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.errors import BackendUnavailable, IBNormError, ModelFileError
from ibnorm_export.runtimes.node import packages
from ibnorm_export.runtimes.node.packages import PACKAGES, find_node, find_package
from ibnorm_export.runtimes.node.runner import NodeRunner
from ibnorm_export.runtimes.registry import BACKENDS, check_backend, open_runner
from ibnorm_export.runtimes.runner import Backend, Endpoint, Kernels


def test_every_backend_has_a_row() -> None:
    assert set(BACKENDS) == set(Backend)
    assert {row.backend for row in BACKENDS.values() if row.takes_npm} == set(PACKAGES)


def test_a_password_in_the_address_of_a_server_is_refused_and_not_shown() -> None:
    with pytest.raises(IBNormError, match="has a user name or a password") as found:
        Endpoint("grpc://me:secret@h:8001")
    assert "secret" not in str(found.value)


def test_an_unknown_provider_is_named_with_those_that_there_are(exported_vit: ExportedModel) -> None:
    with pytest.raises(
        BackendUnavailable, match=r"no execution provider 'AbacusExecutionProvider'; it has .*CPUExecutionProvider"
    ):
        open_runner("ort-cpu", exported_vit, provider="AbacusExecutionProvider")


def test_a_provider_that_is_there_runs(exported_vit: ExportedModel) -> None:
    runner = open_runner("ort-cpu", exported_vit, provider="CPUExecutionProvider")
    assert runner.name == "ort-cpu"


def test_fused_kernels_do_not_run_on_a_chosen_provider(exported_vit: ExportedModel) -> None:
    with pytest.raises(IBNormError, match="the fused kernels do not run on CPUExecutionProvider"):
        open_runner("ort-cpu", exported_vit, provider="CPUExecutionProvider", kernels=Kernels.FUSED)


def test_only_some_backends_take_a_provider_or_npm(exported_vit: ExportedModel, tmp_path: Path) -> None:
    with pytest.raises(IBNormError, match="backend reference takes no execution provider: use --backend ort-cpu"):
        open_runner("reference", exported_vit, provider="CPUExecutionProvider")
    with pytest.raises(IBNormError, match="backend ort-cpu runs no npm package: use --backend ort-web"):
        open_runner("ort-cpu", exported_vit, npm=tmp_path)


@pytest.mark.parametrize("backend", PACKAGES)
def test_without_node_the_error_names_where_to_get_it(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages.shutil, "which", lambda _: None)
    with pytest.raises(BackendUnavailable, match=f"backend {backend} needs Node 18 or later.* https://nodejs.org"):
        find_node(backend)


def test_without_the_package_the_error_names_what_to_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    typed = "npm install --ignore-scripts --prefix DIR onnxruntime-web, then add --npm DIR"
    with pytest.raises(BackendUnavailable, match=f"which is not in {tmp_path}/node_modules: {typed}"):
        find_package(Backend.ORT_WEB, tmp_path)
    with pytest.raises(BackendUnavailable, match="or run a command without that option in DIR"):  # evaluate has none
        find_package(Backend.ORT_WEB, tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BackendUnavailable, match=f"which is not in node_modules of {tmp_path} or of a folder above"):
        find_package(Backend.ORT_WEB)


def test_a_package_is_found_above_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "node_modules" / "onnxruntime-web"
    package.mkdir(parents=True)
    (package / "package.json").write_text('{"version": "1.2.3"}', encoding="utf-8")
    below = tmp_path / "a" / "b"
    below.mkdir(parents=True)
    monkeypatch.chdir(below)
    found = find_package(Backend.ORT_WEB)
    assert (found.folder, found.version) == (tmp_path.resolve(), "1.2.3")
    with pytest.raises(BackendUnavailable):  # a folder that is given is the only one
        find_package(Backend.ORT_WEB, below)
    (package / "package.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelFileError, match=r"package\.json cannot be read"):
        find_package(Backend.ORT_WEB)


def test_a_package_that_is_too_old_for_a_file_is_not_started(
    exported_llama: ExportedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "node_modules" / "onnxruntime-web"
    package.mkdir(parents=True)
    monkeypatch.setattr(packages.shutil, "which", lambda _: "/no/such/node")
    wanted = "needs onnxruntime 1.24 or later .*, but 1.23.0 is installed: npm install --ignore-scripts --prefix .*"
    (package / "package.json").write_text('{"version": "1.23.0"}', encoding="utf-8")
    with pytest.raises(
        BackendUnavailable, match=wanted + r"'onnxruntime-web@>=1.24', or export with --for 'ort>=1.23'"
    ):
        NodeRunner(Backend.ORT_WEB, exported_llama, npm=tmp_path)
    (package / "package.json").write_text('{"version": "1.24.0"}', encoding="utf-8")
    with pytest.raises(BackendUnavailable, match="/no/such/node does not start"):
        NodeRunner(Backend.ORT_WEB, exported_llama, npm=tmp_path)


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_a_missing_tensorrt_is_reported_without_a_model(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorrt", "tensorrt_bindings", "tensorrt_rtx", "tensorrt_rtx_bindings"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(BackendUnavailable, match=rf"^{backend} is not installed: pip install 'ibnorm-export\["):
        check_backend(backend)
