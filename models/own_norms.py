"""Find the norms of the user's own classes in a model, and put IBNorm in their place."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ibnorm_export.errors import CheckpointError, IBNormError, SpecError, listed, shortened
from ibnorm_export.models.adapted_norms import adapted
from ibnorm_export.models.registry import adapter_of
from ibnorm_export.op.float64_mode import compute_in_float64
from ibnorm_export.op.identification.norms import NormIdentity, identify, identify_norms
from ibnorm_export.op.norm_variants import BatchIBNorm
from ibnorm_export.op.torch_op import IBNorm

__all__ = ["NormClass", "replace_own_norms"]

#: A class of norms, or its name.
NormClass = type[nn.Module] | str

_NO_NORM: Final = (
    "no IBNorm was found, so nothing is fused. `ibnorm-export identify MODULE:CLASS` shows what your norm computes; if "
    "it is an IBNorm, give its class a name that ends in Norm, or name it in Python: "
    "from_module(net, inputs, norm_class=YourClass)"
)


def replace_own_norms(
    module: nn.Module, *, run: Callable[[], object], norm_classes: Sequence[NormClass] = ()
) -> tuple[str, ...]:
    """Replace every norm of the user's own classes that is a member of the IBNorm family, in place.

    Norms of a class with an adapter are replaced as it states, after a check against the class. All others are
    identified. A norm that no member matches stays as it is.

    Args:
        module: the model in evaluation mode; a replacement takes over the parameters of the norm.
        run: calls `module` once, so that the values that reach every norm are known.
        norm_classes: classes of the user's norms that are not named like a norm.

    Returns:
        A note for each norm that stays as it is, or one that says what to do if none was found.

    Raises:
        CheckpointError: an adapter is wrong, or the model has no norm of a given class.
    """
    _replace_adapted(module, run)
    notes: dict[str, None] = {}
    for norm_class in norm_classes or (None,):
        try:
            report = identify_norms(module, run=run, norm_class=norm_class)
        except SpecError as error:
            raise CheckpointError(str(error)) from error
        for path, identity in report.norms.items():
            if identity.spec is None:
                name = type(identity.module).__name__
                notes[f"{path} ({name}) is exported as its own operators, no fused kernel: {identity.difference}"] = (
                    None
                )
        for path, reason in report.refused.items():
            notes[
                f"{path} is exported as its own operators, no fused kernel, since it cannot be identified: {reason}"
            ] = None
        notes |= dict.fromkeys(_replace_members(module, report.members, run=run))
    if not notes and not any(isinstance(norm, (IBNorm, BatchIBNorm)) for norm in module.modules()):
        return (_NO_NORM,)
    return tuple(notes)


def _replace_members(
    module: nn.Module, members: Mapping[str, NormIdentity], *, run: Callable[[], object]
) -> tuple[str, ...]:
    """Put IBNorm in the place of members; they stay, with a note, if the model does not run with IBNorm."""
    new: dict[int, nn.Module] = {}
    for path, identity in members.items():
        _require_place(path)
        norm = identity.module
        if id(norm) not in new:
            new[id(norm)] = identity.replacement().eval().requires_grad_(False)
        module.set_submodule(path, _with_same_parameters(new[id(norm)]))
    try:
        if members:
            run()
    except CheckpointError as error:  # it ran before: it uses more of a norm than its call
        for path, identity in members.items():
            module.set_submodule(path, identity.module)
        return (
            f"{listed(list(members))}: exported as their own operators, no fused kernel, since the model does not run "
            f"with IBNorm in their place: {shortened(str(error.__cause__ or error))}",
        )
    return ()


def _with_same_parameters(norm: nn.Module) -> nn.Module:
    """A copy with the same parameters: a norm that the model holds under several paths has a node for each."""
    tensors = (*norm.parameters(), *norm.buffers())
    return copy.deepcopy(norm, {id(tensor): tensor for tensor in tensors})


def _require_place(path: str) -> None:
    if not path:
        raise CheckpointError("the model itself is a norm: put it inside a module, for example nn.Sequential(norm)")


def _replace_adapted(module: nn.Module, run: Callable[[], object]) -> None:
    own = {
        path: norm
        for path, norm in module.named_modules(remove_duplicate=False)
        if adapter_of(type(norm)) is not None and not isinstance(norm, (IBNorm, BatchIBNorm))
    }
    if not own:
        return
    for path in own:
        _require_place(path)
    with _inputs_of(list(own.values())) as seen, compute_in_float64(), torch.no_grad():
        run()
    new: dict[int, nn.Module] = {}
    for path, norm in own.items():
        adapter = adapter_of(type(norm))
        assert adapter is not None
        if id(norm) not in new:
            x = seen.get(id(norm))
            new[id(norm)] = adapted(norm, adapter, path=path, seen=x, suggest=lambda n=norm, x=x: _suggest(n, x))  # type: ignore[misc]  # binds n and x
        module.set_submodule(path, _with_same_parameters(new[id(norm)]))


@contextmanager
def _inputs_of(norms: list[nn.Module]) -> Iterator[dict[int, Tensor]]:
    """Record the first value that reaches each norm, by the `id` of the norm."""
    seen: dict[int, Tensor] = {}

    def keep(norm: nn.Module, inputs: object) -> None:
        value = next((leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)), None)
        if value is not None and id(norm) not in seen:
            seen[id(norm)] = value.detach().clone()

    handles = [norm.register_forward_pre_hook(keep) for norm in norms]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _suggest(norm: nn.Module, x: Tensor | None) -> str:
    """Which reading would fit a norm, for the message about an adapter that does not."""
    try:
        identity = identify(norm, shape=None if x is None else tuple(x.shape))
    except IBNormError as error:
        return f"The class cannot be identified either: {error}"
    if identity.spec is None:
        return (
            f"No member of the family fits: {identity.difference}. Remove the adapter, and the norm is exported as its "
            "own operators"
        )
    spec = identity.spec
    return (
        f"This fits: IBNormSpec({spec.compression.value!r}, {spec.lambd:.10g}, epsilon={spec.epsilon:.10g}). Or remove "
        "the adapter, and the norm is identified"
    )
