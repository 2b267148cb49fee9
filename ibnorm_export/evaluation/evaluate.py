"""Run several candidates on the same samples, and compare what they make of them."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ibnorm_export.choices import choice
from ibnorm_export.environment import environment
from ibnorm_export.errors import IBNormError, ModelFileError, quoted, shortened
from ibnorm_export.evaluation.candidates import check_backends, open_candidate
from ibnorm_export.evaluation.changes import changed_answers
from ibnorm_export.evaluation.choice import choice_task
from ibnorm_export.evaluation.classification import classification_task
from ibnorm_export.evaluation.harness_tasks import harness_tasks
from ibnorm_export.evaluation.images import open_images
from ibnorm_export.evaluation.journal import Journal
from ibnorm_export.evaluation.options import EvaluationOptions, TaskName
from ibnorm_export.evaluation.perplexity import perplexity_task
from ibnorm_export.evaluation.report import CandidateResult, EvaluationReport
from ibnorm_export.evaluation.result_files import write_result_files
from ibnorm_export.evaluation.samples import Candidate, EvaluationTask, PerSampleResult, Sample
from ibnorm_export.evaluation.texts import TextData
from ibnorm_export.files import sha256_of
from ibnorm_export.json_text import json_text
from ibnorm_export.progress import Progress, silent

if TYPE_CHECKING:  # importing torch takes seconds, and exported files do not need it
    from ibnorm_export.artifacts.exported_model import ExportedModel
    from ibnorm_export.artifacts.loaded_model import LoadedModel

__all__ = ["evaluate", "make_task", "run_task"]

#: Unreadable samples that an error names.
_NAMED: Final = 3


def evaluate(
    candidates: Candidate | ExportedModel | LoadedModel | str | Path | Sequence[Any],
    *,
    task: TaskName | str,
    data: str | Path,
    against: Candidate | ExportedModel | LoadedModel | str | Path | None = None,
    options: EvaluationOptions | None = None,
    progress: Progress = silent,
) -> EvaluationReport:
    """Measure whether models still do their task, all on the same samples, and compare them with a reference.

    Args:
        candidates: one or several of: an exported file or folder, a checkpoint folder (which PyTorch runs), the result
            of `load` or `export`, or a `Candidate` of your own.
        task: "perplexity", "classification", "choice" or "lm-eval".
        data: the file or folder of texts, images, questions or tasks; nothing is downloaded.
        against: the reference, of the same kinds; None compares nothing.
        options: backend, limits and what passes; None is `EvaluationOptions()`.
        progress: called as the work progresses.

    Returns:
        A report that is true when no candidate is worse than the reference by more than `max_drop`; `print(report)`
        shows it.

    Raises:
        IBNormError: the data is missing or does not belong to the model, or too many samples are unreadable.
        ModelFileError: a file cannot be read or run.
        CheckpointError: a checkpoint cannot be read.
        BackendUnavailable: a package is missing.
    """
    options = EvaluationOptions() if options is None else options
    chosen = choice(TaskName, task, name="task")
    listed: list[Any] = list(candidates) if isinstance(candidates, (list, tuple)) else [candidates]
    if against is not None:
        listed = [against, *listed]
    if not listed:
        raise IBNormError("there is no candidate: give at least one file or checkpoint")
    check_backends(listed, options=options)
    progress("reading the models", 0, 0)
    _check_one_server(listed, options)
    opened = _with_own_names([open_candidate(item, options=options) for item in listed])
    progress("reading the data", 0, 0)
    made, content = make_task(chosen, opened, data=data, options=options, progress=progress)
    return run_task(
        made,
        opened,
        data=str(data),
        data_sha256=content,
        reference=None if against is None else opened[0],
        options=options,
        progress=progress,
    )


def make_task(
    task: TaskName,
    candidates: Sequence[Candidate],
    *,
    data: str | Path,
    options: EvaluationOptions,
    progress: Progress = silent,
) -> tuple[EvaluationTask, str]:
    """Make a task for candidates that all see the same samples.

    Args:
        task: the task.
        candidates: the models; they tell how samples are prepared.
        data: the file or folder of samples.
        options: limits, tokenizer and preprocessing.
        progress: called as the work progresses.

    Returns:
        The task, and the hash of its data.

    Raises:
        IBNormError: the data is missing or does not belong to the model.
    """
    _check_kinds(task, candidates)
    if task is TaskName.PERPLEXITY:
        return perplexity_task(candidates, data, options=options, progress=progress), TextData(data).sha256()
    if task is TaskName.CHOICE:
        return choice_task(candidates, data, options=options), sha256_of(Path(data))
    if task is TaskName.LM_EVAL:
        tasks = harness_tasks(candidates, data, options=options)
        return tasks, tasks.data_sha256
    return classification_task(candidates, data, options=options), open_images(data).sha256()


def _check_kinds(task: TaskName, candidates: Sequence[Candidate]) -> None:
    """Refuse a task of texts for what takes images, and the other way round.

    Raises:
        ModelFileError: a candidate has nothing to do with the task.
    """
    for candidate in candidates:
        if candidate.facts.image and task is not TaskName.CLASSIFICATION:
            raise ModelFileError(
                f"{candidate.name} takes images, and --task {task} is for language models: use --task classification"
            )
        if candidate.facts.vocabulary and task is TaskName.CLASSIFICATION:
            raise ModelFileError(
                f"{candidate.name} is a language model, and --task {task} is for images: use --task perplexity, choice "
                "or lm-eval"
            )


def _check_one_server(models: Sequence[object], options: EvaluationOptions) -> None:
    """Refuse to send a key to several servers."""
    addresses = [m for m in models if isinstance(m, str) and m.startswith(("http://", "https://"))]
    servers = sorted({"/".join(address.split("/")[:3]) for address in addresses})
    if options.api_key and len(servers) > 1:
        raise IBNormError(
            f"one API key would be sent to {' and '.join(servers)}: evaluate the models of each server separately"
        )


def _with_own_names(candidates: list[Candidate]) -> list[Candidate]:
    """Refuse two candidates of the same name."""
    names = [candidate.name for candidate in candidates]
    for name in names:
        if names.count(name) > 1:
            raise IBNormError(
                f"{names.count(name)} candidates are called {name}; give each its own name, e.g. by renaming a file"
            )
    return candidates


def run_task(
    task: EvaluationTask,
    candidates: Sequence[Candidate],
    *,
    data: str,
    data_sha256: str,
    reference: Candidate | None = None,
    options: EvaluationOptions,
    progress: Progress = silent,
) -> EvaluationReport:
    """Ask every candidate about every sample, and compare the results.

    Args:
        task: the samples, and what is made of the answers.
        candidates: the models, each with its own name; the reference is one of them.
        data: where the samples are, for the report.
        data_sha256: hash of the samples.
        reference: what the others are compared with.
        options: where results are kept, and what passes.
        progress: called as the work progresses.

    Raises:
        IBNormError: too many samples are unreadable, or results of something else are in the place of the journal.
    """
    start = time.perf_counter()
    key = {"data": data_sha256, "settings": sha256_of(json_text(dict(task.settings)).encode())}
    with ExitStack() as stack:
        folder = options.results
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ibnorm-evaluate-")))
        journals = {}
        for candidate in candidates:
            own = {"candidate": candidate.identity, **key}
            journals[candidate.name] = journal = Journal(folder, candidate.name, key=own, columns=task.columns)
            stack.callback(journal.close)
        _ask(task, candidates, journals=journals, max_unreadable=options.max_unreadable, progress=progress)
        _check_same_samples(journals)
        progress("comparing", 0, 0)
        results = _results(task, candidates, journals=journals, reference=reference, max_drop=options.max_drop)
        first = next(iter(journals.values()))
        files, note = ((), "") if options.results is None else write_result_files(tuple(journals.values()))
        return EvaluationReport(
            task.name,
            data,
            candidates=results,
            reference="" if reference is None else reference.name,
            unreadable=first.unreadable(),
            settings=task.settings,
            notes=(*task.notes, note) if note else task.notes,
            seconds=time.perf_counter() - start,
            files=tuple(map(str, files)),
            environment=environment(),
        )


def _ask(
    task: EvaluationTask,
    candidates: Sequence[Candidate],
    *,
    journals: Mapping[str, Journal],
    max_unreadable: float,
    progress: Progress,
) -> None:
    """Go through the samples once, batch by batch, and ask each candidate that has no result for the batch yet.

    A batch that an earlier run left unfinished is asked about again, so that batches are the same in both runs.
    """
    for journal in journals.values():
        if 0 < task.total < journal.done:
            raise IBNormError(
                f"{journal.path} has {journal.done} results for {task.total} samples: remove it, and the results are "
                "computed again"
            )
        if journal.done != task.total:
            journal.keep(journal.done // task.batch * task.batch)
    position = begin = min(journal.done for journal in journals.values())
    if task.total and position >= task.total:
        return
    clock = _Clock(begin, task.total)
    first = min(journals.values(), key=lambda journal: journal.done)
    unreadable = len(first.unreadable())
    latest: list[Sample] = []
    for batch in _batches(task.samples(begin), task.batch):
        bad = [sample for sample in batch if sample.unreadable]
        unreadable += len(bad)
        latest = [*bad, *latest][:_NAMED]
        _check_unreadable(unreadable, latest, total=task.total, share=max_unreadable)
        for candidate in candidates:
            journal = journals[candidate.name]
            if journal.done <= position:
                progress(clock.text(candidate.name, position), position, task.total)
                journal.append(_answers(task, candidate, batch))
        position += len(batch)
    if not position:
        raise IBNormError("the data has no samples; give data with at least one")
    _check_unreadable(unreadable, latest, total=position, share=max_unreadable)


def _check_same_samples(journals: Mapping[str, Journal]) -> None:
    """Check that every candidate has a result for the same samples: those that were read once may now be unreadable.

    Raises:
        IBNormError: a sample was readable for one candidate and not for another.
    """
    first, *others = journals.values()
    for journal in others:
        for own, other in itertools.zip_longest(first.results(), journal.results()):
            seen = [result is not None and (result.name, bool(result.unreadable)) for result in (own, other)]
            if seen[0] != seen[1]:
                raise IBNormError(
                    f"{first.path} and {journal.path} do not have the same samples; they differ at "
                    f"{quoted((own or other).name)}: remove both files, and the results are computed again"
                )


def _answers(task: EvaluationTask, candidate: Candidate, batch: Sequence[Sample]) -> list[PerSampleResult]:
    readable = [sample for sample in batch if not sample.unreadable]
    answers = iter(task.answer(candidate, readable)) if readable else iter(())
    return [
        PerSampleResult(sample.name, unreadable=sample.unreadable) if sample.unreadable else next(answers)
        for sample in batch
    ]


def _check_unreadable(count: int, latest: Sequence[Sample], *, total: int, share: float) -> None:
    """Stop as soon as more samples are unreadable than the share of all that is tolerated.

    Raises:
        IBNormError: too many are; the message names some.
    """
    if count and total and count > share * total:
        named = "; ".join(f"{sample.name}: {shortened(sample.unreadable, 80)}" for sample in latest)
        raise IBNormError(
            f"{count} of {total} samples are unreadable, more than the share of {share:g} that is tolerated"
            f"{f' ({named})' if named else ''}; repair or remove them, or raise --max-unreadable"
        )


def _batches(samples: Iterator[Sample], size: int) -> Iterator[list[Sample]]:
    while batch := list(itertools.islice(samples, size)):
        yield batch


class _Clock:
    """Estimates the time that is left from the samples since the start of this run."""

    def __init__(self, begin: int, total: int) -> None:
        self._begin, self._total, self._start = begin, total, time.perf_counter()

    def text(self, name: str, position: int) -> str:
        done = position - self._begin
        if not done or not self._total:
            return name
        left = (time.perf_counter() - self._start) / done * (self._total - position)
        shown = f"{left:.0f} s" if left < 120 else f"{left / 60:.0f} min" if left < 7200 else f"{left / 3600:.1f} h"
        return f"{name}, {shown} left"


def _results(
    task: EvaluationTask,
    candidates: Sequence[Candidate],
    *,
    journals: Mapping[str, Journal],
    reference: Candidate | None,
    max_drop: float,
) -> tuple[CandidateResult, ...]:
    base = None if reference is None else journals[reference.name].table()
    found = []
    for candidate in candidates:
        journal = journals[candidate.name]
        table = journal.table()
        if not len(table):
            name, reason = next(iter(journal.unreadable()))
            raise IBNormError(f"no sample could be read, so there is nothing to evaluate; {name}: {reason}")
        measured = task.measure(table)
        result = CandidateResult(
            candidate.name,
            len(table),
            metrics=measured.metrics,
            seconds=candidate.seconds,
            cached=journal.found,
            curves=measured.curves,
            classes=measured.classes,
            confusions=measured.confusions,
        )
        if base is not None and reference is not None and candidate is not reference:
            changed, listed = changed_answers(journal, journals[reference.name], truth=task.truth)
            comparisons = task.compare(table, base, max_drop=max_drop)
            result = replace(result, comparisons=comparisons, changed=changed, changed_answers=listed)
        found.append(result)
    return tuple(found)
