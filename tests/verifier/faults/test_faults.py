"""Every planted fault fails and is named, with its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.verifier.faults.planted import FAULTS, Base, Fault, bases, judge


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Base]:
    return bases(tmp_path_factory.mktemp("bases"))


def test_there_are_twenty_faults_and_the_numeric_verdict_finds_most() -> None:
    assert len({fault.name for fault in FAULTS}) >= 20
    assert sum(fault.place != "" for fault in FAULTS) >= 15


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_fails_and_is_named(fault: Fault, files: dict[str, Base], tmp_path: Path) -> None:
    outcome = judge(fault, files[fault.base], tmp_path)
    assert outcome.failed
    assert outcome.named, outcome
    assert outcome.numeric_only == (fault.place != ""), outcome
