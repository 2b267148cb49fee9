"""The suite `fuzz` finds a defect that is planted in a reader, and makes the same case from the same number."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from benchmarks.fuzzing.readers import READERS
from benchmarks.fuzzing.worker import run_case
from ibnorm_export import parsing

CASES = 60


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2], "top_p": 0.9}))
    return tmp_path


def test_a_number_makes_the_same_case_again() -> None:
    change = READERS["generation_config"].change
    content = json.dumps({"eos_token_id": [1, 2], "top_p": 0.9}).encode()
    cases = [change(content, random.Random(f"generation_config {case}")) for case in range(CASES)]
    assert cases == [change(content, random.Random(f"generation_config {case}")) for case in range(CASES)]
    assert len(set(cases)) > CASES / 2


def test_a_sound_reader_has_no_failure(corpus: Path) -> None:
    answers = [run_case("generation_config", case, corpus=corpus) for case in range(CASES)]
    assert [answer for answer in answers if "failure" in answer] == []
    accepted = sum(answer["accepted"] for answer in answers)
    assert 0 < accepted < CASES, "some cases are legal, others are not"


def test_a_defect_is_found(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsafe(path: Path) -> Any:
        return json.loads(path.read_bytes())  # RecursionError for deeply nested values

    monkeypatch.setattr(parsing, "read_json", unsafe)
    answers = [run_case("generation_config", case, corpus=corpus) for case in range(CASES)]
    failures = [answer for answer in answers if "failure" in answer]
    assert any(answer["failure"].startswith("RecursionError") for answer in failures)
    assert all("Traceback" in answer["where"] for answer in failures)
