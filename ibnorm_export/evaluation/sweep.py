"""Which file do I ship? Export a checkpoint in several forms, verify, time and evaluate each, and recommend one."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from ibnorm_export.artifacts.axes import BATCH, PAST, SEQUENCE, TOTAL
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.metadata import Task
from ibnorm_export.artifacts.onnx_file import MODEL_FILE
from ibnorm_export.artifacts.random_inputs import draw_inputs
from ibnorm_export.artifacts.tensors import default_length
from ibnorm_export.benchmark.measure import measure
from ibnorm_export.benchmark.options import Timing
from ibnorm_export.choices import choice
from ibnorm_export.environment import environment
from ibnorm_export.errors import BackendUnavailable, ExportError, IBNormError, ModelFileError
from ibnorm_export.evaluation.candidates import ModelCandidate, exported_candidate, torch_candidate
from ibnorm_export.evaluation.evaluate import make_task, run_task
from ibnorm_export.evaluation.options import EvaluationOptions, TaskName
from ibnorm_export.evaluation.report import EvaluationReport
from ibnorm_export.evaluation.samples import Candidate, EvaluationTask
from ibnorm_export.evaluation.sweep_options import SweepOptions, Variant
from ibnorm_export.evaluation.sweep_report import SweepReport, SweptFile, pareto_front, recommend
from ibnorm_export.evaluation.sweep_state import SweepState
from ibnorm_export.evaluation.texts import TextData
from ibnorm_export.exporter.options import ExportOptions
from ibnorm_export.exporter.single_file import SharedBuild, export_file
from ibnorm_export.exporter.text_folder import export_folder
from ibnorm_export.files import sha256_of
from ibnorm_export.progress import Progress, silent
from ibnorm_export.runtimes.registry import check_backend, fused_library, open_runner
from ibnorm_export.usable_cores import usable_cores
from ibnorm_export.verifier.options import VerifyOptions
from ibnorm_export.verifier.report import ParityReport
from ibnorm_export.verifier.verify import verify

if TYPE_CHECKING:  # importing torch takes seconds
    from ibnorm_export.artifacts.loaded_model import LoadedModel

__all__ = ["sweep"]

#: Tokens of context of the decoding step that is timed.
_CONTEXT: Final = 127

#: Characters that quantised files predict when they are verified: at most 512 tokens count.
_VERIFIED: Final = 2000

#: A legal block size, for weights that have none.
_BLOCK_SIZE: Final = 32

#: The tasks of language models, which are exported with a cache, as they are served.
_TEXT_TASKS: Final = (TaskName.PERPLEXITY, TaskName.CHOICE, TaskName.LM_EVAL)

#: What one file cannot do and others may: the rest of the sweep goes on.
_PROBLEMS: Final = (ExportError, ModelFileError, BackendUnavailable)


def sweep(
    checkpoint: LoadedModel | str | Path,
    folder: str | Path,
    *,
    task: TaskName | str,
    data: str | Path,
    options: SweepOptions | None = None,
    evaluation: EvaluationOptions | None = None,
    files: Mapping[str, ExportedModel] = MappingProxyType({}),
    reports: Mapping[str, ParityReport] = MappingProxyType({}),
    shared: SharedBuild | None = None,
    progress: Progress = silent,
) -> SweepReport:
    """Export a checkpoint in several forms, verify, time and evaluate each, and recommend the file to ship.

    Each file is compared with PyTorch on the same samples. A sweep that was stopped goes on where it was when it is
    called again with the same folder.

    Args:
        checkpoint: the folder of a checkpoint, or the result of `load`.
        folder: receives the files and all results; created if missing.
        task: "perplexity", "classification", "choice" or "lm-eval". Language models are exported for text generation.
        data: the file or folder of texts, images, questions or tasks.
        options: types of weights, block sizes and runtimes to try; None is `SweepOptions()`.
        evaluation: limits, and the largest loss that passes; its backend and results folder are not used. None is
            `EvaluationOptions()`.
        files: exports of the checkpoint that are there, by name, such as "fp16" or "int4-block32"; they are not
            exported again.
        reports: results of `verify` that are there, by the same names; those files are not verified again.
        shared: what has traced the checkpoint for another export; None traces it here.
        progress: called as the work progresses.

    Returns:
        A report that is true when a file is recommended, or when only more samples are missing; `print(report)` shows
        it. A file that cannot be exported or run is listed with the reason.

    Raises:
        IBNormError: the data is missing or does not belong to the model, or no file could be exported and run.
        CheckpointError: the checkpoint cannot be read.
        BackendUnavailable: none of the backends is installed.
    """
    start = time.perf_counter()
    options = SweepOptions() if options is None else options
    chosen = choice(TaskName, task, name="task")
    folder = Path(folder)
    if folder.is_file():
        raise IBNormError(f"{folder} is a file; name the folder that receives the files of the sweep")
    settings = replace(EvaluationOptions() if evaluation is None else evaluation, results=folder / "results")
    _check_backends(options)
    progress("reading the checkpoint", 0, 0)
    model = _loaded(checkpoint, chosen)
    reference = torch_candidate(model, name="PyTorch")
    progress("reading the data", 0, 0)
    made, content = make_task(chosen, [reference], data=data, options=settings, progress=progress)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise IBNormError(f"cannot create the folder {folder}: {error.strerror or error}") from error
    run = _Sweep(
        model,
        folder,
        options=options,
        settings=settings,
        task=made,
        data=str(data),
        content=content,
        state=SweepState(folder / "sweep.json"),
        identity=reference.identity,
        given=files,
        reports=reports,
        shared=SharedBuild(model) if shared is None else shared,
    )
    swept = run.files(progress)
    report = run.evaluated(reference, list(run.candidates.values()), progress)
    return _report(run, swept, report, seconds=time.perf_counter() - start)


def _check_backends(options: SweepOptions) -> None:
    """Raise before long work if no backend is there; the report lists single ones that are missing.

    Raises:
        BackendUnavailable: none of the backends is installed.
    """
    problems = []
    for backend in options.runtimes:
        try:
            check_backend(backend)
        except BackendUnavailable as error:
            problems.append(error)
    if problems and len(problems) == len(options.runtimes):
        raise problems[0]


def _loaded(checkpoint: LoadedModel | str | Path, task: TaskName) -> LoadedModel:
    if not isinstance(checkpoint, (str, Path)):
        return checkpoint
    from ibnorm_export.models.loading import load

    return load(checkpoint, task=Task.TEXT_GENERATION if task in _TEXT_TASKS else Task.FORWARD)


@dataclass(slots=True)
class _Sweep:
    """A sweep while it runs. It has a field for each thing that every step needs.

    Args:
        model: the checkpoint.
        folder: receives files and results.
        options: what is tried.
        settings: how files are evaluated.
        task: the samples, and what is made of the answers.
        data: where the samples are.
        content: hash of the samples.
        state: what earlier runs have done.
        identity: hash of what determines the answers of the checkpoint.
        given, reports: exports and verifications that are there, by name.
        shared: traces the model once for several types of weights.
        candidates: the files that can be run, by name, none of which is open.
        first: the file that the others are timed against; None until there is one.
    """

    model: LoadedModel
    folder: Path
    _: KW_ONLY
    options: SweepOptions
    settings: EvaluationOptions
    task: EvaluationTask
    data: str
    content: str
    state: SweepState
    identity: str
    given: Mapping[str, ExportedModel]
    reports: Mapping[str, ParityReport]
    shared: SharedBuild
    candidates: dict[str, ModelCandidate] = field(default_factory=dict)
    first: tuple[Variant, ExportedModel] | None = None

    def files(self, progress: Progress) -> tuple[SweptFile, ...]:
        """Export, verify, time and evaluate every variant.

        Raises:
            IBNormError: none could be exported and run, or the evaluation cannot go on.
        """
        variants = self.options.variants()
        found = []
        clock = _Clock(len(variants))
        self.evaluated(self._reference(), [], clock.during("PyTorch", 0, progress))
        clock.begin()
        for index, variant in enumerate(variants):
            found.append(self._file(variant, clock.during(variant.name, index, progress)))
        if all(file.problem for file in found):
            raise IBNormError(f"no file could be exported and run: {found[0].name}: {found[0].problem}")
        return tuple(found)

    def evaluated(self, reference: Candidate, others: Sequence[Candidate], progress: Progress) -> EvaluationReport:
        """Evaluate candidates against the checkpoint; results that are there are not computed again."""
        return run_task(
            self.task,
            [reference, *others],
            data=self.data,
            data_sha256=self.content,
            reference=reference,
            options=self.settings,
            progress=progress,
        )

    def _reference(self) -> ModelCandidate:
        """The checkpoint, not open."""
        return torch_candidate(self.model, name="PyTorch", identity=self.identity)

    def _file(self, variant: Variant, progress: Progress) -> SweptFile:
        """Do everything with one variant. What it cannot do becomes its problem."""
        options = replace(self.settings, backend=variant.backend)
        try:
            exported = self._exported(variant, progress)
            hashes = [sha256_of(file) for file in (exported.path, *exported.external_files)]
            verified = self._verified(variant, exported, hashes=hashes, progress=progress)
            timed = self._timed(variant, exported, hashes=hashes, progress=progress)
            candidate = exported_candidate(exported, name=variant.name, options=options)
            report = self.evaluated(self._reference(), [candidate], progress)
        except _PROBLEMS as error:
            return SweptFile(variant.name, problem=str(error))
        self.candidates[variant.name] = exported_candidate(exported, name=variant.name, options=options)  # not open
        self.first = self.first or (variant, exported)  # only a file that runs: the others take turns with it
        comparison = report.candidates[1].comparisons[0]
        return SweptFile(
            variant.name,
            str(exported.path.parent if exported.path.name == MODEL_FILE else exported.path),
            size_bytes=exported.size_bytes,
            **verified,
            **timed,
            drop=comparison.drop,
            decision=comparison.decision,
        )

    def _exported(self, variant: Variant, progress: Progress) -> ExportedModel:
        """The file of a variant, which may be there."""
        if variant.name in self.given:
            return self.given[variant.name]
        options = ExportOptions.with_weights(
            variant.weights, block_size=variant.block_size or _BLOCK_SIZE, runtime=variant.runtime
        )
        text = self.model.task is Task.TEXT_GENERATION
        path = self.folder / (variant.file_name if text else f"{variant.file_name}.onnx")
        facts = {"step": "export", "source": self.identity, "options": repr(options), "text": text}
        facts |= {"packages": environment()["packages"]}
        before = self.state.get(**facts)
        if before is not None and (path / MODEL_FILE if text else path).is_file():
            there = ExportedModel(path)
            if [sha256_of(file) for file in (there.path, *there.external_files)] == before["hashes"]:
                return there
        write = export_folder if text else export_file
        exported = write(self.model, path, options=options, shared=self.shared, progress=progress)
        hashes = [sha256_of(file) for file in (exported.path, *exported.external_files)]
        self.state.put({"hashes": hashes}, **facts)
        return exported

    def _facts(self, variant: Variant, hashes: Sequence[str]) -> dict[str, Any]:
        """What the results of a file on its runtime depend on."""
        library = fused_library(variant.backend, self.settings.kernels)
        return {
            "source": self.identity,
            "files": list(hashes),
            "backend": variant.backend,
            "library": None if library is None else sha256_of(library),
            "packages": environment()["packages"],
        }

    def _verified(
        self, variant: Variant, exported: ExportedModel, *, hashes: Sequence[str], progress: Progress
    ) -> Mapping[str, Any]:
        text = self._text(variant)
        facts = {"step": "verify", "coverage": self.options.coverage, "text": text, **self._facts(variant, hashes)}
        if (before := self.state.get(**facts)) is not None:
            return before
        report = self.reports.get(variant.name)
        if report is None:
            options = VerifyOptions(variant.backend, kernels=self.settings.kernels, coverage=self.options.coverage)
            report = verify(exported, self.model, options=options, text=text, progress=progress)
        finding = str(report.findings[0]) if report.findings else ""
        return self.state.put({"verified": bool(report), "finding": finding}, **facts)

    def _text(self, variant: Variant) -> str | None:
        """The text that a quantised file predicts; None lets PyTorch write one, which takes longer than the rest."""
        if self.task.name != TaskName.PERPLEXITY or not variant.block_size:
            return None
        if not (Path(self.model.source) / "tokenizer.json").is_file():
            return None
        pieces: list[str] = []
        for document in TextData(self.data).documents():
            pieces.append(document.text[:_VERIFIED])
            if sum(map(len, pieces)) >= _VERIFIED:
                break
        return "\n".join(pieces)[:_VERIFIED]

    def _timed(
        self, variant: Variant, exported: ExportedModel, *, hashes: Sequence[str], progress: Progress
    ) -> Mapping[str, Any]:
        """Latency, in turns with the first file, so that a change of the machine's speed affects both alike."""
        first_variant, first = self.first or (variant, exported)
        threads = self.settings.threads or usable_cores()
        facts = {"step": "time", "threads": threads, "rounds": self.options.rounds, **self._facts(variant, hashes)}
        facts |= {"against": [first_variant.backend, sha256_of(first.path)], "machine": environment()["processor"]}
        if (before := self.state.get(**facts)) is not None:
            return before
        pairs = {variant.name: (variant, exported)}
        if first_variant != variant:
            pairs[first_variant.name] = first_variant, first
        runners = {
            name: open_runner(which.backend, file, threads=threads, kernels=self.settings.kernels)
            for name, (which, file) in pairs.items()
        }
        inputs = draw_inputs(exported, self._sizes())
        timing = Timing(warmup_ms=200.0)
        rounds = self.options.rounds
        report = measure(runners, inputs, threads=threads, rounds=rounds, timing=timing, progress=progress)
        ratio = report.ratios[0].median if report.ratios else 1.0
        return self.state.put({"latency_ms": report.latencies[0].p50_ms, "ratio": ratio}, **facts)

    def _sizes(self) -> dict[str, int]:
        """Sizes of the axes of the pass that is timed."""
        if self.model.task is not Task.TEXT_GENERATION:
            return {BATCH: 1, SEQUENCE: default_length(self.model.max_positions)}
        past = max(1, min(_CONTEXT, (self.model.max_positions or _CONTEXT + 1) - 1))
        return {BATCH: 1, SEQUENCE: 1, PAST: past, TOTAL: past + 1}

    @property
    def latency_of(self) -> str:
        """What is timed, in words."""
        sizes = self._sizes()
        if PAST in sizes:
            return f"one decoding step after {sizes[PAST]} tokens"
        return f"one pass of {sizes[SEQUENCE]} tokens" if self.model.max_positions else "one pass of one sample"


class _Clock:
    """Estimates the time that is left from the variants that are done."""

    def __init__(self, total: int) -> None:
        self._total, self._start = total, time.perf_counter()

    def begin(self) -> None:
        """Start to count variants."""
        self._start = time.perf_counter()

    def during(self, name: str, done: int, progress: Progress) -> Progress:
        """Progress of one step that is named after the variant, with the time that is left for all of them."""
        left = ""
        if done:
            seconds = (time.perf_counter() - self._start) / done * (self._total - done)
            left = f", about {seconds:.0f} s left" if seconds < 120 else f", about {seconds / 60:.0f} min left"

        def report(what: str, step: int, steps: int) -> None:
            progress(f"{name} ({done + 1} of {self._total}{left}): {what}", step, steps)

        return report


def _report(run: _Sweep, files: tuple[SweptFile, ...], evaluation: EvaluationReport, *, seconds: float) -> SweepReport:
    base = next(file for file in files if not file.problem)
    files = tuple(replace(file, latency_ms=base.latency_ms * file.ratio) for file in files)  # see `SweptFile`
    front = pareto_front(files)
    files = tuple(replace(file, on_front=file.name in front) for file in files)
    several = sum(not file.problem for file in files)
    note = (
        f"the recommended file was chosen among {several} on the same samples: confirm it on others"
        if several > 1
        else ""
    )
    return SweepReport(
        run.model.source,
        files,
        evaluation=evaluation,
        recommendation=recommend(files, run.options.prefer),
        prefer=run.options.prefer,
        latency_of=run.latency_of,
        threads=run.settings.threads or usable_cores(),
        seconds=seconds,
        folder=str(run.folder),
        notes=(note,) if note else (),
    )
