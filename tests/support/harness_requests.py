"""A checkpoint and requests on which an exported model is compared with the evaluation harness's own model."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from ibnorm_export import IBNormSpec
from ibnorm_export.artifacts.tokenizer import write_byte_tokenizer
from tests.support.checkpoints import LLAMA, save_checkpoint


def save_harness_checkpoint(folder: Path) -> Path:
    """Weights large enough that choices differ clearly. Byte 0 begins and ends a text."""
    config = {**LLAMA, "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 0}
    save_checkpoint(folder, config, IBNormSpec("L", 4.0, epsilon=1e-5, bias=False), seed=1)
    write_byte_tokenizer(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    first = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    token = next(word for word, number in first.items() if number == 0)
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "bos_token": token, "eos_token": token}))
    return folder


def words(rng: random.Random, count: int) -> str:
    """Random words of the letters a to h."""
    return " ".join("".join(rng.choices("abcdefgh", k=rng.randint(1, 6))) for _ in range(count))


def request_pairs() -> list[tuple[Any, ...]]:
    """500 pairs of context and continuation: short and long ones, none, and spaces at the end of the context."""
    rng = random.Random(0)
    pairs: list[tuple[Any, ...]] = [(words(rng, rng.randint(1, 18)), f" {words(rng, 2)}") for _ in range(480)]
    pairs += [(f"{words(rng, 3)}  ", words(rng, 1)) for _ in range(10)]
    return pairs + [("", words(rng, 2)) for _ in range(10)]
