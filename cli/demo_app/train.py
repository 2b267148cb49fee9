"""Training until a goal is reached, by steps: the same seed gives the same curve, however busy the machine is."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ibnorm_export.analysis.information import excess_kurtosis, information_bottleneck
from ibnorm_export.artifacts.tokenizer import write_byte_tokenizer
from ibnorm_export.cli.demo_app import MAX_STEPS
from ibnorm_export.cli.demo_app.tasks import Goal, Task, plan, write_preprocessor
from ibnorm_export.models.new_models import new_model, save
from ibnorm_export.op.torch_op import IBNorm
from ibnorm_export.progress import Progress, silent

__all__ = ["Evaluation", "train", "train_checkpoint"]

#: Number of steps between two evaluations on held-out data.
EVALUATE_EVERY: Final = 25

_LEARNING_RATE: Final = 4e-3
_WARM_UP_STEPS: Final = 20

#: The learning rate falls along a cosine over this number of steps, and then stays at a twentieth.
_DECAY_STEPS: Final = 600


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Measurements of a model in training, on held-out data.

    Args:
        step: number of training steps before this evaluation.
        loss: cross-entropy in bits: per byte for text, per image for digits.
        accuracy: share of correct predictions.
        about_target, about_input: I(T; Y) and I(T; X) in bits, where T is the final norm's output.
        bottleneck: I(T; Y) - BETA * I(T; X) in bits.
        kurtosis_in, kurtosis_out: mean excess kurtosis of the final norm's input and output.
    """

    step: int
    loss: float
    _: KW_ONLY
    accuracy: float
    about_target: float
    about_input: float
    bottleneck: float
    kurtosis_in: float
    kurtosis_out: float


def _evaluate(model: nn.Module, task: Task, *, step: int) -> Evaluation:
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
    if before.dim() == 3 and targets.dim() == 1:  # a classifier uses the first token only
        before, after = before[:, 0], after[:, 0]
    before, after = before.reshape(-1, before.shape[-1]), after.reshape(-1, after.shape[-1])
    logits, targets = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    chosen = np.random.default_rng(0).choice(len(targets), min(256, len(targets)), replace=False)
    bottleneck = information_bottleneck(embedded.numpy()[chosen], after.numpy()[chosen], target=targets.numpy()[chosen])
    return Evaluation(
        step=step,
        loss=float(F.cross_entropy(logits, targets)) / math.log(2.0),
        accuracy=float((logits.argmax(-1) == targets).float().mean()),
        about_target=bottleneck.about_target,
        about_input=bottleneck.about_input,
        bottleneck=bottleneck.value(),
        kurtosis_in=excess_kurtosis(before.numpy()),
        kurtosis_out=excess_kurtosis(after.numpy()),
    )


def _learning_rate(step: int) -> float:
    warm_up = min(1.0, (step + 1) / _WARM_UP_STEPS)
    done = min(1.0, step / _DECAY_STEPS)
    return _LEARNING_RATE * warm_up * (0.05 + 0.95 * 0.5 * (1.0 + math.cos(math.pi * done)))


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Let PyTorch compute with one thread while the block runs.

    On a busy machine, threads that wait for each other at every small operation take many times as long; and with
    one thread, sums do not depend on the number of cores.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train(
    model: nn.Module,
    task: Task,
    *,
    goal: Goal | None,
    max_steps: int = MAX_STEPS,
    what: str = "training",
    progress: Progress = silent,
) -> tuple[Evaluation, ...]:
    """Train a model with AdamW until an evaluation on held-out data reaches the goal.

    Args:
        model: the model; it is left in evaluation mode.
        task: what it learns.
        goal: when training ends; None trains for `max_steps`.
        max_steps: when training ends at the latest.
        what: label of the progress.
        progress: called after every step.

    Returns:
        The evaluations: before training, every 25 steps, and at the end.
    """
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, weight_decay=0.01, betas=(0.9, 0.95))
    with _one_thread():
        model.train()
        evaluations = [_evaluate(model, task, step=0)]
        for step in range(max_steps):
            for group in optimizer.param_groups:
                group["lr"] = _learning_rate(step)
            inputs, targets = task.batches(generator)
            logits = task.logits(model, inputs)
            loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if (step + 1) % EVALUATE_EVERY == 0 or step + 1 == max_steps:
                evaluations.append(_evaluate(model, task, step=step + 1))
                last = evaluations[-1]
                if goal is not None and goal.reached(loss=last.loss, accuracy=last.accuracy):
                    break
            progress(f"{what}: {evaluations[-1].loss:.2f} bits", step + 1, max_steps)
        model.eval()
    return tuple(evaluations)


def train_checkpoint(
    name: str,
    folder: Path,
    *,
    max_steps: int = MAX_STEPS,
    text: Path | None = None,
    progress: Progress = silent,
) -> tuple[Evaluation, ...]:
    """Train one model of the demo and save it.

    Args:
        name: "llama" or "vit".
        folder: receives the checkpoint, with a tokenizer or a preprocessor.
        max_steps: when training ends at the latest; it ends when the goal of the model is reached.
        text: a file to train the LLaMA on; None means the documentation that CPython ships.
        progress: receives the progress of the work.

    Returns:
        The evaluations on held-out data: before, during and after training.
    """
    planned = plan(name, text)
    model = new_model(planned.config, planned.spec)
    evaluations = train(
        model, planned.task, goal=planned.goal, max_steps=max_steps, what=f"training {name}", progress=progress
    )
    save(model, folder)
    if name == "llama":
        write_byte_tokenizer(folder)
    else:
        write_preprocessor(folder)
    return evaluations
