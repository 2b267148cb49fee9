"""Find the weights in what a checkpoint contains, and choose between those of the last step and their average.

Training code keeps a state dict at the top level or under one of many keys, and often a second one: an exponential
moving average (EMA) of the weights, which is what it evaluates. Taking the wrong one is a silent error, so where both
are there the caller must say which.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor

from ibnorm_export.artifacts.metadata import Weights
from ibnorm_export.errors import CheckpointError, listed
from ibnorm_export.models.containers.extras import PlainData
from ibnorm_export.models.containers.safe_pickle import shown
from ibnorm_export.models.containers.stored_tensors import StoredTensor
from ibnorm_export.text_report import counted

__all__ = ["Chosen", "Leaf", "choose_weights"]

Leaf = Tensor | StoredTensor

#: Keys under which training codes keep the state dict of the model. Where one of them is there, other state dicts (of a
#: discriminator, a loss) are not the model.
_MODEL_KEYS: Final = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "net",
    "network",
    "module",
    "model_weights",
    "weights",
    "params",
    "student",
    "current_model_state",
)

#: Words of keys that mean averaged weights, and keys of what belongs to training but is not a model.
_AVERAGED: Final = frozenset({"ema", "emas", "averaged", "average", "averaging", "avg", "swa", "shadow", "polyak"})
_NO_MODEL: Final = frozenset(
    {"optimizer", "optimizers", "optim", "scheduler", "schedulers", "scaler", "rng", "callbacks", "loops", "sampler"}
)
_WORDS: Final = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_PLAIN: Final = (type(None), str, int, float)
_DEEPEST: Final = 6  # levels at which a state dict is looked for
_INSIDE_AVERAGE: Final = re.compile(r"^(module|shadow)\.")  # what an average calls its own copy
_COUNTERS: Final = ("n_averaged", "initted", "step", "decay", "num_updates")


@dataclass(frozen=True, slots=True)
class Chosen:
    """The state dict that was chosen, the plain data beside it, and notes for the reader."""

    state: dict[str, Leaf]
    extras: dict[str, Any]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Found:
    """A state dict in a checkpoint.

    Args:
        place: the keys that lead to it, joined by dots; "" at the top level.
        state: its tensors. None if it is a list of tensors without names.
        averaged: whether it is a moving average.
        origin: the object in the checkpoint.
    """

    place: str
    state: dict[str, Leaf] | None
    averaged: bool
    origin: object

    @property
    def known(self) -> bool:
        """Whether it is where training codes keep the model."""
        return self.place.rpartition(".")[2] in ("", *_MODEL_KEYS)

    def __str__(self) -> str:
        return shown(self.place) or "the tensors at the top level"


def _words(key: str) -> set[str]:
    return {word.lower() for word in _WORDS.findall(key)}


def _means_average(key: str) -> bool:
    """Whether a key means averaged weights; `exp_avg` is an average of gradients."""
    words = _words(key)
    return bool(words & _AVERAGED) and "exp" not in words


def _is_leaf(value: object) -> bool:
    return isinstance(value, Tensor) or (hasattr(value, "load") and hasattr(value, "identity"))


def _state(content: Mapping[Any, Any]) -> dict[str, Leaf] | None:
    """The tensors of a mapping, if it is a state dict: names to tensors, and nothing else but extra states.

    Names of modules' tensors, which have dots, may also have plain values beside them, such as a version.
    """
    state = {key: value for key, value in content.items() if isinstance(key, str) and _is_leaf(value)}
    others = {key: value for key, value in content.items() if key not in state}
    extra = all(isinstance(key, str) and (key.endswith("_extra_state") or key in _COUNTERS) for key in others)
    plain = any("." in name for name in state) and all(isinstance(value, _PLAIN) for value in others.values())
    return state if state and (extra or plain) else None


def _only_numbers(state: Mapping[str, Leaf]) -> bool:
    """Whether every tensor has one element, as in a dict of losses."""
    return all(tuple(leaf.shape) in ((), (1,)) for leaf in state.values())


def _find(content: object, place: tuple[str, ...], *, seen: set[int]) -> Iterator[_Found]:
    """Every state dict below `content`, and lists of averaged tensors."""
    averaged = any(map(_means_average, place))
    if len(place) > _DEEPEST or id(content) in seen:
        return
    seen.add(id(content))
    if isinstance(content, (list, tuple)):
        leaves = [value for value in content if _is_leaf(value)]
        numbers = all(tuple(leaf.shape) in ((), (1,)) for leaf in leaves)  # averages of a loss
        if averaged and leaves and len(leaves) == len(content) and not numbers:
            yield _Found(".".join(place), None, averaged=True, origin=content)
            return
        items: Iterator[tuple[str, object]] = ((str(index), value) for index, value in enumerate(content[:100]))
    elif isinstance(content, dict):
        state = _state(content)
        trained = any(_words(key) & _NO_MODEL for key in place)
        numbers = state is not None and _only_numbers(state) and bool(place) and place[-1] not in _MODEL_KEYS
        if state is not None and not numbers and (averaged or not trained):
            yield from _split(_Found(".".join(place), state, averaged=averaged, origin=content))
            return
        items = ((key, value) for key, value in content.items() if isinstance(key, str))
    else:
        return
    for key, value in items:
        yield from _find(value, (*place, key), seen=seen)


def _split(found: _Found) -> Iterator[_Found]:
    """Split a state dict in which a module of averaged weights has its own names beside the model's.

    A module's name alone does not decide, since a model may use moving averages: most tensors must be there twice.
    """
    state = dict(found.state or {})
    counters = [name for name in _COUNTERS if name in state]
    averaged = found.averaged or "n_averaged" in counters
    if averaged:
        state = {name: leaf for name, leaf in state.items() if name not in _COUNTERS}
    if not state:  # counters of an average alone
        return
    shared = _shared_prefix(list(state))
    groups: dict[str, dict[str, Leaf]] = {}
    for name, leaf in state.items():
        first, _, rest = name[len(shared) :].partition(".")
        groups.setdefault(first, {})[rest] = leaf
    for first, group in groups.items():
        if not _means_average(first):
            continue
        start = f"{shared}{first}."
        others = {name: leaf for name, leaf in state.items() if not name.startswith(start)}
        names = _names_of_average(group, {name[len(shared) :]: leaf for name, leaf in others.items()})
        if names is None:
            continue
        place = f"{found.place}.{shared}{first}".lstrip(".")
        yield _Found(place, names, averaged=True, origin=found.origin)
        if not averaged and others:
            yield _Found(found.place, others, averaged=False, origin=found.origin)
        return
    yield _Found(found.place, state, averaged=averaged, origin=found.origin)


def _shared_prefix(names: list[str]) -> str:
    """The components that all names start with, with the dot after them; "" if there are none."""
    first, last = min(names), max(names)  # what these share, all share
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    common = "".join(letter for letter, _ in pairs)
    return common[: common.rfind(".") + 1]


def _names_of_average(group: Mapping[str, Leaf], others: Mapping[str, Leaf]) -> dict[str, Leaf] | None:
    """The averaged tensors by the names that the model has beside them; None if most have no counterpart."""
    weights = {name: leaf for name, leaf in group.items() if name not in _COUNTERS}
    inner = {_INSIDE_AVERAGE.sub("", name): leaf for name, leaf in weights.items()}
    tails: dict[str, tuple[str, Leaf]] = {}
    for name, leaf in others.items():
        tail = name.partition(".")[2]
        for key in (name, tail, name.replace(".", ""), tail.replace(".", "")):
            tails.setdefault(key, (tail, leaf))
    named = {}
    matching = 0
    for name, leaf in inner.items():
        tail, other = tails.get(name, (name, None))
        same = other is not None and tuple(other.shape) == tuple(leaf.shape)
        matching += same
        named[tail if same and "." not in name else name] = leaf
    return named if inner and 2 * matching >= len(inner) and len(named) == len(inner) else None


def _lightning_average(content: object, found: list[_Found]) -> list[_Found]:
    """Lightning's WeightAveraging keeps the average under `state_dict`, and the model under `current_model_state`."""
    if not isinstance(content, dict) or not {"current_model_state", "averaging_state"} <= content.keys():
        return found
    return [
        _Found(one.place, one.state, averaged=one.place == "state_dict", origin=one.origin)
        for one in found
        if one.place != "averaging_state"
    ]


def _teacher(found: list[_Found]) -> list[_Found]:
    """Self-distillation (DINO) calls the average of the student `teacher`."""
    places = {one.place for one in found}
    if not {"student", "teacher"} <= places:
        return found
    return [
        _Found(one.place, one.state, averaged=one.averaged or one.place == "teacher", origin=one.origin)
        for one in found
    ]


def _one(found: list[_Found], *, source: str, kind: str) -> _Found:
    """The only one of several state dicts that is where a model is kept.

    Raises:
        CheckpointError: there are several.
    """
    known = [one for one in found if one.known]
    models = known if known and kind == "raw" else found
    if len({id(one.origin) for one in models}) == 1:
        return models[0]
    key = models[0].place.partition(".")[0]
    raise CheckpointError(
        f"{source} has {counted(len(models), 'state dict')} of {kind} weights: {listed(models, 8)}. Save the one that "
        f'you want, e.g. torch.save(torch.load("{source.rpartition("/")[2]}")["{shown(key)}"], "weights.pt")'
    )


def _require_no_copy(model: _Found, found: list[_Found], *, source: str) -> None:
    """Refuse a second state dict with the names and shapes of the model: it may be an average under another name.

    Raises:
        CheckpointError: there is one.
    """

    def shapes(one: _Found) -> dict[str, tuple[int, ...]]:
        return {name: tuple(leaf.shape) for name, leaf in (one.state or {}).items()}

    copies = [one for one in found if one.origin is not model.origin and shapes(one) == shapes(model)]
    if copies:
        key = shown(copies[0].place.partition(".")[0])
        raise CheckpointError(
            f"{source} has the weights of the model twice: {model} and {listed(copies, 8)}, which may be a moving "
            f"average (EMA). Add --weights raw to take {model}, or save the other, e.g. "
            f'torch.save(torch.load("{source.rpartition("/")[2]}")["{key}"], "weights.pt")'
        )


def _named(average: _Found, raw: _Found | None, *, source: str) -> dict[str, Leaf]:
    """The averaged tensors by name; a list of them has the order of the model's parameters.

    Raises:
        CheckpointError: the tensors have no names, and the shapes do not show which is which.
    """
    if average.state is not None:
        return average.state
    tensors: list[Leaf] = list(average.origin) if isinstance(average.origin, (list, tuple)) else []
    state = {} if raw is None or raw.state is None else raw.state
    tied: dict[object, list[str]] = {}
    for name, leaf in state.items():
        if not name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            tied.setdefault(id(leaf) if isinstance(leaf, Tensor) else leaf.identity, []).append(name)
    parameters = list(tied.values())
    shapes = [tuple(state[names[0]].shape) for names in parameters]
    if shapes != [tuple(tensor.shape) for tensor in tensors] or not shapes:
        raise CheckpointError(
            f"{source}: the EMA weights ({average}) are {counted(len(tensors), 'tensor')} without names, and their "
            f"shapes do not follow those of the model's {counted(len(parameters), 'parameter')}. Copy them into the "
            "model in your training code, ema.copy_to(model.parameters()), and save it: torch.save(model.state_dict(), "
            '"weights.pt")'
        )
    named = {name: tensor for names, tensor in zip(parameters, tensors, strict=True) for name in names}
    return {**state, **named}


def choose_weights(content: object, *, source: str, weights: Weights | None) -> Chosen:
    """Choose the weights of a checkpoint.

    Args:
        content: what the container has: dicts, lists and plain data, with a tensor or `StoredTensor` for each tensor.
        source: what to call the checkpoint in messages.
        weights: which weights are meant; None takes the only ones that are there.

    Raises:
        CheckpointError: there are none, there are raw and EMA weights and `weights` is None, there are not those that
            `weights` names, or several models are there.
    """
    if content == {}:  # the state of a model without parameters
        return Chosen({}, {}, ())
    found = _teacher(_lightning_average(content, list(_find(content, (), seen=set()))))
    raw, averaged = [one for one in found if not one.averaged], [one for one in found if one.averaged]
    if not found:
        found = raw = _mixed(content)
    if not found:
        raise CheckpointError(
            f"{source} does not contain a state dict (names to tensors); it contains {_what(content)}"
        )
    if weights is None and raw and averaged:
        raise CheckpointError(
            f"{source} has raw weights of the last step ({listed(raw, 8)}) and EMA weights, a moving average "
            f"({listed(averaged, 8)}). Add --weights raw or --weights ema; most training codes evaluate the EMA weights"
        )
    if weights is Weights.RAW and not raw:
        raise CheckpointError(f"{source} has no raw weights; it has EMA weights ({listed(averaged, 8)}): --weights ema")
    if weights is Weights.EMA and not averaged:
        raise CheckpointError(f"{source} has no EMA weights; it has raw weights ({listed(raw, 8)}): --weights raw")
    model = _one(raw, source=source, kind="raw") if raw and weights is not Weights.EMA else None
    if model is not None and weights is None:
        _require_no_copy(model, raw, source=source)
    if model is not None and model.state is not None:
        state, chosen = model.state, model
    else:
        chosen = _one(averaged, source=source, kind="EMA")
        named = chosen.state is None and raw
        state = _named(chosen, _one(raw, source=source, kind="raw") if named else None, source=source)
    return Chosen(state, _extras(content, found), _notes(chosen, bool(averaged), weights))


def _extras(content: object, found: list[_Found]) -> dict[str, Any]:
    """The plain data beside the weights, by key."""
    if isinstance(content, dict) and any(one.origin is content for one in found):
        content = {key: value for key, value in content.items() if not _is_leaf(value)}
    beside = PlainData(tuple(one.origin for one in found)).convert(content)
    return {str(key): value for key, value in beside.items()} if isinstance(beside, dict) else {}


def _notes(chosen: _Found, averages: bool, weights: Weights | None) -> tuple[str, ...]:
    if not averages:
        return ()
    kind = "EMA" if chosen.averaged else "raw"
    reason = "the only ones in the checkpoint" if weights is None else f"as --weights {weights} asks"
    return (f"{kind} weights ({chosen}), {reason}",)


def _mixed(content: object) -> list[_Found]:
    """A state dict whose tensors are beside other data at the top level, with names of modules in it."""
    if not isinstance(content, dict):
        return []
    state = {name: leaf for name, leaf in content.items() if isinstance(name, str) and "." in name and _is_leaf(leaf)}
    return [_Found("", state, averaged=False, origin=state)] if state else []


def _what(content: object) -> str:
    """What a checkpoint contains instead of weights."""
    if not isinstance(content, dict):
        return "one tensor" if _is_leaf(content) else f"a {type(content).__name__}"
    unnamed = sorted({type(key).__name__ for key in content if not isinstance(key, str)})
    if unnamed:
        return f"a dict with keys of the type {', '.join(unnamed)}, and names are text"
    return f"a dict with the keys {listed(content, 8)}" if content else "an empty dict"
