"""The steps of the numeric verdict: what each adds, and what is closed after them."""

from __future__ import annotations

import numpy as np
import pytest

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.errors import ModelFileError
from ibnorm_export.findings.code import FindingCode
from ibnorm_export.runtimes.ort import OrtRunner
from ibnorm_export.verifier.comparison import Comparison
from ibnorm_export.verifier.report import Finding, MappingReport
from ibnorm_export.verifier.steps import NOTHING, Part, run_steps
from tests.support.comparisons import compare_runners

WRONG, RIGHT = MappingReport((), (), error=1.0, tolerance=0.1), MappingReport((), (), error=0.0, tolerance=0.1)


def test_a_later_part_adds_to_an_earlier_one_and_hides_nothing() -> None:
    first = Part("one", 3, findings=(Finding("a", "b", code=FindingCode.NORM_DIFFERS),), mapping=WRONG, explained=True)
    joined = first + Part(findings=(Finding("c", "d", code=FindingCode.NORM_DIFFERS),), notes=("n",))
    assert [finding.where for finding in joined.findings] == ["a", "c"]
    assert (joined.method, joined.samples, joined.mapping, joined.explained) == ("one", 3, WRONG, True)
    assert joined.notes == ("n",)
    assert (Part(mapping=RIGHT) + Part(mapping=WRONG)).mapping is WRONG, "a report that failed is false, but not absent"
    assert first + NOTHING == first == NOTHING + first


@pytest.fixture
def comparison(exported_llama: ExportedModel, llama: LoadedModel) -> Comparison:
    runners = {"as functions": OrtRunner(exported_llama.path)}
    inputs = [llama.sample(np.random.default_rng(0), 0)]
    return compare_runners(exported_llama, llama, runners=runners, inputs=inputs)


def test_each_step_knows_what_was_found_before_it(comparison: Comparison) -> None:
    def first(_comparison: Comparison, found: Part) -> Part:
        assert found == NOTHING
        return Part(notes=("first",))

    def second(_comparison: Comparison, found: Part) -> Part:
        return Part(notes=(f"after {found.notes[0]}",))

    found = run_steps(comparison, (first, second))
    assert found.notes == ("first", "after first")
    assert found.report(comparison).notes == found.notes
    assert not found.report(comparison), "nothing was compared"


@pytest.mark.parametrize("fails", [False, True])
def test_sessions_are_closed_after_the_steps(
    comparison: Comparison, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    closed = []
    monkeypatch.setattr(type(comparison.variants), "close", lambda self: closed.append(self))

    def step(_comparison: Comparison, _found: Part) -> Part:
        if fails:
            raise ModelFileError("the runtime stops")
        return NOTHING

    if fails:
        with pytest.raises(ModelFileError, match="the runtime stops"):
            run_steps(comparison, (step,))
    else:
        run_steps(comparison, (step,))
    assert closed == [comparison.variants]
