"""What the two models of the demo learn, and how they are built.

The LLaMA reads bytes of English text that every CPython ships (`pydoc_data.topics`); the ViT reads
scikit-learn's handwritten digits.
"""

from __future__ import annotations

import enum
import json
import pydoc_data.topics
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ibnorm_export.artifacts.tensors import Arrays
from ibnorm_export.cli.demo_app.configs import CONFIGS
from ibnorm_export.errors import CheckpointError
from ibnorm_export.op.spec import IBNormSpec
from ibnorm_export.optional_packages import import_package

__all__ = [
    "Goal",
    "Metric",
    "Plan",
    "Task",
    "digits_task",
    "plan",
    "read_training_text",
    "text_task",
    "training_split",
    "write_preprocessor",
]

#: Pixels of the digits are 0 (black) to 16 (white); these make their mean about 0 and their variance about 1.
_WHITE: Final = 16
_MEAN: Final = 4.9
_STD: Final = 6.0

#: Bytes of a training sequence.
_CONTEXT: Final = 128

#: Minimum size of a training text, in bytes.
_MIN_TEXT_BYTES: Final = 20_000


class Metric(enum.StrEnum):
    """The figure that a goal limits."""

    BITS_PER_BYTE = "bits per byte"
    ACCURACY = "accuracy"


@dataclass(frozen=True, slots=True)
class Goal:
    """How good a model must become, on data held out from training.

    Args:
        metric: what is measured.
        bound: the largest number of bits per byte, or the smallest accuracy.
    """

    metric: Metric
    bound: float

    def reached(self, *, loss: float, accuracy: float) -> bool:
        """Whether a model with this loss in bits and this accuracy is good enough."""
        return loss <= self.bound if self.metric is Metric.BITS_PER_BYTE else accuracy >= self.bound

    def describe(self, *, loss: float, accuracy: float) -> str:
        """The reached and the required value, in one phrase."""
        if self.metric is Metric.BITS_PER_BYTE:
            return f"{loss:.2f} bits per byte (at most {self.bound:g})"
        return f"{accuracy:.1%} of digits correct (at least {self.bound:.0%})"


@dataclass(frozen=True, slots=True)
class Task:
    """A learning task.

    Args:
        batches: draws one training batch: inputs and targets.
        held_out: inputs and targets that are not trained on.
        logits: runs a model on inputs.
        final_norm: path of the norm whose output is analysed.
        embedding: what the model reads, (n, features), one row for each target.
    """

    batches: Callable[[torch.Generator], tuple[Arrays, Tensor]]
    held_out: tuple[Arrays, Tensor]
    _: KW_ONLY
    logits: Callable[[nn.Module, Arrays], Tensor]
    final_norm: str
    embedding: Callable[[nn.Module, Arrays], Tensor]


@dataclass(frozen=True, slots=True)
class Plan:
    """A model of the demo.

    Args:
        task: what it learns.
        config: its config.json.
        spec: its norms.
        goal: when its training ends.
        sizes: sizes of the dynamic axes for timing.
    """

    task: Task
    config: dict[str, Any]
    _: KW_ONLY
    spec: IBNormSpec
    goal: Goal
    sizes: dict[str, int]


def training_split(text: bytes) -> tuple[bytes, bytes]:
    """Split a text into the part to train on and the part that is held out, a tenth."""
    cut = len(text) * 9 // 10
    return text[:cut], text[cut:]


def read_training_text(path: Path | None = None) -> bytes:
    """Read a text to train on; None means the documentation that CPython ships.

    Raises:
        CheckpointError: the file cannot be read or is too short.
    """
    if path is None:
        return "\n\n".join(pydoc_data.topics.topics.values()).encode()
    try:
        text = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"the text {path} cannot be read: {error.strerror or error}") from error
    if len(text) < _MIN_TEXT_BYTES:
        raise CheckpointError(
            f"the text {path} has {len(text)} bytes; at least {_MIN_TEXT_BYTES} are needed to train on"
        )
    return text


def text_task(text: bytes) -> Task:
    """Predict the next byte of a text."""
    training, rest = (
        torch.from_numpy(np.frombuffer(part, dtype=np.uint8).astype(np.int64)) for part in training_split(text)
    )

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
    return Task(batches, held_out, logits=logits, final_norm="model.norm", embedding=embedding)


def digits_task() -> Task:
    """Name the handwritten digit in an image."""
    datasets = import_package("sklearn.datasets", extra="demo", purpose="the demo")
    images, labels = datasets.load_digits(return_X_y=True)
    pixels = ((images.reshape(-1, 1, 8, 8) - _MEAN) / _STD).astype(np.float32)
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
    return Task(batches, held_out, logits=logits, final_norm="vit.layernorm", embedding=embedding)


def write_preprocessor(folder: Path) -> None:
    """Write preprocessor_config.json, with which transformers.js turns images into what the ViT was trained on."""
    config, _ = CONFIGS["vit"]
    settings = {
        "image_processor_type": "ViTImageProcessor",
        "do_convert_rgb": False,
        "do_resize": True,
        "size": {"height": config["image_size"], "width": config["image_size"]},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": _WHITE / 255,
        "do_normalize": True,
        "image_mean": [_MEAN],
        "image_std": [_STD],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def plan(name: str, text: Path | None = None) -> Plan:
    """Plan one model of the demo.

    Args:
        name: "llama" or "vit".
        text: a file to train the LLaMA on; None means the documentation that CPython ships.

    Raises:
        CheckpointError: the text cannot be used.
    """
    config, spec = CONFIGS[name]
    if name == "llama":
        return Plan(
            text_task(read_training_text(text)),
            config,
            spec=spec,
            goal=Goal(Metric.BITS_PER_BYTE, 3.2),
            sizes={"batch_size": 1, "sequence_length": 128},
        )
    return Plan(
        digits_task(),
        config,
        spec=spec,
        goal=Goal(Metric.ACCURACY, 0.90),
        sizes={"batch_size": 8},
    )
