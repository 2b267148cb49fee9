"""What the inputs of a comparison cover, in words: a verdict covers only what ran."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.model_limits import ModelLimits
from ibnorm_export.artifacts.tensors import Arrays
from ibnorm_export.verifier.comparison import Comparison
from ibnorm_export.verifier.steps import Part

__all__ = ["describe_coverage", "describe_inputs"]


def describe_coverage(comparison: Comparison, found: Part) -> Part:
    """Say what the inputs covered and what they left out."""
    reference, prepared = comparison.reference, comparison.prepared
    inputs = [sample.inputs for sample in reference.samples]
    ran = describe_inputs(reference.model, inputs, limits=prepared.limits) if found.outputs else ()
    return Part(ran=ran, not_run=(*prepared.left_out, *reference.left_out))


def describe_inputs(model: LoadedModel, inputs: Sequence[Arrays], *, limits: ModelLimits) -> tuple[str, ...]:
    """What ran: batches, lengths, slots of the cache, token ids, padding, and ranges of values.

    Args:
        model: the model, which names the inputs.
        inputs: what ran.
        limits: what the model takes.
    """
    if not inputs:
        return ()
    first = model.inputs[0].name
    lines = [f"batch {_listed(len(arrays[first]) for arrays in inputs if arrays[first].ndim)}"]
    if all("input_ids" in arrays and arrays["input_ids"].ndim == 2 for arrays in inputs):
        lines += _describe_tokens(inputs, limits)
    for spec in model.inputs:
        values = [arrays[spec.name] for arrays in inputs if arrays[spec.name].size]
        if spec.floating and values and not spec.name.startswith("past_key_values."):
            low, high = min(float(a.min()) for a in values), max(float(a.max()) for a in values)
            lines.append(f"{spec.name} from {low:.3g} to {high:.3g}")
    return tuple(lines)


def _describe_tokens(inputs: Sequence[Arrays], limits: ModelLimits) -> Iterator[str]:
    longest = f" (the longest is {limits.longest})" if limits.longest else ""
    yield f"sequences of {_listed(a['input_ids'].shape[1] for a in inputs)} tokens{longest}"
    totals = [(arrays["input_ids"].shape[1], _total(arrays)) for arrays in inputs]
    pasts = [total - sequence for sequence, total in totals]
    if any(pasts):
        yield f"a past of {_listed(pasts)} tokens, so slots of the cache up to {max(t for _, t in totals)}"
    ids = len(np.unique(np.concatenate([arrays["input_ids"].ravel() for arrays in inputs])))
    vocabulary = limits.vocabulary.get("input_ids")
    yield f"{ids}{f' of {vocabulary}' if vocabulary else ''} token ids"
    kinds = _padding_kinds(inputs)
    yield f"padding: {', '.join(kinds) if kinds else 'none'}"


def _total(arrays: Arrays) -> int:
    mask = next((a for name, a in arrays.items() if name.endswith("mask") and a.ndim == 2), arrays["input_ids"])
    return int(mask.shape[1])


def _padding_kinds(inputs: Sequence[Arrays]) -> list[str]:
    found = dict.fromkeys(("left", "right", "single tokens within a row", "whole rows"), False)
    for arrays in inputs:
        for name, array in arrays.items():
            if not name.endswith("mask") or array.ndim != 2 or not array.size:
                continue
            whole = (array == 0).all(1)
            kept = array[~whole] != 0
            found["whole rows"] |= bool(whole.any())
            if kept.size:
                first, last = kept.argmax(1), kept.shape[1] - kept[:, ::-1].argmax(1)
                found["left"] |= bool((first > 0).any())
                found["right"] |= bool((last < kept.shape[1]).any())
                found["single tokens within a row"] |= bool((last - first > kept.sum(1)).any())
    return [kind for kind, there in found.items() if there]


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(str(n) for n in sorted(set(numbers)))
