"""The frame that every benchmark suite runs in: rows, targets, turns, records and exit codes."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from benchmarks import run
from benchmarks.outcomes import Outcomes
from benchmarks.report import Report
from benchmarks.rows import Figure, Row, Target, limited
from benchmarks.turns import compare, take_turns

SUITES = Path(run.__file__).parent / "suites"


@pytest.mark.parametrize("name", run.SUITES)
def test_every_suite_has_the_two_functions(name: str) -> None:
    """Read, not imported: some suites need packages that are installed only for them."""
    tree = ast.parse((SUITES / f"{name}.py").read_text(encoding="utf-8"))
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert {"add_options", "measure"} <= functions
    assert ast.get_docstring(tree)


def test_a_row_meets_its_targets() -> None:
    figures = {"ratio": Figure(1.01), "high": Figure(1.02)}
    assert Row("without a target", figures).met is None
    assert Row("above", figures, targets=(Target("ratio", 1.0),)).met is False
    assert Row("alternative", figures, targets=(Target("ratio", 1.0, alternative=Target("high", 1.03)),)).met is True
    assert Row("both", figures, targets=(Target("ratio", 1.1), Target("high", 1.0))).met is False
    assert limited("at least", 3, at_least=3, note="").met is True
    assert limited("at most", 4, at_most=3, note="").met is False


def test_outcomes_continue_and_the_last_of_a_case_counts(tmp_path: Path) -> None:
    mine, other = (Outcomes(tmp_path, key=("group", "form")) for _ in range(2))
    assert mine.read() == {}
    mine.add({"group": "a", "form": "x", "found": 1})
    other.add({"group": "a", "form": "y", "found": 2})
    mine.add({"group": "a", "form": "x", "found": 3})
    assert {key: outcome["found"] for key, outcome in other.read().items()} == {("a", "x"): 3, ("a", "y"): 2}


def test_candidates_take_turns_in_both_directions() -> None:
    calls: list[str] = []

    def candidate(name: str, seconds: float) -> float:
        calls.append(name)
        return seconds

    candidates = {"a": lambda: candidate("a", 2.0), "b": lambda: candidate("b", 1.0)}
    times = take_turns(candidates, rounds=9, repeats=1, warmup=1, rest_s=0.0)
    assert calls[:10] == ["a", "b", *("a", "a", "b", "b"), *("b", "b", "a", "a")]  # one untimed pass opens each turn
    assert compare(times, "a", over="b")["time over baseline"].value == 2.0


def test_a_record_is_the_printed_object(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    with (tmp_path / "lines").open("w") as lines:
        report = Report("op_cpu", record=record, lines=lines)
        report.add(limited("case", 1.0, at_most=2.0, note="noted"))
    report.save()
    assert (tmp_path / "lines").read_text() == "met    case: value 1 (value at most 2); noted\n"
    found = json.loads(record.read_text())
    assert found["suite"] == "op_cpu"
    assert found["met"] is True
    assert found["rows"][0]["figures"] == {"value": {"value": 1.0, "unit": ""}}
    assert {"date", "processor", "packages"} <= found["environment"].keys()


def test_an_unknown_suite_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["op"]) == 2
    assert "'op' is not a suite; the suites are op_cpu" in capsys.readouterr().err
    assert run.main(["--help"]) == 0
    usage = capsys.readouterr().out
    assert all(name in usage for name in run.SUITES)
