"""How good a language model's predictions still are: agreement, KL divergence and perplexity beside PyTorch's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.tensors import InputSpec
from ibnorm_export.errors import ModelFileError
from ibnorm_export.generation.decoder import Decoder
from ibnorm_export.generation.sampling import Sampling
from ibnorm_export.progress import Progress
from ibnorm_export.runtimes.runner import Runner
from ibnorm_export.verifier.report import Quality
from ibnorm_export.verifier.tolerances import QualityBound

__all__ = ["POSITIONS", "QUALITY_BOUNDS", "check_quality", "demand_predictions", "own_text"]

#: Predictions that are compared; the last `_STEPS` of each window come from cached steps of one token.
POSITIONS: Final = 512
_WINDOW: Final = 128
_STEPS: Final = 32

#: The one table for models whose weights or arithmetic are rounded: greedy agreement with PyTorch in fp32 at least,
#: mean KL divergence in nats at most, perplexity over PyTorch's at most. int8 and int4 are bars for trained models.
QUALITY_BOUNDS: Final = {
    "fp32": QualityBound(1.0, 1e-6, 1.0001),
    "fp16": QualityBound(0.995, 1e-4, 1.001),
    "bf16": QualityBound(0.97, 1e-3, 1.01),
    "int8": QualityBound(0.97, 2e-3, 1.01),
    "int4": QualityBound(0.88, 4e-2, 1.03),
}


def own_text(model: LoadedModel, own: Runner, *, seed: int = 0) -> NDArray[np.int64]:
    """Tokens (n,) that PyTorch samples from the model itself: what it is asked for where no text is given."""
    rng = np.random.default_rng(seed)
    sampling = Sampling(temperature=1.0)
    window = min(_WINDOW, model.max_positions)
    pieces: list[int] = []
    for _ in range(max(1, (POSITIONS // 2) // window)):
        decoder = Decoder(own, model.inputs)
        decoder.start(1)
        tokens = [int(rng.integers(model.vocabulary))]
        while len(tokens) < window:
            logits = decoder.feed(np.array([tokens[-1:]], dtype=np.int64))
            tokens.append(sampling.choose(logits[0, -1], rng))
        pieces += tokens
    return np.array(pieces, dtype=np.int64)


def demand_predictions(tokens: NDArray[np.int64]) -> None:
    """Refuse a text (n,) in which no token follows another.

    Raises:
        ModelFileError: nothing can be predicted in it.
    """
    if len(tokens) < 2:
        raise ModelFileError(f"the text has {len(tokens)} token; predictions need at least two: give a longer text")


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def _logits(runner: Runner, inputs: tuple[InputSpec, ...], *, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    """(n, vocabulary): the first tokens at once, the last `_STEPS` one by one through the cache."""
    decoder = Decoder(runner, inputs)
    decoder.start(1)
    first = max(1, len(tokens) - _STEPS)
    parts = [decoder.feed(tokens[None, :first])[0]]
    parts += [decoder.feed(tokens[None, i : i + 1])[0] for i in range(first, len(tokens))]
    return np.concatenate(parts)


def check_quality(
    model: LoadedModel,
    own: Runner,
    *,
    runners: Mapping[str, Runner],
    inputs: tuple[InputSpec, ...],
    kind: str,
    tokens: NDArray[np.int64],
    progress: Progress,
) -> tuple[Quality, ...]:
    """Teacher-forced predictions of each runner beside PyTorch's in fp32.

    Args:
        model: of task "text-generation".
        own: PyTorch in fp32.
        runners: of the file, by how its norms run.
        inputs: of the file.
        kind: key of `QUALITY_BOUNDS`.
        tokens: a text (n,).

    Raises:
        ModelFileError: the text has fewer than two tokens.
    """
    demand_predictions(tokens)
    window = min(_WINDOW, model.max_positions)
    starts = range(0, min(len(tokens) - 1, POSITIONS), window)
    pieces = [tokens[start : start + window + 1] for start in starts]
    pieces = [piece for piece in pieces if len(piece) > 1]
    found = []
    expected = [_log_softmax(_logits(own, model.inputs, tokens=piece[:-1])) for piece in pieces]
    for norms, runner in runners.items():
        agree = count = 0
        divergence = before = after = 0.0
        for index, (piece, p) in enumerate(zip(pieces, expected, strict=True)):
            progress("predicting", index, len(pieces))
            q = _log_softmax(_logits(runner, inputs, tokens=piece[:-1]))
            following = piece[1:, None]
            agree += int((p.argmax(-1) == q.argmax(-1)).sum())
            divergence += float((np.exp(p) * (p - q)).sum())
            before -= float(np.take_along_axis(p, following, -1).sum())
            after -= float(np.take_along_axis(q, following, -1).sum())
            count += len(piece) - 1
        bound = QUALITY_BOUNDS[kind]
        ratio = float(np.exp((after - before) / count))
        passed = agree / count >= bound.agreement and divergence / count <= bound.divergence
        found.append(
            Quality(
                norms,
                kind,
                positions=count,
                agreement=agree / count,
                divergence=divergence / count,
                before=float(np.exp(before / count)),
                after=float(np.exp(after / count)),
                bound=bound,
                passed=bool(passed and ratio <= bound.perplexity),
            )
        )
    return tuple(found)
