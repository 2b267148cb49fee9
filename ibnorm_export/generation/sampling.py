"""How the next token is chosen from logits."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import numpy as np
from numpy.typing import NDArray

from ibnorm_export.choices import real_number, whole_number
from ibnorm_export.errors import IBNormError

__all__ = ["Sampling"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen.

    Args:
        max_new_tokens: the maximum number of tokens to generate.
        temperature: temperature of the softmax; 0 takes the likeliest token (greedy).
        top_p: sample only from the likeliest tokens whose probabilities add up to this.
        seed: seed of the random numbers.
        stop: strings that end the text; they are not part of it.

    Raises:
        IBNormError: a value is outside its range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    _: KW_ONLY
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("seed", 0)):
            object.__setattr__(self, name, whole_number(getattr(self, name), name=name, least=least))
        real_number(self.temperature, name="temperature", least=0.0)
        if real_number(self.top_p, name="top_p", above=0.0) > 1.0:
            raise IBNormError(f"top_p is {self.top_p}; it must be above 0 and at most 1")

    def find_stop(self, text: str) -> int:
        """Return where the first of the `stop` strings begins in `text`; -1 if there is none."""
        places = [place for stop in self.stop if (place := text.find(stop)) >= 0]
        return min(places, default=-1)

    def without_stop_prefix(self, text: str) -> str:
        """Return `text` without an end that may be the beginning of a `stop` string."""
        kept = len(text)
        for stop in self.stop:
            for length in range(min(len(stop) - 1, len(text)), 0, -1):
                if text.endswith(stop[:length]):
                    kept = min(kept, len(text) - length)
                    break
        return text[:kept]

    def choose(self, logits: NDArray[np.float32], rng: np.random.Generator) -> int:
        """Choose the next token from the logits (vocabulary,)."""
        if self.temperature == 0.0:
            return int(logits.argmax())
        below = logits.astype(np.float64) - logits.max()
        order = np.argsort(-below, kind="stable")
        with np.errstate(over="ignore"):  # a temperature near 0 sends all but the likeliest to minus infinity
            weights = np.exp(below[order] / self.temperature)
        weights /= weights.sum()
        kept = int(np.searchsorted(np.cumsum(weights), self.top_p)) + 1
        reached = np.cumsum(weights[:kept])
        chosen = int(np.searchsorted(reached, rng.random() * reached[-1], side="right"))
        return int(order[min(chosen, len(reached) - 1)])
