"""Tasks of EleutherAI's lm-evaluation-harness as one task of `evaluate`: the same prompts, the same scores, paired.

Requests are built, filtered and scored by lm_eval's own task objects. What is added is that several candidates answer
the same questions batch by batch, that a stopped run goes on, and that differences have intervals. Data sets come from
disk only.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from ibnorm_export.errors import IBNormError, quoted, shortened
from ibnorm_export.evaluation.options import EvaluationOptions
from ibnorm_export.evaluation.report import ClassResult, Comparison, Metric
from ibnorm_export.evaluation.samples import Candidate, Measurement, PerSampleResult, ResultTable, Sample
from ibnorm_export.evaluation.shares import compare_means, mean_metric
from ibnorm_export.evaluation.tokenizers import common_positions, find_tokenizer
from ibnorm_export.files import sha256_of
from ibnorm_export.optional_packages import import_package

__all__ = ["LEADERBOARDS", "HarnessTasks", "harness_tasks"]

_EXTRA: Final = {"extra": "lm-eval", "purpose": "--task lm-eval"}

#: Questions that a candidate is asked about at a time, unless --batch states another number.
_BATCH: Final = 4

#: The seed with which lm_eval itself draws the examples of a prompt.
_SEED: Final = 1234

#: The tasks of the two LLM Leaderboards, with the number of examples in each prompt; None is the task's own.
#: Source: the "About" pages of the Open LLM Leaderboard, versions 1 and 2.
LEADERBOARDS: Final[Mapping[str, Mapping[str, int | None]]] = {
    "llm-leaderboard-1": {
        "arc_challenge": 25,
        "hellaswag": 10,
        "mmlu": 5,
        "truthfulqa_mc2": 0,
        "winogrande": 5,
        "gsm8k": 5,
    },
    "llm-leaderboard-2": {"leaderboard": None},
}

#: The score of a task is the first of these that it has; else its first metric.
_PREFERRED: Final = ("acc_norm", "acc", "exact_match")

#: Builders of `datasets` that read files which the task names.
_FORMATS: Final = ("json", "csv", "parquet", "text", "arrow")


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A task of lm_eval.

    Args:
        name: its name.
        task: lm_eval's object.
        total: number of its questions that are asked.
        metrics: its metrics that are means over questions and of which more is better; the first is its score.
    """

    name: str
    task: Any
    total: int
    metrics: tuple[str, ...]


class _LocalDatasets:
    """Stands in for the package `datasets` in lm_eval while tasks are made: it loads what is on disk, and nothing else.

    Args:
        package: the package.
        folder: where data sets are, each under the name that it has on the hub.
    """

    def __init__(self, package: Any, folder: Path) -> None:
        self._package, self._folder = package, folder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._package, name)

    def load_dataset(self, path: str, name: str | None = None, **options: Any) -> Any:
        """Load a data set.

        Raises:
            IBNormError: it is not on disk.
        """
        for key in ("token", "revision", "trust_remote_code", "download_mode"):
            options.pop(key, None)
        if path in _FORMATS:
            options["data_files"] = self._files(options.get("data_files"))
            return self._package.load_dataset(path, name, **options)
        place = Path(path) if Path(path).is_absolute() else self._folder / path
        if not place.is_dir():
            raise IBNormError(
                f"the data set {quoted(path)} is not in {self._folder}, and nothing is downloaded; put a copy of it "
                f"into {place}, e.g. hf download {path} --repo-type dataset --local-dir {place}"
            )
        if (place / "dataset_dict.json").is_file():
            return self._package.load_from_disk(str(place))
        return self._package.load_dataset(str(place), name, **options)

    def _files(self, named: Any) -> Any:
        if isinstance(named, Mapping):
            return {split: self._files(files) for split, files in named.items()}
        if isinstance(named, (list, tuple)):
            return [self._files(file) for file in named]
        place = self._folder / str(named)
        if "://" in str(named) or not (place.is_file() or any(self._folder.glob(str(named)))):
            raise IBNormError(
                f"the data file {quoted(named)} is not on disk, and nothing is downloaded; put it into {place}"
            )
        return str(place)


@contextlib.contextmanager
def _from_disk(folder: Path) -> Iterator[None]:
    """While tasks are made, lm_eval finds data sets in `folder`, and the packages that download are offline.

    lm_eval's remarks on settings that a task leaves out, and the progress bars of `datasets`, are not shown.
    """
    module: Any = import_package("lm_eval.api.task", **_EXTRA)
    package: Any = import_package("datasets", **_EXTRA)
    settings, bars = package.config, package.utils.are_progress_bars_disabled()
    hub: Any = import_package("huggingface_hub.constants", **_EXTRA)
    logger = logging.getLogger("lm_eval")
    before = module.datasets, settings.HF_HUB_OFFLINE, hub.HF_HUB_OFFLINE, logger.level
    module.datasets = _LocalDatasets(module.datasets, folder.absolute())
    settings.HF_HUB_OFFLINE = hub.HF_HUB_OFFLINE = True
    logger.setLevel(logging.ERROR)
    package.disable_progress_bars()
    try:
        yield
    finally:
        module.datasets, settings.HF_HUB_OFFLINE, hub.HF_HUB_OFFLINE, level = before
        logger.setLevel(level)
        if not bars:
            package.enable_progress_bars()


def _load(folder: Path, names: Sequence[str]) -> list[Any]:
    """The tasks that are named, or all of the folder's own, as lm_eval's objects.

    Raises:
        IBNormError: there is no such task, its data is not on disk, or it cannot be made.
    """
    tasks = import_package("lm_eval.tasks", **_EXTRA)
    own = tasks.TaskManager(include_path=str(folder), include_defaults=False)
    if not names and not own.all_subtasks:
        raise IBNormError(
            f"{folder} has no task of lm-eval (a .yaml file with `task:`); put one there, or name tasks of lm-eval's "
            f"own with --tasks, e.g. {', '.join(LEADERBOARDS)}"
        )
    wanted: dict[str, int | None] = {}
    for name in names or own.all_subtasks:
        wanted.update(LEADERBOARDS.get(name, {name: None}))
    manager = own if all(name in own.task_index for name in wanted) else tasks.TaskManager(include_path=str(folder))
    found = []
    for name, examples in wanted.items():
        if name not in manager.task_index:
            raise IBNormError(
                f"there is no task {quoted(name)}; {folder} has {quoted(own.all_subtasks)}, further ones are lm-eval's "
                f"own (`lm-eval ls tasks`) and {', '.join(LEADERBOARDS)}"
            )
        try:
            with _from_disk(folder):
                made = list(manager.load([name])["tasks"].values())
        except IBNormError as error:
            raise IBNormError(f"task {name}: {error}") from error
        except Exception as error:  # the user's YAML and its functions run here, and may raise anything
            what = f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
            raise IBNormError(f"lm-eval cannot make task {name}: {shortened(what)}") from error
        for task in made:
            if examples is not None:
                task.set_config(key="num_fewshot", value=examples)
            elif task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
        found += made
    return found


class HarnessTasks:
    """The task "lm-eval"; see `EvaluationTask`. A sample is a question of one of lm_eval's tasks.

    Args:
        tasks: the tasks.
        lm: a model of lm_eval, for which candidates take turns.
        facts: what results depend on besides the data.
        batch: questions that a candidate is asked about at a time.
        seed: seed of the bootstrap.
    """

    name = "lm-eval"

    def __init__(
        self, tasks: Sequence[_Loaded], lm: Any, *, facts: Mapping[str, Any], batch: int, seed: int = 0
    ) -> None:
        self._seed = seed
        self._tasks = tuple(tasks)
        self._lm = lm
        self._facts = facts
        self.batch = batch
        self.total = sum(task.total for task in tasks)
        self._metrics = tuple(dict.fromkeys(name for task in tasks for name in task.metrics))
        self.data_sha256 = sha256_of("".join(_content(task) for task in tasks).encode())
        self.columns = ("task", "score", *self._metrics)
        self.notes: tuple[str, ...] = ()

    @property
    def settings(self) -> Mapping[str, Any]:
        """What results depend on."""
        return {"task": self.name, "batch": self.batch, **self._facts}

    def samples(self, start: int) -> Iterator[Sample]:
        """Yield the questions from number `start` on. Prompts are built from the first one on: examples are drawn."""
        number = 0
        for index, loaded in enumerate(self._tasks):
            loaded.task.set_fewshot_seed(seed=_SEED)
            for place, document in itertools.islice(loaded.task.doc_iterator(), loaded.total):
                requests = _requests(loaded, document, place)
                if number >= start:
                    yield Sample(f"{loaded.name}:{place}", (index, document, requests))
                number += 1

    def answer(self, candidate: Candidate, samples: Sequence[Sample]) -> Sequence[PerSampleResult]:
        """Ask a candidate about questions, and return a result for each.

        Raises:
            IBNormError: a task has no score for each question.
        """
        self._lm.candidate = candidate
        asked = [request for sample in samples for request in sample.content[2]]
        for request in asked:
            request.resps.clear()
        for kind in dict.fromkeys(request.request_type for request in asked):
            several = [r for r in asked if r.request_type == kind for _ in range(r.repeats or 1)]
            for request, answer in zip(several, getattr(self._lm, kind)(several, disable_tqdm=True), strict=True):
                request.resps.append(answer)
        return [self._result(sample) for sample in samples]

    def _result(self, sample: Sample) -> PerSampleResult:
        index, document, requests = sample.content
        loaded = self._tasks[index]
        loaded.task._instances = requests  # lm_eval's filters work on the instances of the task
        for request in requests:
            request.filtered_resps.clear()
        loaded.task.apply_filters()
        first = next(iter(requests[0].filtered_resps))
        answers = [request.filtered_resps[first] for request in requests]
        scores = loaded.task.process_results(document, answers)
        found = {name: float(scores[name]) for name in loaded.metrics if _is_number(scores.get(name))}
        if loaded.metrics[0] not in found:
            raise IBNormError(f"{sample.name} has no number for {loaded.metrics[0]}: {quoted(scores)}")
        score = found[loaded.metrics[0]]
        values = (float(index), score, *(found.get(name, math.nan) for name in self._metrics))
        return PerSampleResult(sample.name, _shown(requests, answers, score), values=values)

    def truth(self, result: PerSampleResult) -> str:
        """The right answer is not shown: lm_eval's tasks state it in many forms."""
        return ""

    def measure(self, table: ResultTable) -> Measurement:
        """The mean score of all questions, the mean of the tasks, and every metric of every task."""
        parts = [(task, table["task"] == index) for index, task in enumerate(self._tasks)]
        metrics = []
        if len(parts) > 1:
            metrics.append(mean_metric("score", table["score"], seed=self._seed))
            means = [float(table["score"][rows].mean()) for _, rows in parts if rows.any()]
            mean = sum(means) / len(means) if means else 0.0
            metrics.append(Metric("mean of tasks", mean, low=mean, high=mean, share=True))
        for task, rows in parts:
            for name in task.metrics if rows.any() else ():
                label = f"{task.name} {name}" if len(parts) > 1 else name
                metrics.append(mean_metric(label, table[name][rows], seed=self._seed))
        classes = tuple(
            ClassResult(task.name, int(rows.sum()), float(table["score"][rows].mean()))
            for task, rows in parts
            if rows.any() and len(parts) > 1
        )
        return Measurement(tuple(metrics), classes=classes)

    def compare(self, table: ResultTable, reference: ResultTable, *, max_drop: float) -> tuple[Comparison, ...]:
        """The drop of the mean score of all questions, which decides, and of each task."""
        scores, others = table["score"], reference["score"]
        found = [compare_means("drop of the score", scores, reference=others, max_drop=max_drop, seed=self._seed)]
        if len(self._tasks) > 1:
            for index, task in enumerate(self._tasks):
                rows = table["task"] == index
                if rows.any():
                    own, other = scores[rows], others[rows]
                    name = f"drop of {task.name}"
                    found.append(compare_means(name, own, reference=other, max_drop=None, seed=self._seed))
        return tuple(found)


def _requests(loaded: _Loaded, document: Any, place: int) -> list[Any]:
    """lm_eval's requests for one question, as `Task.build_all_requests` makes them."""
    task = loaded.task
    prompt = task.fewshot_context(
        document, num_fewshot=task.config.num_fewshot or 0, gen_prefix=task.doc_to_prefix(document)
    )
    made = task.construct_requests(doc=document, ctx=prompt, metadata=(loaded.name, place, task.config.repeats))
    return list(made) if isinstance(made, list) else [made]


def _is_number(value: Any) -> bool:
    return isinstance(value, (bool, int, float, np.number, np.bool_))


def _metrics_of(task: Any) -> tuple[str, ...]:
    """The metrics that are means of one number for each question, and of which more is better; the score first.

    Raises:
        IBNormError: the task has none.
    """
    means = [name for name, how in task.aggregation().items() if getattr(how, "__name__", "") == "mean"]
    better = [name for name in means if task.higher_is_better().get(name, True)]
    if not better:
        raise IBNormError(
            f"task {task.task_name} has no score for each question, only {quoted(list(task.aggregation()))}; use "
            "--task perplexity, or lm-eval's own command: python -m ibnorm_export.evaluation.harness run --model "
            "ibnorm_onnx"
        )
    return tuple(dict.fromkeys((*(name for name in _PREFERRED if name in better), *better)))


def _shown(requests: Sequence[Any], answers: Sequence[Any], score: float) -> str:
    """What the list of changed answers shows: the likeliest choice, or the text that was generated."""
    if requests[0].request_type == "loglikelihood" and len(requests) > 1:
        likely = [answer[0] for answer in answers]
        chosen = "not a number" if any(map(math.isnan, likely)) else f"choice {int(np.argmax(likely))}"
        return f"{chosen}, score {score:g}"
    text = answers[0] if isinstance(answers[0], str) else ""
    return f"{shortened(text.strip(), 60)}, score {score:g}" if text.strip() else f"score {score:g}"


def harness_tasks(candidates: Sequence[Candidate], data: str | Path, *, options: EvaluationOptions) -> HarnessTasks:
    """Make the task for candidates that all read the same tokens.

    Args:
        candidates: language models.
        data: a folder with tasks of lm_eval in .yaml files, and with data sets under their names on the hub.
        options: `tasks` names those to run; none runs all of the folder's own.

    Raises:
        IBNormError: there is no such task, its data is not on disk, or there is no tokenizer of the model.
        BackendUnavailable: lm_eval is not installed.
    """
    folder = Path(data)
    if not folder.is_dir():
        raise IBNormError(
            f"{folder} is not a folder; name one with tasks of lm-eval (.yaml) and with data sets under their names on "
            "the hub; nothing is downloaded"
        )
    from ibnorm_export.evaluation.harness import IBNormLM

    vocabulary = min((c.facts.vocabulary for c in candidates if c.facts.vocabulary), default=0)
    tokenizer = find_tokenizer(candidates, options.tokenizer, vocabulary=vocabulary)
    loaded = []
    for task in _load(folder, options.tasks):
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise IBNormError(f"task {task.task_name} runs generated code or needs images, which is not supported")
        total = len(task.eval_docs)
        loaded.append(_Loaded(task.task_name, task, min(total, options.limit or total), _metrics_of(task)))
    positions = common_positions(candidates, options.max_length)
    lm = IBNormLM(
        candidates[0],
        batch_size=8,
        max_length=options.max_length or positions or None,
        tokenizer=str(tokenizer.folder),
    )
    facts = {
        "limit": options.limit,
        "max_length": options.max_length or positions,
        "tokenizer": tokenizer.sha256,
        "lm_eval": import_package("lm_eval", **_EXTRA).__version__,
        "tasks": {task.name: [task.total, task.task.config.num_fewshot] for task in loaded},
    }
    return HarnessTasks(loaded, lm, facts=facts, batch=options.batch or _BATCH, seed=options.seed)


def _content(loaded: _Loaded) -> str:
    """Hash of what a task asks: its settings, its questions, and those that its examples are drawn from."""
    task = loaded.task
    examples = task.fewshot_docs() if task.config.num_fewshot else None
    parts = [json.dumps(task.dump_config(), sort_keys=True, default=str)]
    parts += [json.dumps(document, sort_keys=True, default=str) for document in (*task.eval_docs, *(examples or ()))]
    return sha256_of("\0".join(parts).encode(errors="surrogatepass"))
