"""What the norms of a training code compute: its own class, measured by `identify`, or what the user states.

Nothing is guessed: a norm whose reading neither a class nor the user gives is an error.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from types import SimpleNamespace
from typing import Any, Final

import torch
from torch import Tensor, nn

from ibnorm_export.errors import CheckpointError, IBNormError, SpecError, listed, quoted, shortened
from ibnorm_export.models.user_code import import_object
from ibnorm_export.op.identification.norms import identify
from ibnorm_export.op.spec import Grouping, IBNormSpec, LayerRule, NormConfig, NormKind

__all__ = ["ClassReading", "NormReader", "NormSite", "ReadNorm", "StatedReading", "combine", "import_norm_class"]

#: Names of a constructor's argument that is the number of features.
_FEATURES: Final = (
    *("ndim", "dim", "size", "shape", "width", "n", "d", "c", "features", "channels"),
    *("num_features", "num_channels", "in_channels", "normalized_shape"),
    *("hidden_size", "hidden_dim", "d_model", "n_embd", "embed_dim"),
)
#: Names of an argument that is the training code's configuration object.
_CONFIGS: Final = ("config", "cfg", "args")
#: Names of settings that look like parameters of an IBNorm.
_NORM_SETTING: Final = re.compile(r"(^|_)(lam|lambd|lambda|lmbda)(_|$)|ibn|compress")

#: What a norm of the training code may call its scale and its bias, where the user states the reading.
_SCALES: Final = ("weight", "gamma")
_BIASES: Final = ("bias", "beta")
_STATISTICS: Final = ("running_mean", "compressed_mean", "compressed_var")
#: A counter of training that no inference uses.
_COUNTER: Final = "num_batches_tracked"


@dataclass(frozen=True, slots=True)
class NormSite:
    """A place of the folder's architecture that has a norm.

    Args:
        path: module path in the folder.
        features: size of the channel axis.
        channels_first: whether the channels are on axis 1, as after a convolution.
    """

    path: str
    features: int
    channels_first: bool


@dataclass(frozen=True, slots=True)
class ReadNorm:
    """One norm, read.

    Args:
        kind: which norm it is.
        spec: its parameters.
        tensors: by name within the norm of this package.
        residual: relative error of the reading, from `identify`; None if the user states it.
    """

    kind: NormKind
    spec: IBNormSpec
    _: KW_ONLY
    tensors: dict[str, Tensor]
    residual: float | None = None


#: (site, what the training code's norm keeps) -> the norm, read.
NormReader = Callable[[NormSite, Mapping[str, Tensor]], ReadNorm]


def import_norm_class(reference: str) -> type[nn.Module]:
    """Import "package.module:Class", also from the working directory.

    Raises:
        CheckpointError: there is no such module or class, or it is not a module of PyTorch.
    """
    where = f"--norm-class {reference}"
    malformed = f"--norm-class is {reference!r}; it must be package.module:Class"
    found = import_object(reference, where=where, malformed=malformed)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise CheckpointError(f"{where}: {reference.partition(':')[2]} is not a class of torch.nn.Module")
    return found


class ClassReading:
    """Reads norms through the user's own class: each is built, given its weights, and identified.

    Args:
        norm_class: the class that the model was trained with.
        arguments: arguments of its constructor that the user states.
        settings: settings of the checkpoint; an argument of the same name takes its value from them.
        where: the checkpoint; messages name it.
    """

    def __init__(
        self, norm_class: type[nn.Module], *, arguments: Mapping[str, Any], settings: Mapping[str, Any], where: str
    ) -> None:
        self._class = norm_class
        self._arguments = arguments
        self._settings = settings
        self._where = where
        self.origins: dict[str, str] = {}

    def __call__(self, site: NormSite, kept: Mapping[str, Tensor]) -> ReadNorm:
        """Read one norm.

        Raises:
            CheckpointError: the class cannot be built, its weights do not fit, or it is not an IBNorm.
        """
        module = self._filled(site, kept)
        shape = (2, site.features, 3, 5) if site.channels_first else None
        try:
            with torch.random.fork_rng(devices=[]):
                identity = identify(module, shape=shape)
        except CheckpointError:
            raise
        except IBNormError as error:
            raise CheckpointError(f"{self._where}: {self._class.__name__} at {site.path}: {error}") from error
        if identity.spec is None:
            raise CheckpointError(
                f"{self._where}: the norm at {site.path}: {identity}. Such a norm is exported as its own operators "
                "from your own code: ibnorm-export export CHECKPOINT --model package.module:factory"
            )
        if identity.elements:
            raise CheckpointError(
                f"{self._where}: {self._class.__name__} at {site.path} has a scale or bias for each element of "
                f"{identity.elements}, and a folder has one for each feature. Export it from your own code: "
                "ibnorm-export export CHECKPOINT --model package.module:factory"
            )
        if (identity.channel_axis == 1) != site.channels_first:
            raise CheckpointError(
                f"{self._where}: {self._class.__name__} has its features on axis {identity.channel_axis}, but the "
                f"model has them on axis {1 if site.channels_first else -1} at {site.path}"
            )
        tensors = {name: tensor.detach() for name, tensor in identity.replacement().state_dict().items()}
        return ReadNorm(NormKind.IBNORM, identity.spec, tensors=tensors, residual=identity.residual)

    def describe(self) -> str:
        """The constructor call, with where each argument comes from."""
        return f"{self._class.__name__}({', '.join(f'{name}={origin}' for name, origin in self.origins.items())})"

    def _filled(self, site: NormSite, kept: Mapping[str, Tensor]) -> nn.Module:
        arguments = self._constructor_arguments(site, kept)
        try:
            with torch.random.fork_rng(devices=[]):
                module = self._class(**arguments).double().eval()
        except Exception as error:  # the user's own code may raise anything
            given = listed(f"{name}={quoted(value)}" for name, value in arguments.items())
            raise CheckpointError(
                f"{self._class.__name__}({given}) raised "
                f"{type(error).__name__}: {shortened(str(error))}; state its arguments with --norm-args JSON"
            ) from error
        own = module.state_dict()
        counters = {name for name in (*own, *kept) if name == _COUNTER}
        missing, extra = own.keys() - kept.keys() - counters, kept.keys() - own.keys() - counters
        shapes = [n for n in own.keys() & kept.keys() if own[n].shape != kept[n].shape]
        if missing or extra or shapes:
            raise CheckpointError(
                f"{self._where}: the norm at {site.path} keeps {_listed(kept)}, but {self._class.__name__} has "
                f"{_listed(own)}; give the class that the model was trained with, and its arguments with --norm-args"
            )
        module.load_state_dict(dict(kept), strict=False)
        return module

    def _constructor_arguments(self, site: NormSite, kept: Mapping[str, Tensor]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        defaults: list[str] = []
        parameters = inspect.signature(self._class).parameters
        for name, parameter in parameters.items():
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue
            if name in self._arguments:
                values[name], origin = self._arguments[name], "--norm-args"
            elif name == "bias":  # a setting of this name may be about linear layers
                values[name], origin = any(bias in kept for bias in _BIASES), "weights"
            elif name in _CONFIGS and parameter.default is parameter.empty:
                values[name], origin = SimpleNamespace(**self._settings), "settings of the checkpoint"
            elif name in _FEATURES or (parameter.default is parameter.empty and not values):
                values[name], origin = site.features, "features"
            elif name in self._settings:
                values[name], origin = self._settings[name], "checkpoint"
            elif parameter.default is not parameter.empty:
                defaults.append(name)
                self.origins[name] = f"{parameter.default!r} (default)"
                continue
            else:
                raise CheckpointError(
                    f"{self._class.__name__} needs {name}, which {self._where} does not state; add "
                    f"--norm-args '{{\"{name}\": VALUE}}'"
                )
            self.origins[name] = origin if name in (*_CONFIGS, *_FEATURES) else f"{values[name]!r} ({origin})"
        self._check_arguments(parameters, values, defaults=defaults)
        return values | {k: v for k, v in self._arguments.items() if k not in values}

    def _check_arguments(
        self, parameters: Mapping[str, inspect.Parameter], values: Mapping[str, Any], *, defaults: list[str]
    ) -> None:
        """Refuse an argument that the class does not take, and a default where the checkpoint may state a value."""
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        if (foreign := sorted(self._arguments.keys() - parameters.keys())) and not takes_any:
            raise CheckpointError(
                f"--norm-args has {', '.join(foreign)}, which {self._class.__name__} does not take; it takes "
                f"{', '.join(parameters)}"
            )
        if any(name in _CONFIGS for name in values):
            return  # the class reads the settings itself
        unused = {
            name: value
            for name, value in self._settings.items()
            if _NORM_SETTING.search(name.lower()) and name not in values and isinstance(value, (int, float, str))
        }
        undecided = [name for name in defaults if _NORM_SETTING.search(name.lower()) or len(defaults) == 1]
        if unused and undecided:
            stated = listed(f"{name} = {quoted(value)}" for name, value in unused.items())
            raise CheckpointError(
                f"{self._where} states {stated}, which no argument of {self._class.__name__} is called; state what "
                f"{', '.join(undecided)} was in training: --norm-args '{{\"{undecided[0]}\": VALUE}}'"
            )


class StatedReading:
    """Reads norms as the user states: the `ibnorm` section of config.json.

    Args:
        norms: the stated config.
        stated: keys that the section has; `scale` and `bias` follow the weights where it has none.
        where: the checkpoint; messages name it.
    """

    def __init__(self, norms: NormConfig, *, stated: frozenset[str], where: str) -> None:
        self._norms = norms
        self._stated = stated
        self._where = where

    def covers(self, path: str) -> bool:
        """Whether a rule of the statement is for the norm at this path."""
        return self._norms.at(path)[1] is not self._norms.default

    def __call__(self, site: NormSite, kept: Mapping[str, Tensor]) -> ReadNorm:
        """Read one norm.

        Raises:
            CheckpointError: it keeps something that the statement does not explain.
        """
        kind, spec = self._norms.at(site.path)
        rest = {name: tensor for name, tensor in kept.items() if name != _COUNTER}
        if kind is not NormKind.IBNORM:
            spec = dataclasses.replace(spec, scale="weight" in rest, bias="bias" in rest)
            return ReadNorm(kind, spec, tensors=rest)
        scale = next((rest.pop(name) for name in _SCALES if name in rest), None)
        bias = next((rest.pop(name) for name in _BIASES if name in rest), None)
        tensors = {} if scale is None else {"weight": scale.reshape(-1)}
        tensors |= {} if bias is None else {"bias": bias.reshape(-1)}
        if spec.grouping is Grouping.BATCH:
            tensors |= {name: rest.pop(name) for name in _STATISTICS if name in rest}
        if rest:
            raise CheckpointError(
                f"{self._where}: the norm at {site.path} also keeps {_listed(rest)}, which --norm does not explain; "
                "give its class: --norm-class package.module:Class"
            )
        for name, there, wanted in (("scale", scale, spec.scale), ("bias", bias, spec.bias)):
            if name in self._stated and wanted != (there is not None):
                raise CheckpointError(
                    f"{self._where}: the norm at {site.path} has {'a' if there is not None else 'no'} {name}, but "
                    f"--norm states {name} {str(wanted).lower()}"
                )
        return ReadNorm(
            kind, dataclasses.replace(spec, scale=scale is not None, bias=bias is not None), tensors=tensors
        )


def _listed(tensors: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in sorted(tensors.items())) or "nothing"


def combine(norms: Mapping[str, ReadNorm]) -> NormConfig:
    """One config for all norms: the most frequent reading for the model, and a rule for each norm that differs."""
    ibnorms = [norm.spec for norm in norms.values() if norm.kind is NormKind.IBNORM]
    default = Counter(ibnorms or [norm.spec for norm in norms.values()]).most_common(1)[0][0]
    rules = tuple(
        LayerRule(path, norm.kind, norm.spec)
        for path, norm in norms.items()
        if norm.kind is not NormKind.IBNORM or norm.spec != default
    )
    return NormConfig(default, rules)


def stated_norms(section: object, *, where: str) -> StatedReading:
    """The reading that an `ibnorm` section states.

    Raises:
        CheckpointError: the section is not legal.
    """
    if isinstance(section, IBNormSpec):
        section = section.to_config()
    if isinstance(section, NormConfig):
        section = section.to_config()
    try:
        norms = NormConfig.from_config(section)
    except SpecError as error:
        raise CheckpointError(f"--norm: {error}") from error
    assert isinstance(section, Mapping)
    return StatedReading(norms, stated=frozenset(section), where=where)
