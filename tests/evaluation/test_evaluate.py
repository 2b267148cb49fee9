"""Journals, resuming and comparing: what holds for every task."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from ibnorm_export import EvaluationOptions, IBNormError, evaluate
from ibnorm_export.benchmark.statistics import Decision
from ibnorm_export.evaluation.report import EvaluationReport
from ibnorm_export.files import lock_file
from tests.support.fake_candidates import FakeCandidate

SAMPLES = 400


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images whose first pixel is the class and whose second one is the number of the image."""
    file = tmp_path_factory.mktemp("data") / "images.npz"
    images = np.zeros((SAMPLES, 1, 1, 2), dtype=np.float32)
    images[:, 0, 0, 0] = np.arange(SAMPLES) % 4
    images[:, 0, 0, 1] = np.arange(SAMPLES)
    np.savez(file, images=images, labels=np.arange(SAMPLES) % 4)
    return file


def answers(wrong: set[int]) -> object:
    """A rule that is right on every image but these."""

    def rule(images: NDArray[np.float32]) -> NDArray[np.float32]:
        label, number = images[:, 0, 0, 0].astype(int), images[:, 0, 0, 1].astype(int)
        logits = np.zeros((len(images), 4), dtype=np.float32)
        chosen = [(one + 1) % 4 if which in wrong else one for one, which in zip(label, number, strict=True)]
        logits[np.arange(len(images)), chosen] = 3.0
        return logits

    return rule


def candidate(name: str, wrong: set[int], **settings: object) -> FakeCandidate:
    return FakeCandidate(name, answers(wrong), **settings)  # type: ignore[arg-type]  # settings by name


def run(
    data: Path, *candidates: FakeCandidate, results: Path | None = None, max_drop: float = 0.02
) -> EvaluationReport:
    reference, *others = candidates
    options = EvaluationOptions(batch=10, results=results, max_drop=max_drop)
    return evaluate(others, task="classification", data=data, against=reference, options=options)


def test_equal_answers_pass(data: Path) -> None:
    report = run(data, candidate("reference", {1, 2}), candidate("same", {1, 2}))
    assert report
    assert report.decision is Decision.PASS
    assert str(report).endswith("verdict: pass")
    assert report.candidates[1].changed == 0


def test_a_real_drop_fails_and_lists_the_changed_answers(data: Path) -> None:
    report = run(data, candidate("reference", {0}), candidate("worse", set(range(60))))
    assert not report
    (first, *_) = report.candidates[1].comparisons
    assert first.drop == pytest.approx(59 / SAMPLES)
    assert first.details["lost"] == 59
    assert first.details["McNemar p"] < 1e-15
    assert report.candidates[1].changed == 59
    assert report.candidates[1].changed_answers[0].sample == "images.npz:1"
    assert (report.candidates[1].changed_answers[0].reference, report.candidates[1].changed_answers[0].candidate) == (
        "1",
        "2",
    )
    assert "FAIL worse against reference: drop of top-1 +14.750%" in str(report)


def test_a_drop_at_the_limit_cannot_be_decided(data: Path) -> None:
    report = run(data, candidate("reference", set()), candidate("near", set(range(6))))
    assert report.decision is Decision.CANNOT_TELL
    assert report  # as for latencies, only a failure is false
    assert "samples would decide" in str(report)


def test_a_stopped_run_goes_on_where_it_was(data: Path, tmp_path: Path) -> None:
    whole = run(data, candidate("reference", {3}), candidate("other", {3, 200}), results=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(
            data,
            candidate("reference", {3}),
            candidate("other", {3, 200}, stop_after=13),
            results=tmp_path / "stopped",
        )
    journal = next((tmp_path / "stopped").glob("other-*.jsonl"))
    with journal.open("a", encoding="utf-8") as stream:
        unfinished = next((tmp_path / "whole").glob("other-*.jsonl")).read_text(encoding="utf-8").splitlines()[131:134]
        stream.write("\n".join([*unfinished[:2], unfinished[2][:20]]))  # two samples of a batch, and half a line
    reference, other = candidate("reference", {3}), candidate("other", {3, 200})
    again = run(data, reference, other, results=tmp_path / "stopped")
    assert (reference.calls, other.calls) == (26, 27)
    assert [replace(c, seconds=0.0, cached=0) for c in again.candidates] == [
        replace(c, seconds=0.0, cached=0) for c in whole.candidates
    ]
    for ours, theirs in zip(again.files, whole.files, strict=True):
        journal, other_journal = Path(ours).with_suffix(".jsonl"), Path(theirs).with_suffix(".jsonl")
        assert journal.read_bytes() == other_journal.read_bytes()


def test_results_of_each_sample_are_written_as_parquet(data: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="the extra `evaluate` is not installed")
    report = run(data, candidate("reference", {3}), candidate("other", set()), results=tmp_path)
    table = parquet.read_table(report.files[0]).to_pydict()
    assert table["sample"][:2] == ["images.npz:0", "images.npz:1"]
    assert table["correct"] == [float(index != 3) for index in range(SAMPLES)]
    assert table["answer"][3] == "0"


def test_without_pyarrow_results_stay_json_lines(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    report = run(data, candidate("reference", {3}), candidate("other", set()), results=tmp_path)
    assert all(file.endswith(".jsonl") for file in report.files)
    assert "note: results stay in .jsonl: writing parquet needs the package pyarrow" in str(report)


def test_results_that_are_there_are_not_computed_again(data: Path, tmp_path: Path) -> None:
    run(data, candidate("reference", {3}), candidate("first", set()), results=tmp_path)
    reference, second = candidate("reference", {3}), candidate("second", set())
    report = run(data, reference, second, results=tmp_path)
    assert (reference.calls, second.calls) == (0, SAMPLES / 10)
    assert report.candidates[0].cached == SAMPLES


def test_other_weights_of_the_same_name_are_computed_again(data: Path, tmp_path: Path) -> None:
    run(data, candidate("reference", {3}), candidate("other", set()), results=tmp_path)
    retrained = candidate("reference", {3, 4}, identity="other weights")
    run(data, retrained, candidate("other", set()), results=tmp_path)
    assert retrained.calls == SAMPLES / 10


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("candidate", "has results of another checkpoint, file or runtime"),
        ("data", "has results of other data"),
        ("settings", "has results of other settings"),
    ],
)
def test_the_cache_of_something_else_is_refused(data: Path, tmp_path: Path, entry: str, message: str) -> None:
    run(data, candidate("reference", {3}), candidate("other", set()), results=tmp_path)
    journal = next(tmp_path.glob("reference-*.jsonl"))
    head, rest = journal.read_text(encoding="utf-8").split("\n", 1)
    changed = json.dumps({**json.loads(head), entry: "0" * 64})
    journal.write_text(f"{changed}\n{rest}", encoding="utf-8")
    with pytest.raises(IBNormError, match=message):
        run(data, candidate("reference", {3}), candidate("other", set()), results=tmp_path)


def test_a_damaged_line_is_named(data: Path, tmp_path: Path) -> None:
    run(data, candidate("reference", {3}), candidate("other", set()), results=tmp_path)
    journal = next(tmp_path.glob("reference-*.jsonl"))
    lines = journal.read_text(encoding="utf-8").split("\n")
    lines[5] = "[1, 2"
    journal.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(IBNormError, match=r"line 6 is damaged"):
        run(data, candidate("reference", {3}), candidate("other", set()), results=tmp_path)


def test_two_candidates_of_one_name_are_refused(data: Path) -> None:
    with pytest.raises(IBNormError, match="2 candidates are called same"):
        run(data, candidate("same", set()), candidate("same", {1}))


def test_a_model_whose_outputs_are_not_numbers_fails(data: Path) -> None:
    def broken(images: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.full((len(images), 4), np.nan, dtype=np.float32)

    report = run(data, candidate("reference", set()), FakeCandidate("broken", broken))
    assert not report
    assert report.candidates[1].metrics[0].value == 0.0
    assert report.candidates[1].changed_answers[0].candidate == "not a number"


def test_the_time_that_is_left_is_shown(data: Path) -> None:
    shown: list[str] = []
    options = EvaluationOptions(batch=10)
    evaluate(
        candidate("one", set()),
        task="classification",
        data=data,
        options=options,
        progress=lambda what, done, total: shown.append(f"{what} {done}/{total}"),
    )
    assert any(text.startswith("one, ") and text.endswith(f" left 390/{SAMPLES}") for text in shown)


def test_a_sample_that_only_one_candidate_could_read_is_an_error(data: Path, tmp_path: Path) -> None:
    """Else their pairs are shifted against each other."""
    run(data, candidate("reference", {3}), candidate("other", set()), results=tmp_path)
    journal = next(tmp_path.glob("reference-*.jsonl"))
    lines = journal.read_text(encoding="utf-8").split("\n")
    lines[5] = json.dumps(["images.npz:4", "", [], "not enough memory"])
    journal.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(IBNormError, match=r"do not have the same samples; they differ at 'images.npz:4': remove both"):
        run(data, candidate("reference", {3}), candidate("other", set()), results=tmp_path)


def test_two_runs_do_not_write_into_one_journal(data: Path, tmp_path: Path) -> None:
    stopped = candidate("reference", {3}, stop_after=4)
    with pytest.raises(KeyboardInterrupt):
        run(data, stopped, candidate("other", set()), results=tmp_path)
    journal = next(tmp_path.glob("reference-*.jsonl"))
    with journal.open("ab") as stream:
        lock_file(stream)
        with pytest.raises(IBNormError, match=r"another evaluation is writing .*reference-.*wait until it ends"):
            run(data, candidate("reference", {3}), candidate("other", set()), results=tmp_path)
    assert (
        run(data, candidate("reference", {3}), candidate("other", set()), results=tmp_path).candidates[0].cached == 40
    )


def test_more_results_than_samples_are_refused(data: Path, tmp_path: Path) -> None:
    run(data, candidate("reference", {3}), candidate("other", set()), results=tmp_path)
    journal = next(tmp_path.glob("reference-*.jsonl"))
    head, rest = journal.read_text(encoding="utf-8").split("\n", 1)
    journal.write_text(f"{head}\n{rest}{rest}", encoding="utf-8")
    with pytest.raises(IBNormError, match=r"has 800 results for 400 samples: remove it"):
        run(data, candidate("reference", {3}), candidate("other", set()), results=tmp_path)


def test_names_that_look_alike_in_a_file_name_have_their_own_journals(data: Path, tmp_path: Path) -> None:
    same = [candidate(name, {3}, identity="one file") for name in ("моя", "твоя")]
    report = run(data, *same, results=tmp_path)
    assert len(list(tmp_path.glob("*.jsonl"))) == 2
    assert [c.samples for c in report.candidates] == [SAMPLES, SAMPLES]


def test_the_seed_draws_the_resamples(data: Path) -> None:
    def interval(seed: int) -> tuple[float, float]:
        options = EvaluationOptions(seed=seed)
        report = evaluate(candidate("one", {1, 2, 3}), task="classification", data=data, options=options)
        (error,) = (m for m in report.candidates[0].metrics if m.name == "calibration error")
        return error.low, error.high

    assert interval(1) == interval(1)
    assert interval(1) != interval(2)
