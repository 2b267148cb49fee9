"""Inputs for what ordinary samples leave out: the longest sequence, the last slots of a cache, a large batch, all ids.

A file may branch on a length, on a batch size or on a value, so a comparison covers only what it runs.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.model_limits import ModelLimits
from ibnorm_export.artifacts.tensors import Arrays, InputSpec
from ibnorm_export.artifacts.token_inputs import Sizes, TokenInputs, mask_holes, mask_patterns, mask_rows, ones
from ibnorm_export.errors import listed

__all__ = [
    "LARGE_VALUES",
    "LONGEST_PROMPT",
    "MANY_ROWS",
    "MUCH_PADDING",
    "CoveringInputs",
    "draw_covering_inputs",
    "fit_sizes",
]

#: The longest sequence that is run, in tokens: attention takes time and memory by the square of the length.
LONGEST: Final = 4096
#: The largest cache that is run, in bytes of float32; the comparison holds about six times that.
LARGEST_CACHE: Final = 2**29
#: Logits that are compared in one sample, in values; the comparison holds about 24 bytes for each.
LARGEST_LOGITS: Final = 2**27
#: Lengths to try where the longest sequence is unknown, in tokens.
_LENGTHS: Final = (640, 130, 40)
#: What the sample covers that is one whole prompt of a model with a cache.
LONGEST_PROMPT: Final = "the longest prompt"
#: What the sample covers that has more padding than tokens in some rows.
MUCH_PADDING: Final = "much padding"
#: Beginning of what the samples with values beyond ordinary ranges cover.
LARGE_VALUES: Final = "large values"
#: The largest of them, in inputs and in the values of a cache.
_LARGEST: Final = 1000.0
_LARGEST_CACHED: Final = 128.0
#: Rows of the large batch of token ids, and of other inputs.
MANY_ROWS: Final = 33
MANY_IMAGES: Final = 9
#: Tokens in each row of the large batch.
_SHORT: Final = 5


@dataclass(frozen=True, slots=True)
class CoveringInputs:
    """Covering inputs, and what they leave out.

    Args:
        samples: arrays by what they cover.
        left_out: what is not run, and why.
    """

    samples: Mapping[str, Arrays]
    left_out: tuple[str, ...] = ()


class _Planner:
    """Decides which samples cover a language model, with the sizes that the file allows."""

    def __init__(
        self, model: LoadedModel, limits: ModelLimits, *, fixed: Mapping[str, int], drawn: Collection[tuple[int, int]]
    ) -> None:
        self._drawn = drawn
        self.left_out: list[str] = []
        self._fixed = fixed
        self._specs = {spec.name: spec for spec in model.inputs}
        self._cache = [spec for spec in model.inputs if spec.floating]
        self._longest = self._bound_length(limits)
        # Long enough for every id of a small vocabulary, if the longest sequence is not.
        missing = limits.vocabulary.get("input_ids", 0) - self._longest * 4 // 5
        needed = missing // (MANY_ROWS - 3) + 3 if missing > 0 else 0
        self._short = min(max(_SHORT, needed if needed < MANY_ROWS else 0), self._longest)
        self.has_cache = bool(self._cache)
        self._has_mask = any(name.endswith("mask") for name in self._specs)

    def _bound_length(self, limits: ModelLimits) -> int:
        longest = limits.longest or _LENGTHS[0]
        if not limits.longest:
            self.left_out.append(f"lengths above {longest} tokens: the longest sequence of the model is unknown")
        room = LARGEST_LOGITS // max(limits.vocabulary.get("input_ids", 1), 1)
        bounded = min(longest, LONGEST, max(room, 64))
        if bounded < longest:
            self.left_out.append(f"lengths above {bounded} of {longest} tokens: they take too much memory")
        return bounded

    def _longest_past(self) -> int:
        per_token = 4 * sum(math.prod(n for n in spec.shape if isinstance(n, int)) for spec in self._cache)
        bounded = min(self._longest - 1, LARGEST_CACHE // max(per_token, 1))
        if bounded < self._longest - 1:
            self.left_out.append(f"a cache of more than {bounded} of {self._longest} slots: it takes too much memory")
        return bounded

    def plan(self) -> Iterator[tuple[str, Sizes, NDArray[np.int64]]]:
        """What is covered, the sizes, and the mask."""
        longest = self._longest
        if self.has_cache:
            yield self._planned(LONGEST_PROMPT, Sizes(1, longest))
            past = self._longest_past()
            if past > 0:
                rows = 2 if past * 2 <= LONGEST else 1
                yield self._planned("the last slot of the cache", Sizes(rows, 1, past), padding=min(110, past // 2))
                yield self._planned("a large batch", Sizes(MANY_ROWS, 1, min(_SHORT, past)), patterns=True)
            if past > 1 and not any(tokens > 1 and before for tokens, before in self._drawn):
                yield self._planned("several tokens after a cache", Sizes(2, 2, min(_SHORT, past - 1)), padding=1)
            yield self._planned("a large batch of prompts", Sizes(MANY_ROWS, self._short), patterns=True)
            return
        if not any(tokens == 1 for tokens, _ in self._drawn):
            yield self._planned("one token", Sizes(1, 1))
        yield self._planned("the longest sequence", Sizes(1, longest), holes=self._has_mask)
        if self._has_mask:
            length = min(longest, 130)
            yield self._planned(MUCH_PADDING, Sizes(2, length), padding=min(110, length * 2 // 3), both=True)
        yield self._planned("a large batch", Sizes(MANY_ROWS, self._short), patterns=self._has_mask)

    def _planned(
        self,
        covers: str,
        sizes: Sizes,
        *,
        padding: int = 0,
        both: bool = False,
        holes: bool = False,
        patterns: bool = False,
    ) -> tuple[str, Sizes, NDArray[np.int64]]:
        sizes = sizes.fixed(self._fixed)
        mask = ones(sizes)
        if padding:
            mask_rows(mask, padding=padding, left_only=self.has_cache and sizes.past > 0)
        if both:  # row 0 is padded on the right
            mask[0, mask.shape[1] - padding // 3 :] = 0
        if patterns:
            mask_patterns(mask)
        if patterns and sizes.past:  # the tokens after a cache stay, so that they are compared
            mask[:, sizes.past :] = 1
        if holes:
            mask_holes(mask)
        return covers, sizes, mask


def _heavy(values: NDArray[np.float32], rng: np.random.Generator, *, largest: float) -> NDArray[np.float32]:
    """Values beyond any range that a file might clip: up to about 12 in half of the rows, `largest` in the others."""
    heavy = values * 3.0
    tails = rng.standard_t(3.0, values.shape)
    heavy[::2] = (tails * (largest / max(np.abs(tails).max(initial=0.0), 1.0)))[::2]
    return heavy.astype(np.float32)


def _large_values(model: LoadedModel, base: Arrays, rng: np.random.Generator) -> Arrays:
    """The floating-point inputs with large values, except keys of a cache, which stay as they are.

    A key enters the exponent of attention, where rounding grows with its size: the order of a sum would decide. Values
    of a cache are added up with such weights, so theirs stay below those of other inputs.
    """
    floating = {spec.name for spec in model.inputs if spec.floating}
    large: Arrays = {}
    for name, array in base.items():
        grows = name in floating and array.size and not name.endswith(".key")
        largest = _LARGEST_CACHED if name.endswith(".value") else _LARGEST
        large[name] = _heavy(array, rng, largest=largest) if grows else array
    return large


def _batch_axis(specs: Sequence[InputSpec]) -> bool:
    """Whether the first axis of every input is one dynamic axis, which is taken for the batch."""
    firsts = {spec.shape[0] if spec.shape else 0 for spec in specs}
    return len(firsts) == 1 and isinstance(next(iter(firsts)), str)


def _repeated(arrays: Arrays, rows: int) -> Arrays:
    return {name: np.take(a, np.arange(rows) % len(a), axis=0) for name, a in arrays.items()}


def _cover_others(
    model: LoadedModel, rng: np.random.Generator, *, fixed: Mapping[str, int], drawn: Sequence[Arrays]
) -> CoveringInputs:
    """A large batch, and large values, of images and of the inputs of the user's own model."""
    samples: dict[str, Arrays] = {}
    left_out = []
    base = drawn[0]
    if not _batch_axis(model.inputs):
        left_out.append("a large batch: the inputs have no common batch axis")
    elif str(model.inputs[0].shape[0]) not in fixed:
        largest = max(drawn, key=lambda arrays: len(arrays[model.inputs[0].name]))
        if len(largest[model.inputs[0].name]) < MANY_IMAGES:
            samples["a large batch"] = _repeated(largest, MANY_IMAGES)
        base = _repeated(base, 2)
    if any(spec.floating for spec in model.inputs):
        samples[LARGE_VALUES] = _large_values(model, base, rng)
    dynamic = {axis for spec in model.inputs for axis in spec.shape[1:] if isinstance(axis, str)} - set(fixed)
    if dynamic:
        sizes = {axis: set[int]() for axis in sorted(dynamic)}
        for spec in model.inputs:
            for position, axis in enumerate(spec.shape):
                if axis in sizes:
                    sizes[str(axis)] |= {arrays[spec.name].shape[position] for arrays in drawn}
        tried = "; ".join(f"{axis} other than {listed(sorted(found))}" for axis, found in sizes.items())
        left_out.append(f"{tried}: give your own inputs (--inputs FILE.npz) to cover them")
    return CoveringInputs(samples, tuple(left_out))


def _lengths(model: LoadedModel, arrays: Arrays) -> tuple[int, int]:
    """Tokens of a sample, and of the cache before them."""
    past = next((arrays[spec.name].shape[2] for spec in model.inputs if spec.floating), 0)
    return arrays["input_ids"].shape[1], past


def draw_covering_inputs(
    model: LoadedModel,
    rng: np.random.Generator,
    *,
    limits: ModelLimits,
    fixed: Mapping[str, int],
    drawn: Sequence[Arrays],
) -> CoveringInputs:
    """Draw inputs for what ordinary samples leave out.

    Args:
        model: the model.
        rng: the generator.
        limits: what the model takes; see `find_limits`.
        fixed: sizes of axes that the file fixes, by name.
        drawn: the ordinary samples, at least one.
    """
    if not TokenInputs.can_draw(model.inputs):
        return _cover_others(model, rng, fixed=fixed, drawn=drawn)
    tokens = TokenInputs(model.inputs, limits, rng)
    planner = _Planner(model, limits, fixed=fixed, drawn=[_lengths(model, arrays) for arrays in drawn])
    samples = {covers: tokens.draw(sizes, mask) for covers, sizes, mask in planner.plan()}
    if planner.has_cache:
        sizes = Sizes(2, 1, min(12, max(limits.longest - 1, 0) or 12)).fixed(fixed)
        drawn_cache = tokens.draw(sizes, ones(sizes))
        samples[f"{LARGE_VALUES} in the cache"] = _large_values(model, drawn_cache, rng)
    return CoveringInputs(samples, tuple(planner.left_out))


def fit_sizes(model: LoadedModel, inputs: Arrays, *, limits: ModelLimits, fixed: Mapping[str, int]) -> Arrays:
    """Return an input with the sizes that a file fixes; values repeat, or end early, along such an axis.

    Args:
        model: the model, which names the axes.
        inputs: the input.
        limits: what the model takes; see `find_limits`.
        fixed: sizes by name of the axis.
    """
    if not fixed:
        return inputs
    if TokenInputs.can_draw(model.inputs):
        batch, sequence = inputs["input_ids"].shape
        mask = next((a for name, a in inputs.items() if name.endswith("mask")), np.ones((batch, sequence)))
        sizes = Sizes(batch, sequence, mask.shape[1] - sequence)
        rng = np.random.default_rng(int(inputs["input_ids"].sum()))
        wanted = sizes.fixed(fixed)
        if wanted == sizes:
            return inputs
        padded = mask_rows(ones(wanted), padding=min(3, wanted.past + wanted.sequence - 1), left_only=wanted.past > 0)
        return TokenInputs(model.inputs, limits, rng).draw(wanted, padded)
    fitted = {}
    for spec in model.inputs:
        array = inputs[spec.name]
        for axis, name in enumerate(spec.shape):
            size = fixed.get(name) if isinstance(name, str) else None
            if size is not None and size != array.shape[axis]:
                array = np.take(array, np.arange(size) % array.shape[axis], axis=axis)
        fitted[spec.name] = array
    return fitted
