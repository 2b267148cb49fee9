"""The replacement for Triton's ONNX Runtime backend: which requests run together, and which rows each gets back.

Triton counts a call of `execute` as one run, however many runs the backend makes, so they can be counted only here.
"""

from __future__ import annotations

import importlib.resources
import runpy
import sys
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest


@dataclass
class Session:
    """Replaces an ONNX Runtime session: doubles its only input, and records its runs."""

    runs: list[tuple[int, ...]] = field(default_factory=list)

    def run(self, names: list[str], feed: dict[str, Any]) -> list[Any]:
        self.runs.append(feed["x"].shape)
        if feed["x"].shape[-1] == 13:
            raise RuntimeError("thirteen columns")
        return [2 * feed["x"] if name == "double" else -feed["x"] for name in names]


def request(array: np.ndarray[Any, Any], *names: str) -> Any:
    return SimpleNamespace(x=array, requested_output_names=lambda: list(names or ["double"]))


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`TritonPythonModel` with a replacement for Triton's Python module."""

    def response(outputs: Any = None, error: Any = None) -> Any:
        return SimpleNamespace(outputs=dict(outputs or ()), error=error)

    triton = SimpleNamespace(
        get_input_tensor_by_name=lambda request, name: getattr(request, name),
        InferenceResponse=response,
        Tensor=SimpleNamespace(from_dlpack=lambda name, array: (name, np.from_dlpack(array))),
        TritonError=str,
    )
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", triton)
    file = importlib.resources.files("ibnorm_export.serving.triton").joinpath("onnxruntime_backend", "model.py")
    made = runpy.run_path(str(file))["TritonPythonModel"]()
    made._session, made._inputs, made._batched = Session(), ["x"], True
    return made


def rows(first: float, count: int, columns: int) -> np.ndarray[Any, Any]:
    """Rows that all differ."""
    return np.repeat(first + np.arange(count, dtype=np.float32)[:, None], columns, axis=1)


def test_equal_shapes_run_once_and_each_request_gets_its_own_rows(backend: Any) -> None:
    work = [rows(1, 1, 4), rows(10, 2, 4), rows(20, 3, 5), rows(30, 1, 4), rows(40, 2, 5)]
    told = backend.execute([request(array) for array in work])
    assert sorted(backend._session.runs) == [(4, 4), (5, 5)]
    for array, answer in zip(work, told, strict=True):
        np.testing.assert_array_equal(answer.outputs["double"], 2 * array)


def test_requests_for_different_outputs_run_separately(backend: Any) -> None:
    told = backend.execute([request(rows(1, 1, 4)), request(rows(2, 1, 4), "minus"), request(rows(3, 1, 4))])
    assert sorted(backend._session.runs) == [(1, 4), (2, 4)]
    np.testing.assert_array_equal(told[1].outputs["minus"], -rows(2, 1, 4))
    np.testing.assert_array_equal(told[2].outputs["double"], 2 * rows(3, 1, 4))


def test_without_batching_every_request_runs_separately(backend: Any) -> None:
    backend._batched = False
    work = [rows(1, 1, 4), rows(10, 1, 4)]
    told = backend.execute([request(array) for array in work])
    assert backend._session.runs == [(1, 4), (1, 4)]
    for array, answer in zip(work, told, strict=True):
        np.testing.assert_array_equal(answer.outputs["double"], 2 * array)


def test_an_error_is_the_answer_to_the_requests_of_its_batch_only(backend: Any) -> None:
    told = backend.execute([request(rows(1, 1, 13)), request(rows(2, 1, 4)), request(rows(3, 1, 13))])
    assert [answer.error for answer in told] == ["thirteen columns", None, "thirteen columns"]
    np.testing.assert_array_equal(told[1].outputs["double"], 2 * rows(2, 1, 4))
