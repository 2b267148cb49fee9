"""Times of the cases of one comparison: each part's cases share its seconds, and nothing is lost."""

from __future__ import annotations

import pytest

from ibnorm_export.gate import step_times
from ibnorm_export.gate.case import Case, Outcome
from ibnorm_export.gate.step_times import StepTimes


def case(name: str) -> Case:
    return Case("m", name, outcome=Outcome.PASS)


def test_cases_share_the_seconds_of_their_part(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 5.0, 7.0, 8.0])
    monkeypatch.setattr(step_times.time, "perf_counter", lambda: next(now))
    seen = []
    times = StepTimes(lambda *step: seen.append(step))
    for what in ("read", "run a", "run b"):  # 1 s before them, 4 s, 2 s and 1 s
        times(what, 0, 0)
    cases = times.share(
        [case("read"), case("a 1"), case("a 2"), case("other")],
        of_case=lambda one: one.name.split()[0] if one.name != "other" else "",
        of_step=lambda step: step.split()[-1] if step != "preparing" else "",
    )
    rest = (1.0 + 1.0) / 4  # before the first step, and a part that no case belongs to
    assert [one.seconds for one in cases] == [4.0 + rest, 1.0 + rest, 1.0 + rest, rest]
    assert [what for what, *_ in seen] == ["read", "run a", "run b"]
