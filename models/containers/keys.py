"""Names of weights: prefixes that wrappers of a model add, and whether a state dict fits without them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from torch import Tensor

__all__ = ["fit_keys"]

#: Names that wrappers of a module add to the names of its weights: DistributedDataParallel and AveragedModel,
#: torch.compile, FSDP, activation checkpointing, Lightning's Fabric.
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")


def _without_wrapper(names: list[str], wrapper: str) -> list[str]:
    """The names without one component, wherever it is."""
    return [".".join(part for part in name.split(".") if part != wrapper) for name in names]


def _without_first(names: list[str]) -> tuple[str, list[str]]:
    """The first component that all names share, and the names without it; "" if they share none."""
    first, dot, _ = names[0].partition(".") if names else ("", "", "")
    if not dot or not all(name.startswith(f"{first}.") for name in names):
        return "", names
    return first, [name[len(first) + 1 :] for name in names]


def _candidates(names: list[str]) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    """What can be stripped, with the names that are left: the fewest prefixes first."""
    queue: list[tuple[tuple[str, ...], list[str]]] = [((), names)]
    seen = {tuple(names)}
    while queue:
        stripped, now = queue.pop(0)
        yield stripped, now
        first, without = _without_first(now)
        following = [(f"{first}.", without)] if first else []
        following += [(f"{wrapper}.", _without_wrapper(now, wrapper)) for wrapper in _WRAPPERS]
        for prefix, then in following:
            if tuple(then) not in seen and len(set(then)) == len(then) and all(then):
                seen.add(tuple(then))
                queue.append(((*stripped, prefix), then))


def fit_keys(
    state: Mapping[str, Tensor], wanted: Collection[str], *, tied: Collection[Collection[str]] = ()
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Strip the prefixes of wrappers from the names of weights, where that alone makes every name fit.

    Args:
        state: tensors by name, as they were saved.
        wanted: the names of the model's state dict.
        tied: groups of names of one tensor; one name of a group is enough.

    Returns:
        The state with the model's names, and a note on what was stripped. Where nothing makes every name fit, the
        state as it is and no note: what fills the model then reports the names that differ.
    """
    names, model = list(state), frozenset(wanted)
    groups = [frozenset(group) for group in tied]
    for stripped, now in _candidates(names):
        found = frozenset(now)
        enough = found.union(*(group for group in groups if group & found))
        if found <= model <= enough:
            notes = (f"names of weights: the prefix {''.join(stripped)} was stripped",) if stripped else ()
            return dict(zip(now, state.values(), strict=True)), notes
    return dict(state), ()
