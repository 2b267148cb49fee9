"""Find out which member of the IBNorm family a norm of unknown code is, by running it.

A norm is a member when, for some (g, lambda, epsilon), its output is an affine image of IBNorm's standardised value, at
every scale of its input. Unbiased variance, `1 + weight`, constant factors and other names of parameters are absorbed
exactly. Anything else is named where it is known (`forms.NEIGHBOURS`), with its distance from the nearest
member.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from torch import Tensor, nn

from ibnorm_export.errors import SpecError, listed
from ibnorm_export.op.identification.norm_identity import NormIdentity
from ibnorm_export.op.identification.one_norm import identify_at
from ibnorm_export.op.identification.probe import NormProbe, UnfitShape, candidate_shapes
from ibnorm_export.text_report import Report, text_table

__all__ = ["IdentityReport", "NormIdentity", "identify", "identify_norms"]


def identify(module: nn.Module, *, shape: Sequence[int] | None = None) -> NormIdentity:
    """Find out which member of the IBNorm family a norm is, by running a copy of it in float64.

    Args:
        module: a norm of any code. It does not change, nor do the random generators.
        shape: shape of an input that it takes, the batch first. None tries shapes that fit its parameters.

    Returns:
        What the norm is; true for a member.

    Raises:
        SpecError: it cannot be run as a norm: it raises, its output has another shape or dtype, depends on other rows,
            or differs from run to run, or one of its parameters has an effect that is not explained.
    """
    probe = NormProbe(module)
    errors: list[SpecError] = []
    others: list[NormIdentity] = []
    for tried in [tuple(shape)] if shape is not None else candidate_shapes(module):
        try:
            found = identify_at(probe, tried)
        except SpecError as error:
            errors.append(error)
            continue
        if found:
            return found
        others.append(found)
    if others:
        return min(others, key=lambda identity: identity.residual)
    # An error about the norm itself is worth more than one about a shape that was only tried.
    refusal = next((e for e in errors if not isinstance(e, UnfitShape)), errors[0])
    if shape is None and isinstance(refusal, UnfitShape):
        raise SpecError(f"{refusal}. If it takes inputs of another shape, give one: shape=(2, 8)") from refusal
    raise refusal


@dataclass(frozen=True, slots=True)
class IdentityReport(Report):
    """What every norm of a model is.

    It is true if every norm is a member of the family or one of PyTorch's own.

    Args:
        norms: what each norm of the user's own classes is, by module path.
        stock: class of each norm of PyTorch, by module path; they stay as they are.
        refused: why a module that is named like a norm cannot be run as one, by module path.
    """

    norms: Mapping[str, NormIdentity]
    stock: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.norms or self.stock) and all(self.norms.values()) and not self.refused

    @property
    def members(self) -> dict[str, NormIdentity]:
        """The norms that are members, by module path."""
        return {path: identity for path, identity in self.norms.items() if identity}

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "passed": bool(self),
            "norms": {path: identity.to_dict() for path, identity in self.norms.items()},
            "stock": dict(self.stock),
            "refused": dict(self.refused),
        }

    def __str__(self) -> str:
        if not (self.norms or self.stock or self.refused):
            return "The model has no norm."
        columns = ("path", "class", "kind", "lambda", "epsilon", "grouping", "residual")
        rows = [(path, *_cells(identity)) for path, identity in self.norms.items()]
        rows += [(path, name, "PyTorch's own", "-", "-", "-", "-") for path, name in self.stock.items()]
        lines = [text_table("", columns, rows=rows)] if rows else []
        lines += [f"{path}: {identity.difference}" for path, identity in self.norms.items() if not identity]
        lines += [f"{path}: {message}" for path, message in self.refused.items()]
        return "\n".join(lines)


def _cells(identity: NormIdentity) -> tuple[str, ...]:
    numbers = ["-" if value is None else f"{value:.6g}" for value in (identity.lambd, identity.epsilon)]
    return (type(identity.module).__name__, identity.kind, *numbers, identity.grouping, f"{identity.residual:.1e}")


def identify_norms(
    model: nn.Module, *, run: Callable[[], object], norm_class: type[nn.Module] | str | None = None
) -> IdentityReport:
    """Identify every norm of a model.

    A norm is a module that maps one tensor to one of the same shape and whose class is named like a norm, or inherits
    from one of PyTorch's norms or from `norm_class`. A norm that contains another one is tried first; if it is not a
    member, the inner one is. Any other module that has no inner modules, and no parameters but vectors, is tried too,
    and listed if it is a member.
    Norms of PyTorch are listed as they are, and those of this package are left out.

    Args:
        model: any model. It does not change.
        run: calls the model once, so that the shapes of the norms' inputs are known.
        norm_class: a class, or its name or "module:Class"; its instances and those of its subclasses are norms too.

    Raises:
        SpecError: `norm_class` is not a class of the model's modules.
    """
    named = _named_like_norms(model, norm_class)
    others = _may_be_norms(model, named)
    shapes = _shapes(named | others, run)
    norms: dict[str, NormIdentity] = {}
    refused: dict[str, str] = {}
    known: dict[object, NormIdentity] = {}
    done: dict[int, NormIdentity | str] = {}
    for path, module in (named | others).items():
        if module not in shapes or any(identity and _contains(outer, path) for outer, identity in norms.items()):
            continue
        if id(module) not in done:
            wraps = any(_contains(path, other) and m in shapes for other, m in named.items())
            explain = path in named and not wraps
            done[id(module)] = _identified(module, shapes[module], known=known, explain=explain)
        found = done[id(module)]
        if path in others and not (isinstance(found, NormIdentity) and found):
            continue  # an activation, say
        if isinstance(found, str):
            refused[path] = found
        else:
            norms[path] = found
    norms, refused = _without_containers(norms, refused)
    stock = {path: type(m).__name__ for path, m in model.named_modules(remove_duplicate=False) if _is_stock(m)}
    inside = [path for path, identity in norms.items() if identity]
    return IdentityReport(norms, {p: n for p, n in stock.items() if not any(_contains(o, p) for o in inside)}, refused)


def _identified(
    module: nn.Module,
    shapes: Sequence[tuple[int, ...] | None],
    *,
    known: dict[object, NormIdentity],
    explain: bool,
) -> NormIdentity | str:
    """The identity of a norm, or why it has none; `known` holds that of one norm of each kind."""
    shape = next(shape for shape in shapes if shape is not None)
    plain = {name: v for name, v in vars(module).items() if isinstance(v, (bool, int, float, str))}
    key = (type(module), tuple(sorted((n, v) for n, v in plain.items() if n != "training")), len(shape))
    try:
        start = known[key].fit if key in known else None
        found = identify_at(NormProbe(module), shape, start=start, explain=explain)
    except SpecError as error:
        return str(error)
    known.setdefault(key, found)
    return (_reason_against(found, shapes) if found else "") or found


def _reason_against(member: NormIdentity, shapes: Sequence[tuple[int, ...] | None]) -> str:
    """Why no single IBNorm can take all calls of a member; "" if one can."""
    name = type(member.module).__name__
    if None in shapes:
        return f"{name} is called with one tensor, and elsewhere with more arguments or results"
    sizes = sorted({shape[member.channel_axis] for shape in shapes if shape is not None})
    return f"{name} is called with inputs of {listed(sizes)} features" if len(sizes) > 1 else ""


def _contains(outer: str, path: str) -> bool:
    return path.startswith(f"{outer}.") if outer else bool(path)


def _without_containers(
    norms: Mapping[str, NormIdentity], refused: Mapping[str, str]
) -> tuple[dict[str, NormIdentity], dict[str, str]]:
    """Leave out modules that are not members themselves but contain a norm."""
    paths = [*norms, *refused]

    def outer(path: str) -> bool:
        return any(_contains(path, other) for other in paths)

    kept = {path: identity for path, identity in norms.items() if identity or not outer(path)}
    return kept, {path: message for path, message in refused.items() if not outer(path)}


def _is_stock(module: nn.Module) -> bool:
    """Whether a module is a norm of PyTorch itself."""
    return type(module).__module__.startswith("torch.nn.") and "Norm" in type(module).__name__


#: Names of classes that compute a norm: LayerNorm, RMSNorm, IBNorm2d, LN2d, IBN, BN1d; not Normalize, NormalNoise.
_NORM_NAME: Final = re.compile(
    r"norm(?!al)|^(ib|layer|rms|group|batch)?_?(ln|bn|gn|ibn|rms)(\d?d)?$|^ibn", re.IGNORECASE
)

#: Norms of PyTorch: a class that inherits from one is a norm, whatever it is called.
_STOCK: Final = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)

#: Modules with their own weights: what contains one is a layer with a norm, not a norm.
_LAYERS: Final = (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding, nn.MultiheadAttention, nn.RNNBase)


def _named_like_norms(model: nn.Module, norm_class: type[nn.Module] | str | None) -> dict[str, nn.Module]:
    """Modules that may be norms by module path, outer ones first."""
    found: dict[str, nn.Module] = {}
    by_class = 0
    for path, module in model.named_modules(remove_duplicate=False):
        kind = type(module)
        if norm_class is not None and _is_of(kind, norm_class):
            by_class += 1
            found[path] = module
        elif (
            (_NORM_NAME.search(kind.__name__) or isinstance(module, _STOCK))
            and not kind.__module__.startswith(("torch.", "ibnorm_export.op."))
            and not any(isinstance(inner, _LAYERS) for inner in module.modules())
        ):
            found[path] = module
    if norm_class is not None and not by_class:
        names = sorted({type(m).__name__ for m in model.modules()})
        shown = norm_class if isinstance(norm_class, str) else norm_class.__name__
        raise SpecError(f"no module of the model is a {shown}; its classes are {', '.join(names)}"[:400])
    return found


def _may_be_norms(model: nn.Module, named: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Modules of the user's own classes that may be norms, whatever they are called, by module path."""
    return {
        path: module
        for path, module in model.named_modules(remove_duplicate=False)
        if path
        and path not in named
        and not type(module).__module__.startswith(("torch.", "ibnorm_export.op."))
        and next(module.children(), None) is None
        and all(parameter.ndim <= 1 for parameter in module.parameters())
    }


def _is_of(kind: type, norm_class: type[nn.Module] | str) -> bool:
    """Whether a class is `norm_class` or inherits from it."""
    if not isinstance(norm_class, str):
        return issubclass(kind, norm_class)
    names = {form for c in kind.__mro__ for form in (c.__name__, f"{c.__module__}:{c.__qualname__}")}
    names |= {f"{c.__module__}.{c.__qualname__}" for c in kind.__mro__}
    return norm_class in names


def _shapes(named: Mapping[str, nn.Module], run: Callable[[], object]) -> dict[nn.Module, list[tuple[int, ...] | None]]:
    """The calls of each module that maps one tensor to one of the same shape, at least once during a run.

    Returns:
        The shape of the input of each call; None for a call of another kind.
    """
    calls: dict[nn.Module, list[tuple[int, ...] | None]] = {}
    if not named:
        return {}  # nothing to see, so the user's code need not run

    def seen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        tensors = [value for value in (*args, *kwargs.values()) if value is not None]
        one = len(tensors) == 1 and isinstance(tensors[0], Tensor) and isinstance(output, Tensor)
        fits = one and tensors[0].shape == output.shape and tensors[0].is_floating_point()  # type: ignore[attr-defined]  # a Tensor, by `one`
        calls.setdefault(module, []).append(tuple(tensors[0].shape) if fits else None)

    hooks = [module.register_forward_hook(seen, with_kwargs=True) for module in dict.fromkeys(named.values())]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return {module: shapes for module, shapes in calls.items() if any(shape is not None for shape in shapes)}
