"""Inputs for what ordinary samples leave out: the longest sequence, the last slots of a cache, a large batch, all ids.

A file may branch on a length, on a batch size or on a value, so a comparison covers only what it runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ibnorm_export.artifacts.axes import BATCH, PAST, SEQUENCE, TOTAL, axis_name, axis_sizes
from ibnorm_export.artifacts.kv_cache import positions
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.tensors import Arrays, InputSpec

__all__ = [
    "LARGE_VALUES",
    "LONGEST_PROMPT",
    "MANY_ROWS",
    "CoveringInputs",
    "ModelLimits",
    "draw_covering_inputs",
    "find_limits",
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
#: Beginning of what the samples with values beyond ordinary ranges cover.
LARGE_VALUES: Final = "large values"
#: Rows of the large batch of token ids, and of other inputs.
MANY_ROWS: Final = 33
MANY_IMAGES: Final = 9
#: Tokens in each row of the large batch.
_SHORT: Final = 5


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What a model takes.

    Args:
        vocabulary: number of ids by name of the input; an input that is not named has the ids 0 and 1.
        longest: the longest sequence, in tokens; 0 if it is unknown.
    """

    vocabulary: Mapping[str, int]
    longest: int


@dataclass(frozen=True, slots=True)
class CoveringInputs:
    """Covering inputs, and what they leave out.

    Args:
        samples: arrays by what they cover.
        left_out: what is not run, and why.
    """

    samples: Mapping[str, Arrays]
    left_out: tuple[str, ...] = ()


class _Embeddings:
    """Records which embedding each integer input goes to, and how many positions the others have."""

    def __init__(self, inputs: Mapping[str, Tensor]) -> None:
        self._names = {t.untyped_storage().data_ptr(): name for name, t in inputs.items() if t.numel()}
        self.vocabulary: dict[str, int] = {}
        self.positions: list[int] = []

    def __call__(self, module: nn.Module, args: tuple[object, ...]) -> None:
        ids = args[0] if args else None
        if not isinstance(module, nn.Embedding) or not isinstance(ids, Tensor):
            return
        name = self._names.get(ids.untyped_storage().data_ptr())
        if name is None:
            self.positions.append(module.num_embeddings)
        else:
            self.vocabulary[name] = min(module.num_embeddings, self.vocabulary.get(name, module.num_embeddings))


def find_limits(model: LoadedModel, *, inputs: Arrays) -> ModelLimits:
    """Find the vocabulary and the longest sequence of a model, if necessary by running it once.

    Args:
        model: the model.
        inputs: one input.
    """
    if all(spec.floating for spec in model.inputs):
        return ModelLimits({}, 0)
    if model.vocabulary and model.max_positions:
        return ModelLimits({"input_ids": model.vocabulary}, model.max_positions)
    module = model.module
    tensors = {spec.name: torch.from_numpy(inputs[spec.name].copy()) for spec in model.inputs}
    watch = _Embeddings({spec.name: tensors[spec.name] for spec in model.inputs if not spec.floating})
    hooks = [m.register_forward_pre_hook(watch) for m in module.modules() if isinstance(m, nn.Embedding)]
    dtype = next(p.dtype for p in module.parameters() if p.is_floating_point())
    entry = model.entry(module)
    try:
        with torch.no_grad():
            entry(*(t.to(dtype) if t.is_floating_point() else t for t in tensors.values()))
    finally:
        for hook in hooks:
            hook.remove()
    vocabulary = dict(watch.vocabulary)
    if "position_ids" in vocabulary:
        watch.positions.append(vocabulary.pop("position_ids"))
    if model.vocabulary and "input_ids" in tensors:
        vocabulary["input_ids"] = model.vocabulary
    return ModelLimits(vocabulary, model.max_positions or min(watch.positions, default=0))


class _Ids:
    """Draws ids: every id once, the ends of the vocabulary first, and at random after that."""

    def __init__(self, rng: np.random.Generator, vocabulary: int) -> None:
        ends = [i for i in (vocabulary - 1, 0, vocabulary - 2, 1) if 0 <= i < vocabulary]
        others = rng.permutation(np.arange(2, max(vocabulary - 2, 2), dtype=np.int64))
        self._new = np.concatenate([np.array(list(dict.fromkeys(ends)), dtype=np.int64), others])
        self._rng = rng
        self._vocabulary = vocabulary

    def draw(self, mask: NDArray[np.int64]) -> NDArray[np.int64]:
        """Draw one id for each place; ids that have not been drawn yet go where `mask` is not 0."""
        ids = self._rng.integers(0, self._vocabulary, mask.shape, dtype=np.int64)
        places = self._rng.permutation(np.flatnonzero(mask))[: len(self._new)]
        ids.flat[places] = self._new[: len(places)]
        self._new = self._new[len(places) :]
        return ids


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Sizes of the named axes of a language model's inputs."""

    batch: int
    sequence: int
    past: int = 0

    def fixed(self, fixed: Mapping[str, int]) -> _Sizes:
        """The sizes, except those that the file fixes."""
        known = axis_sizes(fixed)
        sequence = known.get(SEQUENCE, self.sequence)
        past = known.get(PAST, self.past)
        if TOTAL in known and PAST not in known:
            past = max(0, known[TOTAL] - sequence)
        return _Sizes(known.get(BATCH, self.batch), sequence, past)

    def of(self, spec: InputSpec) -> tuple[int, ...]:
        named = {BATCH: self.batch, SEQUENCE: self.sequence, PAST: self.past, TOTAL: self.past + self.sequence}
        return tuple(n if isinstance(n, int) else named[axis_name(n)] for n in spec.shape)


_TOKEN_AXES: Final = {BATCH, SEQUENCE, PAST, TOTAL}


@dataclass(frozen=True)
class _TokenInputs:
    """Draws inputs of a model that takes input_ids, with any sizes."""

    specs: tuple[InputSpec, ...]
    limits: ModelLimits
    rng: np.random.Generator
    _ids: dict[str, _Ids] = field(default_factory=dict, init=False)

    @staticmethod
    def can_draw(specs: Sequence[InputSpec]) -> bool:
        """Whether the names and axes are those of a language model."""
        axes = {axis_name(axis) for spec in specs for axis in spec.shape if isinstance(axis, str)}
        floats = [spec for spec in specs if spec.floating]
        return (
            any(spec.name == "input_ids" and len(spec.shape) == 2 for spec in specs)
            and axes <= _TOKEN_AXES
            and all(spec.name.startswith("past_key_values.") for spec in floats)
        )

    def draw(self, sizes: _Sizes, mask: NDArray[np.int64]) -> Arrays:
        """Draw one sample.

        Args:
            sizes: sizes of the axes.
            mask: 0 at padded positions (batch, past + sequence).
        """
        arrays: Arrays = {}
        for spec in self.specs:
            shape = sizes.of(spec)
            if spec.floating:
                arrays[spec.name] = self.rng.standard_normal(shape, dtype=np.float32)
            elif spec.name.endswith("mask"):
                arrays[spec.name] = mask
            elif spec.name == "position_ids":
                arrays[spec.name] = positions(mask)[:, sizes.past :]
            else:
                if spec.name not in self._ids:
                    self._ids[spec.name] = _Ids(self.rng, self.limits.vocabulary.get(spec.name, 2))
                arrays[spec.name] = self._ids[spec.name].draw(mask[:, -shape[1] :])
        return arrays


def _ones(sizes: _Sizes) -> NDArray[np.int64]:
    return np.ones((sizes.batch, sizes.past + sizes.sequence), dtype=np.int64)


def _mask_rows(mask: NDArray[np.int64], *, padding: int, left_only: bool) -> NDArray[np.int64]:
    """Pad every second row on the left and, if `left_only` is false, every fourth on the right; row 0 stays whole."""
    room = mask.shape[1] - 1
    for row in range(1, len(mask)):
        count = min(1 + (padding + row) % max(1, padding) if row > 1 else padding, room)
        if row % 4 == 2 and not left_only:
            mask[row, mask.shape[1] - count :] = 0
        elif row % 2:
            mask[row, :count] = 0
    return mask


def _mask_holes(mask: NDArray[np.int64]) -> NDArray[np.int64]:
    """Mask single tokens, more and more seldom; the last token stays, so that its position is compared."""
    index, step = 5, 7
    while index < mask.shape[1] - 2:
        mask[0, index] = 0
        index, step = index + step, step + 3
    return mask


class _Planner:
    """Decides which samples cover a language model, with the sizes that the file allows."""

    def __init__(self, model: LoadedModel, limits: ModelLimits, *, fixed: Mapping[str, int]) -> None:
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

    def plan(self) -> Iterator[tuple[str, _Sizes, NDArray[np.int64]]]:
        """What is covered, the sizes, and the mask."""
        longest = self._longest
        if self.has_cache:
            yield self._planned(LONGEST_PROMPT, _Sizes(1, longest))
            past = self._longest_past()
            if past > 0:
                rows = 2 if past * 2 <= LONGEST else 1
                yield self._planned("the last slot of the cache", _Sizes(rows, 1, past), padding=min(110, past // 2))
                yield self._planned("a large batch", _Sizes(MANY_ROWS, 1, min(_SHORT, past)), padding=3)
            yield self._planned("a large batch of prompts", _Sizes(MANY_ROWS, self._short), padding=2)
            return
        yield self._planned("the longest sequence", _Sizes(1, longest), holes=self._has_mask)
        if self._has_mask:
            length = min(longest, 130)
            yield self._planned("much padding", _Sizes(2, length), padding=min(110, length * 2 // 3), both=True)
        yield self._planned("a large batch", _Sizes(MANY_ROWS, self._short), padding=2)

    def _planned(
        self, covers: str, sizes: _Sizes, *, padding: int = 0, both: bool = False, holes: bool = False
    ) -> tuple[str, _Sizes, NDArray[np.int64]]:
        sizes = sizes.fixed(self._fixed)
        mask = _ones(sizes)
        if padding:
            _mask_rows(mask, padding=padding, left_only=self.has_cache and sizes.past > 0)
        if both:  # row 0 is padded on the right
            mask[0, mask.shape[1] - padding // 3 :] = 0
        if holes:
            _mask_holes(mask)
        return covers, sizes, mask


def _heavy(values: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """Values beyond any range that a file might clip: up to about 12 in one half of the rows, 1000 in the other."""
    heavy = values * 3.0
    tails = rng.standard_t(3.0, values.shape)
    heavy[::2] = (tails * (1000.0 / max(np.abs(tails).max(initial=0.0), 1.0)))[::2]
    return heavy.astype(np.float32)


def _large_values(model: LoadedModel, base: Arrays, rng: np.random.Generator) -> Arrays:
    """The floating-point inputs with large values, except keys of a cache, which stay as they are.

    A key enters the exponent of attention, where rounding grows with its size: the order of a sum would decide.
    """
    floating = {spec.name for spec in model.inputs if spec.floating}
    large: Arrays = {}
    for name, array in base.items():
        grows = name in floating and array.size and not name.endswith(".key")
        large[name] = _heavy(array, rng) if grows else array
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
        names = ", ".join(sorted(dynamic))
        left_out.append(f"sizes of {names} other than those listed: give your own inputs to cover them")
    return CoveringInputs(samples, tuple(left_out))


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
    if not _TokenInputs.can_draw(model.inputs):
        return _cover_others(model, rng, fixed=fixed, drawn=drawn)
    tokens = _TokenInputs(model.inputs, limits, rng)
    planner = _Planner(model, limits, fixed=fixed)
    samples = {covers: tokens.draw(sizes, mask) for covers, sizes, mask in planner.plan()}
    if planner.has_cache:
        sizes = _Sizes(2, 1, min(12, max(limits.longest - 1, 0) or 12)).fixed(fixed)
        drawn_cache = tokens.draw(sizes, _ones(sizes))
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
    if _TokenInputs.can_draw(model.inputs):
        batch, sequence = inputs["input_ids"].shape
        mask = next((a for name, a in inputs.items() if name.endswith("mask")), np.ones((batch, sequence)))
        sizes = _Sizes(batch, sequence, mask.shape[1] - sequence)
        rng = np.random.default_rng(int(inputs["input_ids"].sum()))
        wanted = sizes.fixed(fixed)
        if wanted == sizes:
            return inputs
        padded = _mask_rows(_ones(wanted), padding=min(3, wanted.past + wanted.sequence - 1), left_only=wanted.past > 0)
        return _TokenInputs(model.inputs, limits, rng).draw(wanted, padded)
    fitted = {}
    for spec in model.inputs:
        array = inputs[spec.name]
        for axis, name in enumerate(spec.shape):
            size = fixed.get(name) if isinstance(name, str) else None
            if size is not None and size != array.shape[axis]:
                array = np.take(array, np.arange(size) % array.shape[axis], axis=axis)
        fitted[spec.name] = array
    return fitted
