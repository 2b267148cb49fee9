"""The task "lm-eval": scores of lm-eval's own evaluator, data from disk only, and what is asked for in one line."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
from lm_eval import evaluator
from lm_eval.tasks import TaskManager

from ibnorm_export import EvaluationOptions, IBNormError, evaluate, models
from ibnorm_export.evaluation.candidates import exported_candidate
from ibnorm_export.evaluation.harness import IBNormLM
from ibnorm_export.evaluation.harness_tasks import LEADERBOARDS
from ibnorm_export.exporter.text_folder import export_folder
from tests.support.harness_requests import save_harness_checkpoint, words

DATA = "dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {file}\ntest_split: test\nfewshot_split: test\n"
CHOICE = (
    'output_type: multiple_choice\nnum_fewshot: 2\ndoc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\n'
    "doc_to_target: answer\nmetric_list:\n  - metric: acc\n  - metric: acc_norm\n"
)
TEXT = (
    'output_type: generate_until\ndoc_to_text: "{{question}}"\ndoc_to_target: "{{choices[answer]}}"\n'
    'generation_kwargs:\n  until: [" "]\n  max_gen_toks: 4\n'
    "metric_list:\n  - metric: exact_match\n    aggregation: mean\n    higher_is_better: true\n"
)
ROLLING = (
    'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{question}}"\n'
    "metric_list:\n  - metric: word_perplexity\n"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_harness_checkpoint(tmp_path_factory.mktemp("tasks") / "llama")


@pytest.fixture(scope="module")
def exported(checkpoint: Path) -> Path:
    folder = checkpoint.parent / "exported"
    export_folder(models.load(checkpoint, task="text-generation"), folder)
    return folder


@pytest.fixture(scope="module")
def folder(checkpoint: Path) -> Path:
    """Two tasks, and a data set under the name that it would have on the hub."""
    rng = random.Random(3)
    folder = checkpoint.parent / "data"
    hub = folder / "someone" / "questions"
    hub.mkdir(parents=True)
    records = [
        {"question": words(rng, 5), "choices": [words(rng, rng.randint(1, 3)) for _ in range(4)], "answer": n % 4}
        for n in range(24)
    ]
    for file in (folder / "questions.jsonl", hub / "test.jsonl"):
        file.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    own = DATA.format(file="questions.jsonl")
    (folder / "own_choice.yaml").write_text(f"task: own_choice\n{own}{CHOICE}")
    (folder / "own_text.yaml").write_text(f"task: own_text\n{own}{TEXT}")
    return folder


def test_scores_are_those_of_the_harness(exported: Path, checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    """Drawn examples, choices and generated texts; its own evaluator reads the file at an absolute path."""
    options = EvaluationOptions(tokenizer=checkpoint, results=tmp_path / "results", batch=5, max_drop=0.5)
    report = evaluate(exported, task="lm-eval", data=folder, against=checkpoint, options=options)
    metrics = {metric.name: metric.value for metric in report.candidates[1].metrics}
    theirs = tmp_path / "tasks"
    theirs.mkdir()
    own = DATA.format(file=folder / "questions.jsonl")
    (theirs / "a.yaml").write_text(f"task: own_choice\n{own}{CHOICE}")
    (theirs / "b.yaml").write_text(f"task: own_text\n{own}{TEXT}")
    found = evaluator.simple_evaluate(
        IBNormLM(exported, batch_size=8, tokenizer=str(checkpoint)),
        tasks=["own_choice", "own_text"],
        task_manager=TaskManager(include_path=str(theirs), include_defaults=False),
        bootstrap_iters=0,
    )
    assert found is not None
    results = found["results"]
    assert metrics["own_choice acc"] == pytest.approx(results["own_choice"]["acc,none"])
    assert metrics["own_choice acc_norm"] == pytest.approx(results["own_choice"]["acc_norm,none"])
    assert metrics["own_text exact_match"] == pytest.approx(results["own_text"]["exact_match,none"])
    assert 0.0 < metrics["own_choice acc"] < 1.0
    assert metrics["score"] == pytest.approx((metrics["own_choice acc_norm"] + metrics["own_text exact_match"]) / 2)
    assert [comparison.drop for comparison in report.candidates[1].comparisons] == [0.0, 0.0, 0.0]


class StoppingLM(Exception):
    """Stops a run."""


def test_a_stopped_run_goes_on_with_the_same_examples(
    exported: Path, checkpoint: Path, folder: Path, tmp_path: Path
) -> None:
    """Examples are drawn one question after the other, so a run that goes on must draw those before it again."""
    from ibnorm_export.artifacts.exported_model import ExportedModel

    whole = EvaluationOptions(tokenizer=checkpoint, results=tmp_path / "a", batch=4, tasks=("own_choice",))
    evaluate(exported, task="lm-eval", data=folder, options=whole)
    stopped = EvaluationOptions(tokenizer=checkpoint, results=tmp_path / "b", batch=4, tasks=("own_choice",))
    candidate = exported_candidate(ExportedModel(exported), name="exported", options=stopped)
    score, calls = candidate.score, []

    def once(windows: object) -> object:
        calls.append(windows)
        if len(calls) > 4:  # each batch has 16 choices, in two passes
            raise StoppingLM
        return score(windows)  # type: ignore[arg-type]  # passed on

    candidate.score = once  # type: ignore[assignment, method-assign]  # a fake
    with pytest.raises(StoppingLM):
        evaluate(candidate, task="lm-eval", data=folder, options=stopped)
    (journal,) = (tmp_path / "b").glob("*.jsonl")
    assert len(journal.read_text().splitlines()) == 1 + 8
    report = evaluate(exported, task="lm-eval", data=folder, options=stopped)
    assert report.candidates[0].cached == 8
    (expected,) = (tmp_path / "a").glob("*.jsonl")
    assert journal.read_text() == expected.read_text()


def test_a_data_set_of_the_hub_is_found_under_its_name(exported: Path, checkpoint: Path, folder: Path) -> None:
    (folder / "hub.yaml").write_text(
        f"task: hub\ndataset_path: someone/questions\ntest_split: test\nfewshot_split: test\n{CHOICE}"
    )
    options = EvaluationOptions(tokenizer=checkpoint, limit=4, tasks=("hub",))
    report = evaluate(exported, task="lm-eval", data=folder, options=options)
    (folder / "hub.yaml").unlink()
    assert [metric.name for metric in report.candidates[0].metrics] == ["acc_norm", "acc"]
    assert report.candidates[0].samples == 4


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (("nothing",), "there is no task 'nothing'"),
        (("arc_easy",), "task arc_easy: the data set 'allenai/ai2_arc' is not in "),
        ((next(iter(LEADERBOARDS)),), "task arc_challenge: the data set 'allenai/ai2_arc' is not in "),
        (("llm-leaderboard-2",), "and nothing is downloaded; put a copy of it into "),
        (("lost",), "the data file 'lost.jsonl' is not on disk, and nothing is downloaded; put it into "),
        (("url",), "is not on disk, and nothing is downloaded"),
        (("rolling",), "has no score for each question, only ['word_perplexity']; use --task perplexity"),
        (("broken",), "lm-eval cannot make task broken: "),
    ],
)
def test_what_is_missing_is_one_line(
    tasks: tuple[str, ...], message: str, exported: Path, checkpoint: Path, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "questions.jsonl").write_text((folder / "questions.jsonl").read_text())
    for name, file, rest in (
        ("lost", "lost.jsonl", CHOICE),
        ("url", "https://example.com/a.jsonl", CHOICE),
        ("rolling", "questions.jsonl", ROLLING),
        ("broken", "questions.jsonl", "output_type: nonsense\n"),
    ):
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}\n{DATA.format(file=file)}{rest}")
    with pytest.raises(IBNormError, match=re.escape(message)) as caught:
        evaluate(exported, task="lm-eval", data=tmp_path, options=EvaluationOptions(tokenizer=checkpoint, tasks=tasks))
    assert len(str(caught.value).splitlines()) == 1


def test_a_folder_without_tasks(exported: Path, checkpoint: Path, tmp_path: Path) -> None:
    options = EvaluationOptions(tokenizer=checkpoint)
    with pytest.raises(IBNormError, match=re.escape("has no task of lm-eval (a .yaml file with `task:`)")):
        evaluate(exported, task="lm-eval", data=tmp_path, options=options)
    with pytest.raises(IBNormError, match="is not a folder; name one with tasks of lm-eval"):
        evaluate(exported, task="lm-eval", data=tmp_path / "no", options=options)
