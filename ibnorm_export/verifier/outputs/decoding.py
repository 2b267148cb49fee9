"""Decoding: a prompt and many cached steps, against float64 PyTorch without a cache."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ibnorm_export.artifacts.axes import BATCH, SEQUENCE
from ibnorm_export.artifacts.covering_inputs import LONGEST_PROMPT
from ibnorm_export.artifacts.kv_cache import positions
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.metadata import CacheKind, Target, Task
from ibnorm_export.artifacts.tensors import Arrays, DType
from ibnorm_export.errors import ModelFileError
from ibnorm_export.findings.code import FindingCode
from ibnorm_export.generation.decoder import Decoder
from ibnorm_export.generation.sessions import SessionSource, open_sessions
from ibnorm_export.progress import Progress
from ibnorm_export.runtimes.runner import Kernels, Runner
from ibnorm_export.runtimes.torch import TorchRunner
from ibnorm_export.text_report import counted
from ibnorm_export.verifier.checkpoint.samples import can_decode, fixed_sizes
from ibnorm_export.verifier.comparison import FUNCTIONS, FUSED, Comparison
from ibnorm_export.verifier.finding import Finding
from ibnorm_export.verifier.outputs.compare import describe_error
from ibnorm_export.verifier.outputs.error_accumulator import ErrorSums
from ibnorm_export.verifier.report_parts.outputs import OutputParity
from ibnorm_export.verifier.steps import NOTHING, Part
from ibnorm_export.verifier.tolerances import BOUNDS

__all__ = ["PROMPT", "STEPS", "decode"]

#: Tokens of the longest prompt of the batch, and cached steps of one token after it.
PROMPT: Final = 20
STEPS: Final = 32
_BATCH: Final = 3

_Logits = list[NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class _Script:
    """The tokens that every runner is fed. They are given in advance, not chosen by the model.

    A different greedy choice therefore does not change the following steps; top-1 counts how often the choices agree.

    Args:
        tokens: ids (batch, total).
        mask: 0 at padded positions (batch, total).
        prompt: number of tokens in the first call.
        step: number of tokens in each later call: one, but for a file of a fixed length.
    """

    tokens: NDArray[np.int64]
    mask: NDArray[np.int64]
    prompt: int
    step: int = 1

    @property
    def batch(self) -> int:
        return len(self.tokens)

    @property
    def total(self) -> int:
        return int(self.tokens.shape[1])

    def feed(self, decoder: Decoder, stop: int, *, progress: Progress | None = None) -> _Logits:
        """Feed `decoder` until it holds `stop` tokens; return the logits of every call."""
        logits = []
        if decoder.length == 0:
            logits.append(decoder.feed(self.tokens[:, : self.prompt], self.mask[:, : self.prompt]))
        for start in range(decoder.length, stop, self.step):
            if progress is not None:
                progress("decoding", start - self.prompt + 1, self.total - self.prompt)
            logits.append(decoder.feed(self.tokens[:, start : start + self.step]))
        return logits


def decode(comparison: Comparison, _found: Part = NOTHING) -> Part:
    """Decode three rows of unequal length: one without padding, one padded on the left and one on the right.

    A file with a fixed batch has that many rows, and one with a fixed length takes that many tokens in every call.

    Returns:
        A parity for the prompt and one for the steps after it, with each way of running the norms, and findings. It is
        empty for a model without a cache, and for a file whose cache has a fixed length, which decoding would change.
    """
    model = comparison.reference.model
    fixed = fixed_sizes(comparison.file, model)
    if model.task is not Task.TEXT_GENERATION or not can_decode(fixed):
        return Part()
    genai = comparison.file.metadata.target is Target.ORT_GENAI
    script = _write_script(model, padded=not genai, fixed=fixed)
    truth = _without_cache(comparison, script)
    torch = TorchRunner(model, comparison.reference.baseline)
    baseline = script.feed(_start(torch, comparison, rows=script.batch, whole=True), script.total)
    steps = [
        _compare_variant(comparison, script, runner=runner, norms=norms, baseline=baseline, truth=truth)
        for norms, runner in comparison.variants.items()
    ]
    # onnxruntime-genai and a cache in place have no form that rounds after every node, and GenAI runs half precision
    # only on a GPU, so only files in fp32 are compared.
    in_place = comparison.file.metadata.cache is CacheKind.STATIC
    if comparison.reference.dtype is DType.FP32 and (genai or in_place) and not fixed:
        steps.append(_compare_session(comparison, script, genai=genai, baseline=baseline, truth=truth))
    return Part(
        outputs=tuple(output for step in steps for output in step.outputs),
        findings=tuple(finding for step in steps for finding in step.findings),
    )


def _write_script(model: LoadedModel, *, padded: bool, fixed: Mapping[str, int]) -> _Script:
    total = min(PROMPT + STEPS, model.max_positions)
    prompt, step = max(1, total - STEPS), 1
    if SEQUENCE in fixed:
        prompt = step = fixed[SEQUENCE]
        total = step * max(1, min(max(total, 3 * step), model.max_positions) // step)
    batch = fixed.get(BATCH, _BATCH)
    tokens = np.random.default_rng(0).integers(0, model.vocabulary, (batch, total), dtype=np.int64)
    mask = np.ones_like(tokens)
    if padded:
        mask[1:2, : min(5, prompt - 1)] = 0
        mask[2:3, max(1, prompt - 10) : prompt] = 0
    return _Script(tokens, mask, prompt, step)


def _without_cache(comparison: Comparison, script: _Script) -> NDArray[np.float32]:
    """Logits of the whole sequence in one float64 pass."""
    arrays: Arrays = {
        "input_ids": script.tokens,
        "attention_mask": script.mask,
        "position_ids": positions(script.mask),
    }
    for spec in comparison.reference.model.inputs:
        if spec.floating:
            heads, head = spec.shape[1], spec.shape[3]
            arrays[spec.name] = np.zeros((script.batch, int(heads), 0, int(head)), dtype=np.float32)
    logits: NDArray[np.float32] = comparison.reference.exact(comparison.reference.truth).run(arrays)["logits"]
    return logits


def _start(runner: Runner, comparison: Comparison, *, rows: int, whole: bool = False) -> Decoder:
    """A decoder with an empty cache; `whole` gives it all inputs of the checkpoint, not only those of the file."""
    decoder = Decoder(runner, comparison.reference.model.inputs if whole else comparison.file_inputs)
    decoder.start(rows)
    return decoder


def _compare_variant(
    comparison: Comparison,
    script: _Script,
    *,
    runner: Runner,
    norms: str,
    baseline: _Logits,
    truth: NDArray[np.float32],
) -> Part:
    """Decode with one way of running the norms, and the second half once more from a saved cache."""
    try:
        calls = (script.total - script.prompt) // script.step // 2
        half = script.prompt + script.step * calls
        first, second = _start(runner, comparison, rows=script.batch), Decoder(runner, comparison.file_inputs)
        actual = script.feed(first, half, progress=comparison.progress)
        _copy_cache(first, second)
        rest = script.feed(first, script.total, progress=comparison.progress)
        actual += rest
        findings = _check_resume(script.feed(second, script.total), rest, first_call=calls + 1)
    except ModelFileError as error:
        return Part(findings=(Finding("decoding", str(error), code=FindingCode.DECODING_REFUSED),))
    outputs = []
    for name, sums in _sum_errors(
        script, actual, baseline=baseline, truth=truth, spread=comparison.reference.spread
    ).items():
        if not sums:  # a model of one position has a prompt and no step after it
            continue
        output = sums.judge(
            f"{name} ({counted(len(sums.samples), 'call')})", norms, bound=BOUNDS[comparison.reference.dtype]
        )
        outputs.append(output)
        findings += _failures(name, output, dtype=comparison.reference.dtype)
    return Part(outputs=tuple(outputs), findings=tuple(findings))


def _failures(name: str, output: OutputParity, *, dtype: DType) -> list[Finding]:
    return [] if output.passed else [Finding(name, describe_error(output, dtype), code=FindingCode.DECODING_ERROR)]


def _sum_errors(
    script: _Script, actual: _Logits, *, baseline: _Logits, truth: NDArray[np.float32], spread: float
) -> dict[str, ErrorSums]:
    """Errors of the prompt and of the steps after it, without padded positions."""
    sums = {"prompt": ErrorSums(), "decoding": ErrorSums()}
    start = 0
    for a, b in zip(actual, baseline, strict=True):
        part = slice(start, start + a.shape[1])
        rows = script.mask[:, part] != 0
        name = "prompt" if start == 0 else "decoding"
        sums[name].add(a[rows], b[rows], truth=truth[:, part][rows], spread=spread)
        start += a.shape[1]
    return sums


def _copy_cache(first: Decoder, second: Decoder) -> None:
    """Save the cache of one decoder and load it into the other."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "cache.npz"
        first.save(file)
        second.load(file)


def _check_resume(resumed: _Logits, rest: _Logits, *, first_call: int) -> list[Finding]:
    """The steps after a saved cache was loaded must give the same bits as those of the decoder that saved it."""
    for call, (a, b) in enumerate(zip(resumed, rest, strict=True), first_call):
        if not np.array_equal(a, b, equal_nan=True):
            return [
                Finding(
                    "resume",
                    f"call {call} differs from decoding without a break; it must give the same bits",
                    code=FindingCode.RESUME_DIFFERS,
                )
            ]
    return []


def _compare_session(
    comparison: Comparison, script: _Script, *, genai: bool, baseline: _Logits, truth: NDArray[np.float32]
) -> Part:
    """Compare the first row in the session that generates text, whose cache is one buffer for input and output."""
    name = "onnxruntime-genai" if genai else "cache in place"
    norms = "as exported" if genai else FUSED if FUSED in comparison.variants else FUNCTIONS
    source: SessionSource = open_sessions(
        comparison.file.path.parent if genai else comparison.file.path,
        Kernels.FUSED if norms == FUSED else Kernels.FUNCTION,
    )
    sums = ErrorSums()
    spread = comparison.reference.spread
    # onnxruntime-genai takes one token fewer than the model has positions.
    last = min(script.total, comparison.reference.model.max_positions - 1) if genai else script.total
    session = source.start(1, last + 1)
    for call, expected in enumerate(baseline):
        end = script.prompt + call
        if end > last:
            break
        logits = session.feed(script.tokens[:1, 0 if call == 0 else end - 1 : end])
        sums.add(logits, expected[:1, -1], truth=truth[:1, end - 1], spread=spread)
    if not sums:
        return Part()
    outputs = [
        sums.judge(f"{name} ({counted(len(sums.samples), 'call')})", norms, bound=BOUNDS[comparison.reference.dtype])
    ]
    if (ends := _sum_end_errors(comparison, source, after=script.total)) is not None:
        calls = counted(len(ends.samples), "call")
        outputs.append(ends.judge(f"{name}, its last slots ({calls})", norms, bound=BOUNDS[comparison.reference.dtype]))
    dtype = comparison.reference.dtype
    findings = tuple(f for output in outputs for f in _failures(name, output, dtype=dtype))
    return Part(outputs=tuple(outputs), findings=findings)


def _sum_end_errors(comparison: Comparison, source: SessionSource, *, after: int) -> ErrorSums | None:
    """Errors of the last slots of the cache in the session that generates text; None if `after` slots are all."""
    longest = next((s for s in comparison.reference.samples if s.covers == LONGEST_PROMPT), None)
    if longest is None or (total := longest.inputs["input_ids"].shape[1] - 1) <= after:
        return None
    sums = ErrorSums()
    session = source.start(1, total + 1)
    for stop in range(total - 2, total + 1):
        comparison.progress("decoding at the end of the cache", stop - total + 2, 3)
        logits = session.feed(longest.inputs["input_ids"][:1, 0 if stop == total - 2 else stop - 1 : stop])
        baseline, truth = (arrays["logits"][:1, stop - 1] for arrays in (longest.baseline, longest.truth))
        sums.add(logits, baseline, truth=truth, spread=comparison.reference.spread)
    return sums
