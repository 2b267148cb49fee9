"""The evaluation harness: the same figures as its own model `hf`, and as the task "choice"."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

from ibnorm_export import evaluate, models
from ibnorm_export.errors import IBNormError
from ibnorm_export.evaluation.harness import MODEL_NAME, IBNormLM
from ibnorm_export.evaluation.options import EvaluationOptions
from ibnorm_export.exporter.text_folder import export_folder
from tests.support.harness_requests import request_pairs, save_harness_checkpoint, words

#: The log-probability of a request may differ by this much; the file's own error is some 1e-6 of a logit.
CLOSE = 1e-4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_harness_checkpoint(tmp_path_factory.mktemp("harness") / "llama")


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("harness") / "exported"
    export_folder(models.load(checkpoint, task="text-generation"), folder)
    return folder


@pytest.fixture(scope="module")
def own(exported: Path, checkpoint: Path) -> IBNormLM:
    return IBNormLM(str(exported), batch_size=8, tokenizer=str(checkpoint))


@pytest.fixture(scope="module")
def harness(checkpoint: Path) -> HFLM:
    """lm_eval's own model, around the checkpoint's own module."""
    module = models.load(checkpoint, task="text-generation").module
    tokenizer = AutoTokenizer.from_pretrained(str(checkpoint))
    return HFLM(pretrained=module, tokenizer=tokenizer, max_length=64, batch_size=1, device="cpu")


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=args, idx=index, metadata=("test", index, 1))
        for index, args in enumerate(arguments)
    ]


def test_500_log_probabilities_are_those_of_the_harness(own: IBNormLM, harness: HFLM) -> None:
    """Short and long contexts, none, trailing spaces, and more tokens than the model has positions."""
    pairs = request_pairs()
    assert max(len(context) + len(continuation) for context, continuation in pairs) > 65
    found = own.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    expected = harness.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    np.testing.assert_allclose([score for score, _ in found], [score for score, _ in expected], rtol=0, atol=CLOSE)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert any(greedy for _, greedy in own.loglikelihood(requests("loglikelihood", [likeliest(own)])))


def likeliest(own: IBNormLM) -> tuple[str, str]:
    """A context, and the byte that the model thinks likeliest after it."""
    letters = [chr(code) for code in range(32, 127)]
    for context in "abcdefghij":
        scores = own.loglikelihood(requests("loglikelihood", [(context, letter) for letter in letters]))
        if any(greedy for _, greedy in scores):
            return context, letters[[greedy for _, greedy in scores].index(True)]
    raise AssertionError("no context has a printable likeliest byte")


def test_rolling_log_probabilities_are_those_of_the_harness(own: IBNormLM, harness: HFLM) -> None:
    rng = random.Random(1)
    texts: list[tuple[Any, ...]] = [(words(rng, count),) for count in (1, 5, 40, 90)]
    found = own.loglikelihood_rolling(requests("loglikelihood_rolling", texts))
    expected = harness.loglikelihood_rolling(requests("loglikelihood_rolling", texts), disable_tqdm=True)
    np.testing.assert_allclose(found, expected, rtol=0, atol=CLOSE)


def test_generated_texts_are_those_of_the_harness(own: IBNormLM, harness: HFLM) -> None:
    rng = random.Random(2)
    asked: list[tuple[Any, ...]] = [
        (words(rng, count), {"until": [until], "max_gen_toks": 12})
        for count, until in ((2, "\n"), (4, "a"), (30, "zz"), (6, "e"))
    ]
    found = own.generate_until(requests("generate_until", asked), disable_tqdm=True)
    expected = harness.generate_until(requests("generate_until", asked), disable_tqdm=True)
    assert found == expected
    assert any(found)


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(3)
    file = tmp_path_factory.mktemp("harness") / "questions.jsonl"
    records = [
        {"question": words(rng, 5), "choices": [words(rng, rng.randint(1, 3)) for _ in range(4)], "answer": n % 4}
        for n in range(60)
    ]
    file.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return file


@pytest.fixture(scope="module")
def tasks(questions: Path) -> Path:
    """A folder with a task of the harness over the same questions."""
    folder = questions.parent / "tasks"
    folder.mkdir()
    (folder / "own_choice.yaml").write_text(
        f"task: own_choice\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {questions}\n"
        'output_type: multiple_choice\ntest_split: test\ndoc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\n'
        "doc_to_target: answer\nmetric_list:\n  - metric: acc\n  - metric: acc_norm\n"
    )
    return folder


def test_choice_has_the_accuracy_of_the_harness(
    own: IBNormLM, harness: HFLM, exported: Path, questions: Path, tasks: Path, checkpoint: Path
) -> None:
    report = evaluate(exported, task="choice", data=questions, options=EvaluationOptions(tokenizer=checkpoint))
    metrics = {metric.name: metric.value for metric in report.candidates[0].metrics}
    for model in (own, harness):
        found = evaluator.simple_evaluate(
            model,
            tasks=["own_choice"],
            task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
            bootstrap_iters=0,
        )
        assert found is not None
        result = found["results"]["own_choice"]
        assert metrics == {
            "accuracy": pytest.approx(result["acc,none"]),
            "accuracy by length": pytest.approx(result["acc_norm,none"]),
        }
    assert 0.0 < metrics["accuracy"] < 1.0


def test_the_harness_knows_the_model_by_its_name(exported: Path, checkpoint: Path, tasks: Path) -> None:
    assert get_model(MODEL_NAME) is IBNormLM
    command = [sys.executable, "-m", "ibnorm_export.evaluation.harness", "run", "--model", MODEL_NAME, "--limit", "4"]
    arguments = ["--model_args", f"pretrained={exported},tokenizer={checkpoint}", "--tasks", "own_choice"]
    finished = subprocess.run(
        [*command, *arguments, "--include_path", str(tasks)], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    assert "own_choice" in finished.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [({"batch_size": "auto"}, "whole number"), ({"backend": "ort"}, "ort-cpu")],
)
def test_a_wrong_option_is_one_clear_error(exported: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(IBNormError, match=message):
        IBNormLM(str(exported), **options)
