"""The numeric verdict on decoding: a prompt and many cached steps, against float64 PyTorch without a cache."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.kv_cache import positions
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.metadata import CacheKind, Target
from ibnorm_export.artifacts.tensors import Arrays, DType
from ibnorm_export.errors import ModelFileError
from ibnorm_export.generation.decoder import Decoder
from ibnorm_export.generation.sessions import SessionSource, open_sessions
from ibnorm_export.progress import Progress
from ibnorm_export.runtimes.runner import Kernels, Runner
from ibnorm_export.verifier.error_accumulator import ErrorSums
from ibnorm_export.verifier.report import Finding, OutputParity
from ibnorm_export.verifier.tolerances import BOUNDS

__all__ = ["PROMPT", "STEPS", "check_decoding"]

#: Tokens of the longest prompt of the batch, and cached steps of one token behind it.
PROMPT: Final = 20
STEPS: Final = 32
_BATCH: Final = 3


def _inputs(model: LoadedModel, tokens: Arrays) -> Arrays:
    """A whole sequence and no past."""
    mask = tokens["attention_mask"]
    arrays: Arrays = {**tokens, "position_ids": positions(mask)}
    for spec in model.inputs:
        if spec.floating:
            heads, head = spec.shape[1], spec.shape[3]
            arrays[spec.name] = np.zeros((len(mask), int(heads), 0, int(head)), dtype=np.float32)
    return arrays


_Logits = list[NDArray[np.float32]]


def _check_resume(
    first: Decoder, second: Decoder, *, begun: _Logits, straight: _Logits, go_on: Callable[[Decoder], _Logits]
) -> list[Finding]:
    """Half of the steps, the cache saved and loaded, the other half: the same bits as all steps at once."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "cache.npz"
        first.save(file)
        second.load(file)
    resumed = begun + go_on(second)
    for step, (a, b) in enumerate(zip(resumed, straight, strict=True)):
        if not np.array_equal(a, b, equal_nan=True):
            return [Finding("resume", f"call {step} differs from decoding without a break; it must be the same bits")]
    return []


def check_decoding(
    model: LoadedModel,
    exact: Runner,
    *,
    own: Runner,
    runners: Mapping[str, Runner],
    file: ExportedModel,
    progress: Progress,
) -> tuple[tuple[OutputParity, ...], list[Finding]]:
    """Rows of unequal length, one padded on the left and one on the right, the same tokens for everyone.

    Teacher-forced: what follows is given, not chosen, so one flipped token does not hide the rest; how often
    the greedy choice agrees is counted as top-1.

    Args:
        model: of task "text-generation".
        exact: float64 PyTorch; it is run without a cache.
        own: PyTorch in the file's type, through its cache.
        runners: of the file, by how its norms run; through the cache.
        file: what they run.

    Returns:
        A parity for the prompt and for the steps of each runner, and what else is wrong.
    """
    total = min(PROMPT + STEPS, model.max_positions)
    prompt = max(1, total - STEPS)
    dtype = DType(file.dtype)
    genai = file.metadata.target is Target.ORT_GENAI  # whose attention knows no padding
    taken = [spec for spec in model.inputs if spec.name in {tensor.name for tensor in file.inputs}]
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, model.vocabulary, (_BATCH, total), dtype=np.int64)
    mask = np.ones_like(tokens)
    if not genai:
        mask[1, : min(5, prompt - 1)] = 0
        mask[2, max(1, prompt - 10) : prompt] = 0
    valid = mask != 0
    truth = exact.run(_inputs(model, {"input_ids": tokens, "attention_mask": mask}))["logits"]

    def decode(decoder: Decoder, stop: int, label: str = "") -> _Logits:
        logits = [decoder.feed(tokens[:, :prompt], mask[:, :prompt])] if decoder.length == 0 else []
        for step in range(decoder.length, stop):
            if label:
                progress(label, step - prompt + 1, stop - prompt)
            logits.append(decoder.feed(tokens[:, step : step + 1]))
        return logits

    def started(runner: Runner) -> Decoder:
        decoder = Decoder(runner, model.inputs if runner is own else taken)
        decoder.start(_BATCH)
        return decoder

    reference = decode(started(own), total)
    outputs: list[OutputParity] = []
    findings: list[Finding] = []
    for norms, runner in runners.items():
        try:
            actual = decode(started(runner), total, "decoding")
            half = prompt + (total - prompt) // 2
            first, second = started(runner), Decoder(runner, taken)
            begun = decode(first, half)
            findings += _check_resume(first, second, begun=begun, straight=actual, go_on=lambda d: decode(d, total))
        except ModelFileError as error:
            findings.append(Finding("decoding", str(error)))
            continue
        parts = {"prompt": ErrorSums(), "decoding": ErrorSums()}
        at = 0
        for a, o in zip(actual, reference, strict=True):
            here = slice(at, at + a.shape[1])
            rows = valid[:, here]
            parts["prompt" if at == 0 else "decoding"].add(a[rows], o[rows], truth=truth[:, here][rows])
            at += a.shape[1]
        for name, sums in parts.items():
            if not sums.per_sample:  # a model of one position has a prompt and no step behind it
                continue
            judged = sums.judge(f"{name} ({len(sums.per_sample)} calls)", norms, bound=BOUNDS[dtype])
            outputs.append(judged)
            if not judged.passed:
                findings.append(
                    Finding(
                        name,
                        f"relative error {judged.error:.3g} against float64 without a cache; PyTorch in {dtype.value} "
                        f"with one has {judged.torch_error:.3g}, allowed is {judged.allowed:.3g}; norms ran {norms}",
                    )
                )
    if dtype is DType.FP32 and (genai or file.metadata.cache is CacheKind.STATIC):  # a rounding copy has no such form
        label = f"{'onnxruntime-genai' if genai else 'cache in place'} ({len(reference)} calls)"
        norms = "of the folder" if genai else "fused" if "fused" in runners else "as functions"
        source = open_sessions(
            file.path.parent if genai else file.path, Kernels.FUSED if norms == "fused" else Kernels.FUNCTION
        )
        judged = _check_session(source, tokens[0], prompt=prompt, reference=reference, truth=truth[0]).judge(
            label, norms, bound=BOUNDS[dtype]
        )
        outputs.append(judged)
        if not judged.passed:
            what = f"relative error {judged.error:.3g} against float64; allowed is {judged.allowed:.3g}"
            findings.append(Finding(label.partition(" (")[0], what))
    return tuple(outputs), findings


def _check_session(
    source: SessionSource, tokens: NDArray[np.int64], *, prompt: int, reference: _Logits, truth: NDArray[np.float64]
) -> ErrorSums:
    """What generates text, with a buffer of keys and values that is input and output at once: one row, given tokens."""
    sums = ErrorSums()
    session = source.start(1, len(tokens) + 1)
    for index in range(len(reference)):
        end = prompt + index
        logits = session.feed(tokens[None, 0 if index == 0 else end - 1 : end])
        sums.add(logits, reference[index][:1, -1], truth=truth[None, end - 1])
    return sums
