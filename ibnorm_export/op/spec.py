"""The definition of the operator: its identity and its parameters. Imports only the standard library.

    mu = mean(x); d = x - mu; c = g(d / lambda)
    y  = scale * (c - mean(c)) / sqrt(var(c) + epsilon) + bias

with g(t) = t (S), sign(t) ln(1 + |t|) (L) or tanh(t) (T). The PyTorch module, the NumPy reference, the ONNX functions,
the kernels and the plugins take their names and parameters from here. Compiled libraries report `SCHEMA`, which is
compared with the one here.

Source: arXiv 2510.25262, section 4.2. The paper does not specify where lambda appears, so every checkpoint states a
`Convention`. `IBNormSpec.from_convention` resolves it to the canonical pair (lambda, epsilon); no other module depends
on it.
"""

from __future__ import annotations

import enum
import fnmatch
import math
import struct
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, Final

from ibnorm_export.errors import SpecError, quoted

__all__ = [
    # the operator
    "DOMAIN",
    "OP_TYPES",
    "OP_VERSION",
    "SCHEMA",
    "SKIP_OP_TYPES",
    # one norm
    "Compression",
    "Convention",
    "Grouping",
    "IBNormSpec",
    # all norms of a model
    "LayerRule",
    "NormConfig",
    "NormKind",
]

DOMAIN: Final = "ai.ibnorm"
OP_VERSION: Final = 1


class Compression(enum.StrEnum):
    """The odd function g that is applied to centred activations."""

    LINEAR = "S"
    LOGARITHMIC = "L"
    TANH = "T"

    @property
    def op_type(self) -> str:
        """ONNX op type, e.g. `IBNormL`."""
        return f"IBNorm{self.value}"

    @property
    def skip_op_type(self) -> str:
        """ONNX op type of the form with a residual addition before the norm, e.g. `SkipIBNormL`."""
        return f"SkipIBNorm{self.value}"


OP_TYPES: Final = tuple(c.op_type for c in Compression)
SKIP_OP_TYPES: Final = tuple(c.skip_op_type for c in Compression)

#: What every compiled library reports through `ibnorm_schema()`.
SCHEMA: Final[dict[str, Any]] = {
    "domain": DOMAIN,
    "version": OP_VERSION,
    "ops": [*OP_TYPES, *SKIP_OP_TYPES],
    "types": ["float", "float16", "bfloat16"],
    "attributes": {"lambd": "float", "epsilon": "float", "axis": "int", "plugin_namespace": "string"},
}


class Convention(enum.StrEnum):
    """Where lambda appears in a checkpoint's compression f(r), r = |x - mu|."""

    DIVIDE = "divide"  # g(r / lambda)
    UNIT_SLOPE = "unit_slope"  # lambda * g(r / lambda)
    MULTIPLY = "multiply"  # g(lambda * r) / lambda
    OUTER = "outer"  # g(r) / lambda


class Grouping(enum.StrEnum):
    """Which values share one mean and variance."""

    LAST = "last"  # the last axis
    AXES = "axes"  # axes [axis, rank), as in ONNX LayerNormalization
    BATCH = "batch"  # running statistics per channel


class NormKind(enum.StrEnum):
    """Which norm a module path gets, in a model whose norms differ by layer."""

    IBNORM = "ibnorm"
    LAYERNORM = "layernorm"
    RMSNORM = "rmsnorm"
    BATCHNORM = "batchnorm"


def _as_float32(value: float) -> float:
    """Round to the nearest float32, the type of an ONNX float attribute."""
    try:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])
    except OverflowError:
        return math.inf


def _to_enum(enum_type: type[enum.StrEnum], value: object, *, name: str) -> Any:
    try:
        return enum_type(value)  # type: ignore[arg-type]
    except ValueError:
        legal = ", ".join(repr(m.value) for m in enum_type)
        raise SpecError(f"{name} is {quoted(value)}; it must be one of {legal}") from None


def _number(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise SpecError(f"{name} is {quoted(value)}; it must be a number")
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _flag(value: object, name: str) -> bool:
    if not isinstance(value, bool):
        raise SpecError(f"{name} is {quoted(value)}; it must be true or false")
    return value


@dataclass(frozen=True, slots=True)
class IBNormSpec:
    """One norm in canonical form: f(r) = g(r / lambd).

    Args:
        compression: g, a `Compression` or its text ("S", "L" or "T").
        lambd: canonical lambda, in units of the activation; finite and above 0.
        epsilon: canonical epsilon, added to the variance of the *compressed* values; finite and not negative.
        scale: whether the norm has a multiplicative parameter (`weight`).
        bias: whether the norm has an additive parameter (`bias`).
        grouping: which values share statistics.
        axis: first normalised axis for `Grouping.AXES`; -1 otherwise.
        offset: added to the scale of a checkpoint: the norm multiplies by `offset + weight`. None, where the checkpoint
            states none, is 0. Loading adds it to the weights, so files and kernels do not know of it.

    Raises:
        SpecError: a value is not legal, or becomes 0 or infinite in float32, the type that it has in an ONNX file.
    """

    compression: Compression
    lambd: float = 4.0
    _: KW_ONLY
    epsilon: float = 1e-5
    scale: bool = True
    bias: bool = True
    grouping: Grouping = Grouping.LAST
    axis: int = -1
    offset: float | None = None

    if TYPE_CHECKING:  # a text stands for the member of the enum

        def __init__(
            self,
            compression: Compression | str,
            lambd: float = 4.0,
            *,
            epsilon: float = 1e-5,
            scale: bool = True,
            bias: bool = True,
            grouping: Grouping | str = Grouping.LAST,
            axis: int = -1,
            offset: float | None = None,
        ) -> None: ...

    def __post_init__(self) -> None:
        object.__setattr__(self, "compression", _to_enum(Compression, self.compression, name="compression"))
        object.__setattr__(self, "grouping", _to_enum(Grouping, self.grouping, name="grouping"))
        object.__setattr__(self, "lambd", _number(self.lambd, "lambda"))
        object.__setattr__(self, "epsilon", _number(self.epsilon, "epsilon"))
        # Below the smallest normal float32 a kernel that flushes subnormals would divide by zero.
        smallest = 2.0**-126
        if not (smallest <= _as_float32(self.lambd) < math.inf):
            raise SpecError(
                f"lambda is {quoted(self.lambd)}; it must be finite and at least {smallest:.3g}, the smallest "
                "normal float32 above 0"
            )
        if not (self.epsilon >= 0.0 and _as_float32(self.epsilon) < math.inf):
            raise SpecError(f"epsilon is {quoted(self.epsilon)}; it must be finite and not negative")
        if isinstance(self.axis, bool) or not isinstance(self.axis, int):
            raise SpecError(f"axis is {quoted(self.axis)}; it must be an integer")
        if self.grouping is Grouping.LAST and self.axis != -1:
            raise SpecError(f"axis is {self.axis}; it must be -1 with grouping 'last'; use 'axes' for other axes")
        self._check_offset()

    def _check_offset(self) -> None:
        if self.offset is None:
            return
        object.__setattr__(self, "offset", _number(self.offset, "offset"))
        if not math.isfinite(self.offset):
            raise SpecError(f"offset is {self.offset!r}; it must be finite")
        if self.offset and self.grouping is not Grouping.LAST:
            raise SpecError(
                f"offset is {self.offset:g} with grouping {self.grouping.value!r}; it needs grouping 'last'"
            )

    @classmethod
    def from_convention(
        cls, compression: Compression | str, lambd: float, *, epsilon: float, convention: Convention | str, **rest: Any
    ) -> IBNormSpec:
        """Convert the lambda and epsilon of a convention to the canonical pair.

        The conversion is exact. Standardisation cancels an outer factor k of f, but epsilon is added to k^2 var(c):
        f = k * g(r / lambda) with epsilon equals f = g(r / lambda) with epsilon / k^2.

        Args:
            compression: g.
            lambd: lambda as the checkpoint defines it.
            epsilon: epsilon as the checkpoint defines it.
            convention: where lambda appears in f.
            **rest: other arguments of the constructor.

        Raises:
            SpecError: as for the constructor, or the convention is unknown.
        """
        kind = _to_enum(Convention, convention, name="convention")
        lambd, epsilon = _number(lambd, "lambda"), _number(epsilon, "epsilon")
        cls(compression, lambd, epsilon=epsilon)  # the given values must be legal too
        squared = lambd * lambd
        canonical: dict[Convention, tuple[float, float]] = {
            Convention.DIVIDE: (lambd, epsilon),
            Convention.UNIT_SLOPE: (lambd, epsilon / squared if squared else math.inf),
            Convention.MULTIPLY: (1.0 / lambd, epsilon * squared),
            Convention.OUTER: (1.0, epsilon * squared),
        }
        lambd, epsilon = canonical[kind]
        return cls(compression, lambd, epsilon=epsilon, **rest)

    @property
    def op_type(self) -> str:
        """ONNX op type that computes this norm."""
        return self.compression.op_type

    def attributes(self) -> dict[str, float | int | str]:
        """Return all attributes of the ONNX node.

        `axis` is always -1 in version 1. An empty `plugin_namespace` makes TensorRT prefer a loaded plugin to the
        function; other runtimes ignore it.
        """
        return {
            "lambd": _as_float32(self.lambd),
            "epsilon": _as_float32(self.epsilon),
            "axis": -1,
            "plugin_namespace": "",
        }

    def to_config(self) -> dict[str, Any]:
        """Return the `ibnorm` section of config.json for this norm, in the convention `divide`."""
        section = {
            "compression": self.compression.value,
            "lambda": self.lambd,
            "epsilon": self.epsilon,
            "convention": Convention.DIVIDE.value,
            "scale": self.scale,
            "bias": self.bias,
            "grouping": self.grouping.value,
            "axis": self.axis,
        }
        return section if self.offset is None else {**section, "offset": self.offset}

    def __str__(self) -> str:
        affine = {(True, True): "scale and bias", (True, False): "scale", (False, True): "bias"}
        has = affine.get((self.scale, self.bias), "no affine")
        return f"IBNorm-{self.compression.value} (lambda {self.lambd:g}, epsilon {self.epsilon:g}, {has})"


@dataclass(frozen=True, slots=True)
class LayerRule:
    """An exception for some module paths.

    Args:
        match: glob pattern for the module path.
        norm: which norm such a module becomes.
        spec: its parameters.
    """

    match: str
    norm: NormKind
    spec: IBNormSpec


_SPEC_KEYS: Final = ("compression", "lambda", "epsilon", "convention", "scale", "bias", "grouping", "axis", "offset")


@dataclass(frozen=True, slots=True)
class NormConfig:
    """The `ibnorm` section of a checkpoint: a norm for the whole model, and rules for exceptions.

    All norms of the architecture are replaced, including the final one, unless a rule matches their path. If several
    rules match, the last one applies.

    Args:
        default: the norm of modules that no rule matches.
        layers: the rules.
    """

    default: IBNormSpec
    layers: tuple[LayerRule, ...] = ()

    @classmethod
    def from_config(cls, section: object) -> NormConfig:
        """Read the `ibnorm` section of config.json.

        Args:
            section: the parsed JSON value.

        Raises:
            SpecError: a key is missing, unknown or has an illegal value.
        """
        if not isinstance(section, Mapping):
            raise SpecError(f"the ibnorm section is {quoted(section)}; it must be an object")
        written = dict(section)
        rules = written.pop("layers", [])
        default = cls._spec(written, "ibnorm")
        if not isinstance(rules, list):
            raise SpecError(f"ibnorm.layers is {quoted(rules)}; it must be a list of rules")
        return cls(default, tuple(cls._rule(rule, written, index=i) for i, rule in enumerate(rules)))

    @staticmethod
    def _spec(written: Mapping[str, Any], where: str) -> IBNormSpec:
        unknown = sorted(set(written) - set(_SPEC_KEYS))
        if unknown:
            raise SpecError(f"{where} has unknown keys {unknown}; legal keys are {[*_SPEC_KEYS, 'layers']}")
        for key in ("compression", "lambda", "epsilon", "convention"):
            if key not in written:
                hint = (
                    " (the paper does not specify where lambda appears, so the checkpoint must state it: 'divide', "
                    "'unit_slope', 'multiply' or 'outer')"
                    if key == "convention"
                    else ""
                )
                raise SpecError(f"{where}.{key} is missing{hint}")
        return IBNormSpec.from_convention(
            written["compression"],
            written["lambda"],
            epsilon=written["epsilon"],
            convention=written["convention"],
            scale=_flag(written.get("scale", True), f"{where}.scale"),
            bias=_flag(written.get("bias", True), f"{where}.bias"),
            grouping=written.get("grouping", Grouping.LAST),
            axis=written.get("axis", -1),
            offset=written.get("offset"),
        )

    @classmethod
    def _rule(cls, rule: object, base: Mapping[str, Any], *, index: int) -> LayerRule:
        where = f"ibnorm.layers[{index}]"
        if not isinstance(rule, Mapping) or not isinstance(rule.get("match"), str):
            raise SpecError(f"{where} is {quoted(rule)}; it must be an object with a glob under 'match'")
        own = {k: v for k, v in rule.items() if k not in ("match", "norm")}
        kind: NormKind = _to_enum(NormKind, rule.get("norm", NormKind.IBNORM), name=f"{where}.norm")
        if kind is not NormKind.IBNORM:
            own["convention"] = Convention.DIVIDE  # a stock norm has no lambda: its epsilon is as it is stated
        return LayerRule(rule["match"], kind, cls._spec({**base, **own}, where))

    def at(self, path: str) -> tuple[NormKind, IBNormSpec]:
        """Return which norm a module path gets, and its parameters."""
        for rule in reversed(self.layers):
            if fnmatch.fnmatchcase(path, rule.match):
                return rule.norm, rule.spec
        return NormKind.IBNORM, self.default

    def to_config(self) -> dict[str, Any]:
        """Return the `ibnorm` section of config.json; `from_config` reads it back."""
        section = self.default.to_config()
        if self.layers:
            section["layers"] = [{"match": r.match, "norm": r.norm.value, **r.spec.to_config()} for r in self.layers]
        return section
