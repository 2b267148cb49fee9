"""The table of runtimes in docs/compatibility.md: what a record becomes, and how a runtime's results are judged."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.suites.runtimes import row_of, run_environment
from benchmarks.suites.runtimes_cases import FORMS, Case
from benchmarks.suites.runtimes_page import between_marks, table
from benchmarks.suites.runtimes_worker import largest_error


def row(
    model: str, outcome: dict[str, Any], *, form: str = "default", version: str = "1.9.0", limit: float = 2e-6
) -> dict[str, Any]:
    case = Case(model, form, folder=Path(), limit=limit)
    return row_of(case, outcome, runtime="onnxruntime", version=version).to_dict()


def test_errors_count_where_values_are_valid() -> None:
    expected = {"y": np.array([[1.0, -4.0], [9.0, 9.0]])}
    valid = {"y": np.array([[True, True], [False, False]])}
    found = {"y": np.array([[1.0, -4.5], [np.nan, 0.0]], np.float32)}
    assert largest_error(found, expected, valid) == 0.125
    assert largest_error({"y": np.full((2, 2), np.nan)}, expected, valid) == float("inf")
    with pytest.raises(ValueError, match=r"output y has shape \(2,\)"):
        largest_error({"y": np.zeros(2)}, expected, valid)


def test_the_table_names_what_is_wrong_and_why_files_are_refused() -> None:
    rows = [
        row("ViT", {"error": 3e-7}),
        row("LLaMA", {"error": 1e-6}),
        row("ViT", {"error": 1e-7}, version="1.10.0"),
        row("ViT", {"error": 1e-7}, version="1.10.0", form="int8"),
        row("LLaMA", {"error": 0.25}, version="1.10.0"),
        row("ResNet", {"error": float("inf")}, version="1.10.0"),
        row("GPT-2", {"refuses": "no | operator"}, form="int4"),
        row("LLaMA", {"refuses": "no | operator"}, form="int4"),
    ]
    assert table(rows).splitlines() == [
        "| files with functions | default | int8 | int4 |",
        "|---|---|---|---|",
        "| ONNX Runtime 1.9.0 | 1e-06 | not run | refuses [1] |",
        "| ONNX Runtime 1.10.0 | LLaMA **wrong: 2e-01**; ViT 1e-07; ResNet **wrong: NaN** | 1e-07 | not run |",
        "",
        "Reasons of refusals:",
        "",
        "1. no \\| operator",
    ]


def test_a_runtime_that_ran_one_form_has_a_column_for_each_model() -> None:
    rows = [
        *(row("ViT", {"error": 3e-7}, form=form) for form in ("default", "int4")),
        row("ViT", {"error": 1e-7}, version="1.10.0"),
        row("LLaMA", {"error": 0.25}, version="1.10.0"),
        row("ResNet", {"refuses": "no operator"}, version="1.10.0"),
    ]
    assert table(rows).splitlines() == [
        "| files with functions | default | int4 |",
        "|---|---|---|",
        "| ONNX Runtime 1.9.0 | 3e-07 | 3e-07 |",
        "",
        "| one form only | form | LLaMA | GPT-2 | ViT | ResNet |",
        "|---|---|---|---|---|---|",
        "| ONNX Runtime 1.10.0 | default | **wrong: 2e-01** | not run | 1e-07 | refuses [1] |",
        "",
        "Reasons of refusals:",
        "",
        "1. no operator",
    ]


def test_an_error_that_pytorch_explains_is_shown_with_pytorchs() -> None:
    rows = [
        row("ViT", {"error": 1e-3}, form="fp16", limit=2e-3),
        row("GPT-2", {"error": 2.34e-3}, form="fp16", limit=6e-3),
        row("GPT-2", {"error": 6.1e-3}, form="fp16", version="1.10.0", limit=6e-3),
    ]
    assert table(rows).splitlines()[2:] == [
        "| ONNX Runtime 1.9.0 | 2.3e-03 (PyTorch 3.0e-03) |",
        "| ONNX Runtime 1.10.0 | **wrong: 6e-03** |",
    ]


def test_files_of_for_have_their_own_table() -> None:
    rows = [
        row("ViT", {"error": 3e-7}),
        row("ViT", {"error": 1e-7}, form="for ort>=1.18, fp32", version="1.18.1"),
        row("LLaMA", {"refuses": "no int8"}, form="for ort>=1.18, int8", version="1.18.1"),
    ]
    assert table(rows).splitlines()[2:] == [
        "| ONNX Runtime 1.9.0 | 3e-07 |",
        "",
        "| files of | fp32 | fp16 | cache, fp32 | cache, fp16 | int8 | int4 |",
        "|---|---|---|---|---|---|---|",
        "| `--for ort>=1.18`: ONNX Runtime 1.18.1 | 1e-07 | not run | not run | not run | refuses [1] | not run |",
        "",
        "Reasons of refusals:",
        "",
        "1. no int8",
    ]


def test_a_file_for_a_runtime_runs_there_only() -> None:
    old, web = FORMS["for ort>=1.18, fp32"], FORMS["for web, int4"]
    assert [old.runs_on("onnxruntime", version) for version in ("1.18.1", "1.24.4")] == [True, False]
    assert [web.runs_on(runtime, "1.30.0") for runtime in ("ort-web", "ort-node", "ort-cpu")] == [True, True, False]
    assert FORMS["default"].runs_on("tract", "0.23.9")


def test_wrong_numbers_miss_the_target() -> None:
    case = Case("ViT", "default", folder=Path(), limit=2e-6)
    for error, met in ((2e-6, True), (3e-6, False), (float("inf"), False)):
        assert row_of(case, {"error": error}, runtime="onnxruntime", version="1.24.4").met is met
        assert row_of(case, {"error": error}, runtime="openvino-default", version="1").met is None
    assert row_of(case, {"refuses": "no operator"}, runtime="onnxruntime", version="1.24.4").met is None


def test_only_the_part_between_the_marks_is_replaced() -> None:
    page = "a\n<!-- x: written by a command -->\nold\n<!-- end of x -->\nb\n"
    new = between_marks(page, "new", name="x")
    assert new == "a\n<!-- x: written by a command -->\nnew\n\n<!-- end of x -->\nb\n"
    assert between_marks(new, "new", name="x") == new
    with pytest.raises(ValueError, match="the page has no lines"):
        between_marks("a", "new", name="x")


def test_a_file_that_ends_the_process_does_not_end_the_suite(tmp_path: Path) -> None:
    """The first file ends the interpreter; the second is still run."""
    cases = []
    for name in ("first", "second"):
        folder = tmp_path / name
        folder.mkdir()
        for kind in ("inputs", "expected", "valid"):
            np.savez(folder / f"{kind}.npz", y=np.ones(2))
        cases.append(Case("ViT", name, folder=folder, limit=2e-6))
    package = tmp_path / "onnxruntime.py"
    package.write_text(
        "import os\n"
        "class SessionOptions: pass\n"
        "class InferenceSession:\n"
        "    def __init__(self, path, options, providers):\n"
        "        if 'first' in path: os._exit(7)\n"
        "        raise ValueError('has no such operator')\n",
        encoding="utf-8",
    )
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    outcomes = {case.form: outcome for case, outcome in run_environment(python, "onnxruntime", cases)}
    assert outcomes == {
        "first": {"refuses": "its process ends with code 7"},
        "second": {"refuses": "has no such operator"},
    }
