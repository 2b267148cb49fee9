"""The demo: train two models, export, verify and benchmark each, generate text, and find the file to ship."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import KW_ONLY, asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.metadata import Task
from ibnorm_export.artifacts.tensors import Arrays, DType
from ibnorm_export.benchmark.bench import bench_forward
from ibnorm_export.benchmark.options import BenchOptions, Timing
from ibnorm_export.benchmark.report import BenchReport
from ibnorm_export.cli.demo_app import MAX_STEPS
from ibnorm_export.cli.demo_app.evaluation import sweep_digits, sweep_text
from ibnorm_export.cli.demo_app.tasks import Plan, plan, read_training_text, training_split
from ibnorm_export.cli.demo_app.text import DemoText, write_text
from ibnorm_export.cli.demo_app.train import Evaluation, train_checkpoint
from ibnorm_export.errors import CheckpointError
from ibnorm_export.evaluation.sweep_report import SweepReport
from ibnorm_export.exporter.export import ExportOptions, export
from ibnorm_export.exporter.single_file import SharedBuild
from ibnorm_export.html_page import demand_plots
from ibnorm_export.models.loading import load
from ibnorm_export.optional_packages import demand_package
from ibnorm_export.progress import Progress, silent
from ibnorm_export.runtimes.registry import open_runner
from ibnorm_export.runtimes.runner import Backend
from ibnorm_export.text_report import Report
from ibnorm_export.verifier.outputs.quality import POSITIONS
from ibnorm_export.verifier.report import ParityReport
from ibnorm_export.verifier.verify import verify

__all__ = ["DemoModel", "DemoResult", "run_demo"]


#: Images that the report shows, and at most how many of them that are not recognised.
_SHOWN: Final = 12
_WRONG: Final = 3


@dataclass(frozen=True, slots=True)
class Digit:
    """A held-out image, the digit that it shows, and the one that the exported file sees in it."""

    pixels: tuple[tuple[float, ...], ...]
    truth: int
    answer: int


@dataclass(frozen=True, slots=True)
class DemoModel:
    """One trained model, with the reports on its exports. It has many fields because each is one result of the demo.

    Args:
        name: "llama" or "vit".
        norm: its norms, in words.
        goal: what it reached and what is required, in words.
        reached: whether it reached its goal.
        checkpoint: its folder.
        evaluations: the course of the training.
        parity: a report for each dtype.
        latency: times of the fp32 file and of PyTorch.
        parameters: how many numbers it has learned.
        seconds: how long the training took.
        digits: images with the answers of the fp32 file; empty for the language model.
    """

    name: str
    norm: str
    _: KW_ONLY
    goal: str
    reached: bool
    checkpoint: str
    evaluations: tuple[Evaluation, ...]
    parity: tuple[ParityReport, ...]
    latency: BenchReport
    parameters: int
    seconds: float
    digits: tuple[Digit, ...] = ()

    @property
    def effort(self) -> str:
        """What it took, e.g. "0.83 M parameters, 30 s of training"."""
        return f"{self.parameters / 1e6:.2g} M parameters, {self.seconds:.0f} s of training"

    def __bool__(self) -> bool:
        return self.reached and bool(self.parity) and all(self.parity)


@dataclass(frozen=True, slots=True)
class DemoResult(Report):
    """True when every model reached its goal, all exports passed verification, all fp32 forms wrote the same text, and
    for each model there is a file that does its task as well as PyTorch.

    `str()` is the text that the command prints.
    """

    folder: str
    models: tuple[DemoModel, ...]
    _: KW_ONLY
    text: DemoText
    sweeps: tuple[SweepReport, ...]

    def __bool__(self) -> bool:
        return bool(self.models) and all(self.models) and bool(self.text) and all(self.sweeps)

    def __str__(self) -> str:
        lines = []
        for model in self.models:
            lines.append(f"{model.name}: {model.norm}; {model.effort}")
            lines.append(f"trained to {model.goal}: {'reached' if model.reached else 'NOT reached'}")
            lines += [str(report) for report in model.parity]
            lines.append(str(model.latency))
        lines.append(str(self.text))
        lines += [str(report).rpartition("verdict: ")[0].rstrip() for report in self.sweeps]
        lines.append(f"verdict: {'pass' if self else 'fail'}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values, for JSON."""
        models = [
            {
                **{k: v for k, v in asdict(m).items() if k not in ("parity", "latency")},
                "verdict": "pass" if m else "fail",
                "parity": [report.to_dict() for report in m.parity],
                "latency": m.latency.to_dict(),
            }
            for m in self.models
        ]
        return {
            "verdict": "pass" if self else "fail",
            "folder": self.folder,
            "models": models,
            "text": self.text.to_dict(),
            "sweeps": [report.to_dict() for report in self.sweeps],
        }


def _verification_inputs(model: LoadedModel, planned: Plan) -> Iterator[Arrays]:
    """Four random samples and two batches of held-out data."""
    generator = np.random.default_rng(0)
    for index in range(4):
        yield model.sample(generator, index)
    held_out, _ = planned.task.held_out
    for start in (0, 4):
        yield {name: array[start : start + 4] for name, array in held_out.items()}


def _export_and_measure(
    name: str, folder: Path, *, planned: Plan, progress: Progress
) -> tuple[tuple[ParityReport, ...], BenchReport]:
    """Export and verify a checkpoint in fp32 and fp16, and benchmark the fp32 file against PyTorch."""
    model = load(folder / name)
    reports = []
    for dtype, file in ((DType.FP32, f"{name}.onnx"), (DType.FP16, f"{name}.fp16.onnx")):
        exported = export(model, folder / file, options=ExportOptions(dtype=dtype), progress=progress)
        inputs = list(_verification_inputs(model, planned))
        reports.append(verify(exported, model, inputs=inputs, progress=progress))
    options = BenchOptions(sizes=planned.sizes, rounds=20, timing=Timing(warmup_ms=200.0))
    exported = ExportedModel(folder / f"{name}.onnx")
    latency = bench_forward(exported, model=model, against=["torch"], options=options, progress=progress)
    return tuple(reports), latency


def _make_model(name: str, folder: Path, *, text: Path | None, max_steps: int, progress: Progress) -> DemoModel:
    start = time.perf_counter()
    evaluations = train_checkpoint(name, folder / name, max_steps=max_steps, text=text, progress=progress)
    seconds = time.perf_counter() - start
    planned = plan(name, text)
    parity, latency = _export_and_measure(name, folder, planned=planned, progress=progress)
    shown: tuple[Digit, ...] = ()
    if name == "vit":
        digits, labels = planned.task.held_out
        np.savez(folder / "digits.npz", **digits)  # type: ignore[arg-type]  # the stub takes a name for allow_pickle
        np.save(folder / "labels.npy", labels.numpy())
        shown = _recognise(folder / f"{name}.onnx", digits, labels=labels.numpy())
    last = evaluations[-1]
    return DemoModel(
        name,
        str(planned.spec),
        goal=planned.goal.describe(loss=last.loss, accuracy=last.accuracy),
        reached=planned.goal.reached(loss=last.loss, accuracy=last.accuracy),
        checkpoint=str(folder / name),
        evaluations=evaluations,
        parity=parity,
        latency=latency,
        parameters=sum(p.numel() for p in load(folder / name).module.parameters()),
        seconds=seconds,
        digits=shown,
    )


def _recognise(file: Path, inputs: Arrays, *, labels: NDArray[np.int64]) -> tuple[Digit, ...]:
    """The answers of the exported file to the first images, and to some that it gets wrong."""
    (pixels,) = inputs.values()
    outputs = open_runner(Backend.ORT_CPU, ExportedModel(file)).run(inputs)
    answers = next(iter(outputs.values())).argmax(-1)
    wrong = np.flatnonzero(answers != labels)[:_WRONG]
    right = np.flatnonzero(answers == labels)[: _SHOWN - len(wrong)]
    return tuple(
        Digit(tuple(tuple(map(float, row)) for row in pixels[i, 0]), int(labels[i]), int(answers[i]))
        for i in (*right, *wrong)
    )


def run_demo(
    folder: str | Path, *, max_steps: int = MAX_STEPS, text: str | Path | None = None, progress: Progress = silent
) -> DemoResult:
    """Train an IBNorm-L LLaMA and an IBNorm-T ViT, and export, verify and benchmark both.

    Each model is trained until it is good enough on held-out data, which takes the same number of steps on a busy
    machine as on a quiet one.

    Args:
        folder: receives `llama/` and `vit/` (checkpoints), the .onnx files, the folders of `write_text` and of the
            sweeps, and data that was held out from training: `held-out.txt`, `digits.npz` with `labels.npy`; created
            if missing.
        max_steps: maximum number of training steps for each model.
        text: a file to train the LLaMA on; None means the documentation that CPython ships.
        progress: receives the progress of the work.

    Raises:
        BackendUnavailable: scikit-learn or matplotlib is not installed.
        CheckpointError: the text cannot be used, `max_steps` is below 1, or the folder cannot be written.
    """
    demand_package("sklearn", extra="demo", purpose="the demo")  # the extra brings matplotlib too
    demand_plots()
    folder = Path(folder)
    text = None if text is None else Path(text)
    if max_steps < 1:
        raise CheckpointError(f"max_steps is {max_steps}; it must be at least 1")
    _, rest = training_split(read_training_text(text))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot create the folder {folder}: {error.strerror or error}") from error
    models = tuple(
        _make_model(name, folder, text=text, max_steps=max_steps, progress=progress) for name in ("llama", "vit")
    )
    held_out = rest[: POSITIONS + 1].decode(errors="replace")
    (folder / "held-out.txt").write_text(held_out, encoding="utf-8")
    written, sweeps = _write_and_sweep(
        folder, held_out=held_out, rest=rest, vit=models[1], digits=plan("vit", text).task.held_out, progress=progress
    )
    return DemoResult(str(folder), models, text=written, sweeps=sweeps)


def _write_and_sweep(
    folder: Path, *, held_out: str, rest: bytes, vit: DemoModel, digits: tuple[Arrays, Tensor], progress: Progress
) -> tuple[DemoText, tuple[SweepReport, ...]]:
    """Generate text with the LLaMA, and find the file to ship of both models."""
    llama = load(folder / "llama", task=Task.TEXT_GENERATION)
    shared = SharedBuild(llama)
    written = write_text(llama, folder, held_out=held_out, shared=shared, progress=progress)
    portable = written.writings[1].parity  # after PyTorch; it needs no further package
    images, labels = digits
    of_text = sweep_text(llama, folder, text=rest, parity=portable, shared=shared, progress=progress)
    of_digits = sweep_digits(
        folder / "vit", folder, digits=images, labels=labels.numpy(), parity=vit.parity, progress=progress
    )
    return written, (of_text, of_digits)
