"""The table of runtimes: older versions of ONNX Runtime run what they should, and refuse the rest with a reason."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benchmarks.suites.runtimes import ENVIRONMENTS, environments, run_backend, run_environment
from benchmarks.suites.runtimes_cases import Case, make_cases
from ibnorm_export.runtimes.runner import Backend

NPM = Path(__file__).resolve().parents[3] / "build" / "node"
INSTALLED = environments(ENVIRONMENTS)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    """LLaMA has opset 23 by default, ViT opset 20."""
    folder = tmp_path_factory.mktemp("cases")
    return list(make_cases(folder, names=("LLaMA", "ViT"), forms=("default", "inlined, opset 18")))


def case_of(cases: list[Case], model: str, form: str) -> Case:
    return next(case for case in cases if (case.model, case.form) == (model, form))


@pytest.mark.parametrize("version", ["1.18.1", "1.20.1", "1.22.1", "1.24.4"])
def test_onnxruntime_runs_every_opset_that_it_has(version: str, cases: list[Case]) -> None:
    name = f"onnxruntime-{version}"
    if name not in INSTALLED:
        pytest.skip(f"{ENVIRONMENTS / name} is not there: make runtimes")
    runtime, _, python = INSTALLED[name]
    for case, outcome in run_environment(python, runtime, cases):
        if case == case_of(cases, "LLaMA", "default") and version < "1.24":
            assert "refuses" in outcome, outcome  # opset 23
        else:
            assert outcome.get("error", 1.0) <= case.limit, (case, outcome)


@pytest.mark.parametrize("backend", [Backend.ORT_CPU, Backend.OPENVINO, Backend.REFERENCE])
def test_the_newest_runtimes_run_every_file(backend: Backend, cases: list[Case]) -> None:
    for case, outcome in run_backend(backend, cases, npm=None):
        assert outcome.get("error", 1.0) <= case.limit, (case, outcome)


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
@pytest.mark.skipif(not (NPM / "node_modules").is_dir(), reason="the npm packages are not installed: make runtimes")
@pytest.mark.parametrize("backend", [Backend.ORT_WEB, Backend.ORT_NODE])
def test_javascript_runs_every_file(backend: Backend, cases: list[Case]) -> None:
    for case, outcome in run_backend(backend, cases, npm=NPM):
        assert outcome.get("error", 1.0) <= case.limit, (case, outcome)
