"""What to evaluate and how: the options of `evaluate`."""

from __future__ import annotations

import enum
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

from ibnorm_export.choices import choice, real_number, whole_number
from ibnorm_export.errors import IBNormError, quoted
from ibnorm_export.runtimes.runner import Backend, Endpoint, Kernels
from ibnorm_export.serving.text_settings import check_api_key

__all__ = ["EvaluationOptions", "TaskName"]


class TaskName(enum.StrEnum):
    """What a model is evaluated on."""

    PERPLEXITY = "perplexity"
    """How well a language model predicts texts."""
    CLASSIFICATION = "classification"
    """How many images a classifier recognises."""
    CHOICE = "choice"
    """How many questions a language model answers by choosing the likeliest of some texts."""
    LM_EVAL = "lm-eval"
    """Tasks of EleutherAI's lm-evaluation-harness, whose data is on disk."""


@dataclass(frozen=True, slots=True)
class EvaluationOptions:
    """How to evaluate. It has many fields because they mirror the options of the command.

    Args:
        backend: what runs exported files, a `Backend` or its name. None is "ort-cpu", and onnxruntime-genai for a
            folder that was exported for it. Checkpoints run in PyTorch.
        kernels: how the norms of exported files run.
        max_drop: the largest loss that passes: of accuracy, in shares (0.005 is half a percentage point); of
            perplexity, as a relative increase.
        limit: number of samples; None takes all.
        batch: samples that a candidate is asked about at a time; None chooses.
        max_length: tokens of a window; None takes the positions of the model, at most 1024.
        stride: tokens that are scored in each window but the first; None is half of the window.
        max_unreadable: share of samples that may be unreadable.
        results: folder of the results of each sample. A run that was stopped goes on where it was, and a candidate that
            has been evaluated there is not run again. None keeps nothing.
        tokenizer: folder of the tokenizer; None takes that of a candidate.
        preprocessing: folder with the settings of the image processor; None takes those of a candidate.
        threads: threads of the runtime; None is its default.
        endpoint: the model on a running server, for backend "triton".
        api_key: key that is sent to each text endpoint among the models; empty sends none. No report shows it.
        tasks: names of tasks, groups or leaderboards, for task "lm-eval"; none runs all of the data folder's own.
        seed: seed of the bootstrap.

    Raises:
        IBNormError: a value is not legal.
    """

    backend: str | None = None
    kernels: Kernels = Kernels.AUTO
    _: KW_ONLY
    max_drop: float = 0.005
    limit: int | None = None
    batch: int | None = None
    max_length: int | None = None
    stride: int | None = None
    max_unreadable: float = 0.0
    results: Path | None = None
    tokenizer: Path | None = None
    preprocessing: Path | None = None
    threads: int | None = None
    endpoint: Endpoint | None = None
    api_key: str = field(default="", repr=False)
    tasks: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.backend is not None:
            object.__setattr__(self, "backend", choice(Backend, self.backend, name="backend"))
        object.__setattr__(self, "kernels", choice(Kernels, self.kernels, name="kernels"))
        for name in ("max_drop", "max_unreadable"):
            object.__setattr__(self, name, real_number(getattr(self, name), name=name, least=0.0))
        for name, least in (("limit", 1), ("batch", 1), ("max_length", 2), ("stride", 1), ("threads", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, whole_number(value, name=name, least=least))
        object.__setattr__(self, "tasks", _names(self.tasks))
        check_api_key(self.api_key)
        for name in ("results", "tokenizer", "preprocessing"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, Path(getattr(self, name)))

    @property
    def file_backend(self) -> str:
        """The backend of an exported file."""
        return self.backend or Backend.ORT_CPU


def _names(value: Any) -> tuple[str, ...]:
    listed = value.split(",") if isinstance(value, str) else value
    if not isinstance(listed, (list, tuple)) or not all(isinstance(name, str) for name in listed):
        raise IBNormError(f"tasks is {quoted(value)}; it must be a list of names of tasks")
    return tuple(name.strip() for name in listed if name.strip())
