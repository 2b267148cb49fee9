"""The main job on real input, with nothing to download: train, save, export, verify, benchmark, report.

The LLaMA reads bytes of English text that every CPython ships (`pydoc_data.topics`); the ViT reads
scikit-learn's handwritten digits.
"""

from __future__ import annotations

import math
import pydoc_data.topics
import time
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import sklearn.datasets
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ibnorm_export.analysis.information import excess_kurtosis, information_bottleneck
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.tensors import Arrays, DType
from ibnorm_export.artifacts.tokenizer import write_byte_tokenizer
from ibnorm_export.benchmark.bench import bench_forward
from ibnorm_export.benchmark.options import BenchOptions, Timing
from ibnorm_export.benchmark.report import BenchReport
from ibnorm_export.cli.demo_app.text import DemoText, write_text
from ibnorm_export.errors import CheckpointError
from ibnorm_export.exporter.export import ExportOptions, export
from ibnorm_export.models.loading import load, new_model, save
from ibnorm_export.op.spec import Compression, IBNormSpec
from ibnorm_export.op.torch_op import IBNorm
from ibnorm_export.progress import Progress, silent
from ibnorm_export.verifier.quality import POSITIONS
from ibnorm_export.verifier.report import ParityReport
from ibnorm_export.verifier.verify import VerifyOptions, verify

__all__ = ["MAX_BITS_PER_BYTE", "MIN_ACCURACY", "DemoModel", "DemoResult", "Evaluation", "run_demo", "train_checkpoint"]

#: What the trained models must reach, on data held out from training.
MAX_BITS_PER_BYTE: Final = 3.6
MIN_ACCURACY: Final = 0.90

_LLAMA: Final = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 256,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
_VIT: Final = {
    "model_type": "vit",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 8,
    "patch_size": 2,
    "num_channels": 1,
    "num_labels": 10,
}
_CONTEXT: Final = 128
_EVALUATIONS: Final = 8


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One look at a model in training, on held-out data.

    Args:
        seconds: of training so far.
        loss: cross-entropy in bits: per byte for text, per image for digits.
        accuracy: share of right predictions.
        about_target, about_input: I(T; Y) and I(T; X) in bits, T the final norm's output.
        bottleneck: I(T; Y) - BETA * I(T; X) in bits.
        kurtosis_in, kurtosis_out: mean excess kurtosis of the final norm's input and output.
    """

    seconds: float
    loss: float
    _: KW_ONLY
    accuracy: float
    about_target: float
    about_input: float
    bottleneck: float
    kurtosis_in: float
    kurtosis_out: float


@dataclass(frozen=True, slots=True)
class DemoModel:
    """One trained model and what became of it."""

    name: str
    norm: str
    _: KW_ONLY
    goal: str
    reached: bool
    checkpoint: str
    evaluations: tuple[Evaluation, ...]
    parity: tuple[ParityReport, ...]
    latency: BenchReport

    def __bool__(self) -> bool:
        return self.reached and bool(self.parity) and all(self.parity)


@dataclass(frozen=True, slots=True)
class DemoResult:
    """True when every model reached its goal and passed parity in every type, and every form wrote the same text."""

    folder: str
    models: tuple[DemoModel, ...]
    text: DemoText

    def __bool__(self) -> bool:
        return bool(self.models) and all(self.models) and bool(self.text)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
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
        }


@dataclass(frozen=True, slots=True)
class _Task:
    """Something to learn."""

    batches: Callable[[torch.Generator], tuple[Arrays, Tensor]]  # inputs, targets
    held_out: tuple[Arrays, Tensor]
    _: KW_ONLY
    logits: Callable[[nn.Module, Arrays], Tensor]
    final_norm: str
    embedding: Callable[[nn.Module, Arrays], Tensor]  # (n, features), one row for each target


def _text(path: Path | None) -> bytes:
    if path is None:
        return "\n\n".join(pydoc_data.topics.topics.values()).encode()
    try:
        text = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"the text {path} cannot be read: {error.strerror or error}") from error
    if len(text) < 20_000:
        raise CheckpointError(f"the text {path} has {len(text)} bytes; at least 20000 are needed to train on")
    return text


def _text_task(text: bytes) -> _Task:
    data = torch.from_numpy(np.frombuffer(text, dtype=np.uint8).astype(np.int64))
    cut = len(data) * 9 // 10
    training, rest = data[:cut], data[cut:]

    def windows(source: Tensor, starts: Tensor) -> tuple[Arrays, Tensor]:
        rows = torch.stack([source[int(s) : int(s) + _CONTEXT + 1] for s in starts])
        ids = rows[:, :-1].numpy()
        return {"input_ids": ids, "attention_mask": np.ones_like(ids)}, rows[:, 1:]

    def batches(generator: torch.Generator) -> tuple[Arrays, Tensor]:
        return windows(training, torch.randint(len(training) - _CONTEXT - 1, (16,), generator=generator))

    def logits(model: nn.Module, inputs: Arrays) -> Tensor:
        result: Tensor = model(input_ids=torch.from_numpy(inputs["input_ids"]), use_cache=False).logits
        return result

    def embedding(model: nn.Module, inputs: Arrays) -> Tensor:
        assert isinstance(model, PreTrainedModel)
        rows: Tensor = model.get_input_embeddings()(torch.from_numpy(inputs["input_ids"])).flatten(0, 1)
        return rows

    held_out = windows(rest, torch.linspace(0, len(rest) - _CONTEXT - 2, 32))
    return _Task(batches, held_out, logits=logits, final_norm="model.norm", embedding=embedding)


def _digits_task() -> _Task:
    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    pixels = ((images.reshape(-1, 1, 8, 8) - 4.9) / 6.0).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(labels))
    pixels, labels = pixels[order], labels[order].astype(np.int64)
    cut = len(labels) * 4 // 5

    def batches(generator: torch.Generator) -> tuple[Arrays, Tensor]:
        chosen = torch.randint(cut, (64,), generator=generator).numpy()
        return {"pixel_values": pixels[chosen]}, torch.from_numpy(labels[chosen])

    def logits(model: nn.Module, inputs: Arrays) -> Tensor:
        result: Tensor = model(pixel_values=torch.from_numpy(inputs["pixel_values"])).logits
        return result

    def embedding(model: nn.Module, inputs: Arrays) -> Tensor:
        return torch.from_numpy(inputs["pixel_values"]).flatten(1)

    held_out = ({"pixel_values": pixels[cut:]}, torch.from_numpy(labels[cut:]))
    return _Task(batches, held_out, logits=logits, final_norm="vit.layernorm", embedding=embedding)


def _evaluate(model: nn.Module, task: _Task, *, seconds: float) -> Evaluation:
    norm = model.get_submodule(task.final_norm)
    assert isinstance(norm, IBNorm)
    seen: list[tuple[Tensor, Tensor]] = []
    hook = norm.register_forward_hook(lambda _, args, out: seen.append((args[0].detach(), out.detach())))
    inputs, targets = task.held_out
    model.eval()
    try:
        with torch.no_grad():
            logits = task.logits(model, inputs)
            embedded = task.embedding(model, inputs)
    finally:
        hook.remove()
        model.train()
    before, after = seen[0]
    if before.dim() == 3 and targets.dim() == 1:  # a classifier reads its first token
        before, after = before[:, 0], after[:, 0]
    before, after = before.reshape(-1, before.shape[-1]), after.reshape(-1, after.shape[-1])
    logits, targets = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    chosen = np.random.default_rng(0).choice(len(targets), min(256, len(targets)), replace=False)
    bottleneck = information_bottleneck(embedded.numpy()[chosen], after.numpy()[chosen], target=targets.numpy()[chosen])
    return Evaluation(
        seconds=seconds,
        loss=float(F.cross_entropy(logits, targets)) / math.log(2.0),
        accuracy=float((logits.argmax(-1) == targets).float().mean()),
        about_target=bottleneck.about_target,
        about_input=bottleneck.about_input,
        bottleneck=bottleneck.value(),
        kurtosis_in=excess_kurtosis(before.numpy()),
        kurtosis_out=excess_kurtosis(after.numpy()),
    )


def _train(
    model: nn.Module, task: _Task, *, rate: float, seconds: float, what: str, progress: Progress
) -> tuple[Evaluation, ...]:
    """AdamW for a given time, learning rate by a cosine over that time; time spent in evaluations is not counted.

    The time is the calling thread's on a processor: a busy machine trains for longer, not less.
    """
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01, betas=(0.9, 0.95))
    model.train()
    evaluations = [_evaluate(model, task, seconds=0.0)]
    spent, step = 0.0, 0
    while spent < seconds:
        start = time.thread_time()
        share = spent / seconds
        warm = min(1.0, (step + 1) / 20)
        for group in optimizer.param_groups:
            group["lr"] = rate * warm * (0.05 + 0.95 * 0.5 * (1.0 + math.cos(math.pi * share)))
        inputs, targets = task.batches(generator)
        logits = task.logits(model, inputs)
        loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        spent += time.thread_time() - start
        step += 1
        if spent >= seconds * len(evaluations) / _EVALUATIONS:
            evaluations.append(_evaluate(model, task, seconds=spent))
        progress(f"{what}: {evaluations[-1].loss:.2f} bits", min(int(spent), int(seconds)), int(seconds))
    model.eval()
    return tuple(evaluations)


def _real_inputs(task: _Task, count: int) -> Iterator[Arrays]:
    inputs, _ = task.held_out
    for index in range(count):
        yield {name: array[index * 4 : index * 4 + 4] for name, array in inputs.items()}


def _ship(
    checkpoint: Path, file: Path, *, task: _Task, sizes: dict[str, int], progress: Progress
) -> tuple[tuple[ParityReport, ...], BenchReport]:
    """Export, verify on drawn and real inputs, in fp32 and fp16; benchmark fp32 against PyTorch."""
    reports = []
    exported: ExportedModel | None = None
    for dtype in (DType.FP16, DType.FP32):
        target = file if dtype is DType.FP32 else file.with_suffix(f".{dtype.value}.onnx")
        exported = export(load(checkpoint), target, options=ExportOptions(dtype=dtype), progress=progress)
        model: LoadedModel = load(checkpoint)
        rng = np.random.default_rng(0)
        inputs = [*(model.sample(rng, index) for index in range(4)), *_real_inputs(task, 2)]
        reports.append(verify(exported, model, options=VerifyOptions(), inputs=inputs, progress=progress))
    assert exported is not None
    options = BenchOptions(sizes=sizes, rounds=20, timing=Timing(warmup_ms=200.0))
    latency = bench_forward(exported, model=load(checkpoint), against=["torch"], options=options, progress=progress)
    return tuple(reversed(reports)), latency


@dataclass(frozen=True, slots=True)
class _Plan:
    """A model of the demo: what it learns, how it is built and at what rate, and the sizes that it is timed at."""

    task: _Task
    config: dict[str, Any]
    _: KW_ONLY
    spec: IBNormSpec
    rate: float
    sizes: dict[str, int]


def _plan(name: str, text: str | Path | None) -> _Plan:
    if name == "llama":
        task = _text_task(_text(None if text is None else Path(text)))
        spec = IBNormSpec(Compression.LOGARITHMIC, bias=False)
        return _Plan(task, _LLAMA, spec=spec, rate=4e-3, sizes={"batch": 1, "sequence": 128})
    return _Plan(_digits_task(), _VIT, spec=IBNormSpec(Compression.TANH), rate=4e-3, sizes={"batch": 8})


def train_checkpoint(
    name: str, folder: Path, *, minutes: float, text: str | Path | None = None, progress: Progress = silent
) -> tuple[Evaluation, ...]:
    """Train one model of the demo and save it.

    Args:
        name: "llama" or "vit".
        folder: gets the checkpoint, with a tokenizer where the model reads text.
        minutes: of training, in processor time of the calling thread.
        text: as `run_demo`.
        progress: called as the work goes on.

    Returns:
        How it did on held-out data, before, during and after training.
    """
    plan = _plan(name, text)
    model = new_model(plan.config, plan.spec)
    evaluations = _train(
        model, plan.task, rate=plan.rate, seconds=minutes * 60.0, what=f"training {name}", progress=progress
    )
    save(model, folder)
    if name == "llama":
        write_byte_tokenizer(folder)
    return evaluations


def run_demo(
    folder: str | Path, minutes: float = 0.5, *, text: str | Path | None = None, progress: Progress = silent
) -> DemoResult:
    """Train an IBNorm-L LLaMA and an IBNorm-T ViT, and do the main job with both.

    Args:
        folder: gets `llama/` and `vit/` (checkpoints), the .onnx files, the folders of `write_text`, and what was not
            trained on: `held-out.txt`, `digits.npz` with `labels.npy`; made if missing.
        minutes: of training for each model, in processor time of the calling thread.
        text: a file to train the LLaMA on; None takes CPython's own documentation.
        progress: called as the work goes on.

    Raises:
        CheckpointError: the text cannot be used, minutes is not positive, or the folder cannot be
            written.
    """
    folder = Path(folder)
    if not minutes > 0.0:
        raise CheckpointError(f"minutes is {minutes}; it must be above 0")
    source = _text(None if text is None else Path(text))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot make the folder {folder}: {error.strerror or error}") from error
    done = []
    for name in ("llama", "vit"):
        evaluations = train_checkpoint(name, folder / name, minutes=minutes, text=text, progress=progress)
        plan = _plan(name, text)
        parity, latency = _ship(
            folder / name, folder / f"{name}.onnx", task=plan.task, sizes=plan.sizes, progress=progress
        )
        last = evaluations[-1]
        if name == "llama":
            goal, reached = (
                f"{last.loss:.2f} bits per byte (at most {MAX_BITS_PER_BYTE})",
                last.loss <= MAX_BITS_PER_BYTE,
            )
        else:
            digits, labels = plan.task.held_out
            np.savez(folder / "digits.npz", **digits)  # type: ignore[arg-type]  # its stub takes allow_pickle for one
            np.save(folder / "labels.npy", labels.numpy())
            goal, reached = (
                f"{last.accuracy:.1%} of digits right (at least {MIN_ACCURACY:.0%})",
                last.accuracy >= MIN_ACCURACY,
            )
        done.append(
            DemoModel(
                name,
                str(plan.spec),
                goal=goal,
                reached=reached,
                checkpoint=str(folder / name),
                evaluations=evaluations,
                parity=parity,
                latency=latency,
            )
        )
    held_out = source[len(source) * 9 // 10 :][: POSITIONS + 1].decode(errors="replace")
    (folder / "held-out.txt").write_text(held_out, encoding="utf-8")
    return DemoResult(
        str(folder), tuple(done), write_text(folder / "llama", folder, held_out=held_out, progress=progress)
    )
