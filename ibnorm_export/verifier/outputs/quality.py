"""How good a language model's predictions are, compared with PyTorch's: agreement, KL divergence, perplexity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.tensors import InputSpec
from ibnorm_export.errors import ModelFileError
from ibnorm_export.findings.code import FindingCode
from ibnorm_export.generation.decoder import Decoder
from ibnorm_export.generation.sampling import Sampling
from ibnorm_export.runtimes.runner import Runner
from ibnorm_export.runtimes.torch import TorchRunner
from ibnorm_export.verifier.comparison import Comparison
from ibnorm_export.verifier.finding import Finding
from ibnorm_export.verifier.report import Quality
from ibnorm_export.verifier.steps import NOTHING, Part
from ibnorm_export.verifier.tolerances import QUALITY_BOUNDS

__all__ = ["POSITIONS", "check_quality", "predict", "require_predictions", "sample_text"]

#: Predictions that are compared; the last `_STEPS` of each window come from cached steps of one token.
POSITIONS: Final = 512
_WINDOW: Final = 128
_STEPS: Final = 32

_Tokens = NDArray[np.int64]
_LogProbabilities = NDArray[np.float64]


def sample_text(model: LoadedModel, *, seed: int = 0) -> NDArray[np.int64]:
    """Tokens (n,) that PyTorch in fp32 samples from the model, for use if no text is given."""
    rng = np.random.default_rng(seed)
    sampling = Sampling(temperature=1.0)
    window = min(_WINDOW, model.max_positions)
    runner = _baseline(model)
    text: list[int] = []
    for _ in range(max(1, (POSITIONS // 2) // window)):
        decoder = Decoder(runner, model.inputs)
        decoder.start(1)
        tokens = [int(rng.integers(model.vocabulary))]
        while len(tokens) < window:
            logits = decoder.feed(np.array([tokens[-1:]], dtype=np.int64))
            tokens.append(sampling.choose(logits[0, -1], rng))
        text += tokens
    return np.array(text, dtype=np.int64)


def require_predictions(tokens: NDArray[np.int64]) -> None:
    """Refuse a text (n,) of fewer than two tokens.

    Raises:
        ModelFileError: nothing can be predicted in it.
    """
    if len(tokens) < 2:
        raise ModelFileError(f"the text has {len(tokens)} token; predictions need at least two: give a longer text")


def predict(comparison: Comparison, _found: Part = NOTHING) -> Part:
    """Compare the predictions of a language model. A quantised one without a text predicts what PyTorch samples."""
    stored, tokens = comparison.file.metadata.quantization, comparison.text
    notes: tuple[str, ...] = ()
    if tokens is None:
        if stored is None:
            return Part()
        tokens = sample_text(comparison.reference.model)
        notes = ("predictions are of text that PyTorch samples from the model; use --text to give your own",)
    kind = comparison.reference.dtype.value if stored is None else f"int{stored.bits}"
    quality = check_quality(comparison, tokens, kind=kind)
    findings = tuple(Finding("quality", str(q), code=FindingCode.PREDICTIONS_DIFFER) for q in quality if not q.passed)
    return Part(quality=quality, findings=findings, notes=notes)


def check_quality(comparison: Comparison, tokens: NDArray[np.int64], *, kind: str) -> tuple[Quality, ...]:
    """Compare the file's predictions with those of PyTorch in fp32; each gets the text's own tokens before it.

    Args:
        comparison: a file of task "text-generation", and its reference.
        tokens: a text (n,).
        kind: dtype of the weights, a key of `QUALITY_BOUNDS`.

    Returns:
        One quality for each way of running the norms.

    Raises:
        ModelFileError: the text has fewer than two tokens.
    """
    require_predictions(tokens)
    model = comparison.reference.model
    window = min(_WINDOW, model.max_positions)
    starts = range(0, min(len(tokens) - 1, POSITIONS), window)
    pieces = [piece for start in starts if len(piece := tokens[start : start + window + 1]) > 1]
    baseline = _baseline(model)
    expected = [_predict(baseline, model.inputs, tokens=piece[:-1]) for piece in pieces]
    found = []
    for norms, runner in comparison.variants.items():
        actual = []
        for index, piece in enumerate(pieces):
            comparison.progress("predicting", index, len(pieces))
            actual.append(_predict(runner, comparison.file_inputs, tokens=piece[:-1]))
        found.append(_judge(norms, kind, pieces=pieces, expected=expected, actual=actual))
    return tuple(found)


def _baseline(model: LoadedModel) -> Runner:
    return TorchRunner(model, model.widened(torch.float32).module)


def _log_softmax(logits: NDArray[np.float32]) -> _LogProbabilities:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    result: _LogProbabilities = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def _predict(runner: Runner, inputs: Sequence[InputSpec], *, tokens: _Tokens) -> _LogProbabilities:
    """(n, vocabulary): the first tokens in one call, the last `_STEPS` one by one through the cache."""
    decoder = Decoder(runner, inputs)
    decoder.start(1)
    first = max(1, len(tokens) - _STEPS)
    parts = [decoder.feed(tokens[None, :first])[0]]
    parts += [decoder.feed(tokens[None, i : i + 1])[0] for i in range(first, len(tokens))]
    return _log_softmax(np.concatenate(parts))


def _judge(
    norms: str,
    kind: str,
    *,
    pieces: Sequence[_Tokens],
    expected: Sequence[_LogProbabilities],
    actual: Sequence[_LogProbabilities],
) -> Quality:
    agreeing = positions = 0
    divergence = baseline_loss = loss = 0.0
    for piece, p, q in zip(pieces, expected, actual, strict=True):
        following = piece[1:, None]
        agreeing += int((p.argmax(-1) == q.argmax(-1)).sum())
        divergence += float((np.exp(p) * (p - q)).sum())
        baseline_loss -= float(np.take_along_axis(p, following, -1).sum())
        loss -= float(np.take_along_axis(q, following, -1).sum())
        positions += len(piece) - 1
    bound = QUALITY_BOUNDS[kind]
    return Quality(
        norms,
        kind,
        positions=positions,
        agreement=agreeing / positions,
        divergence=divergence / positions,
        baseline_perplexity=float(np.exp(baseline_loss / positions)),
        perplexity=float(np.exp(loss / positions)),
        bound=bound,
        passed=bool(
            agreeing / positions >= bound.agreement
            and divergence / positions <= bound.divergence
            and np.exp((loss - baseline_loss) / positions) <= bound.perplexity
        ),
    )
