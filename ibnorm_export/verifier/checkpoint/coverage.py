"""What one run of a checkpoint uses: weights, norms, constants, numbers and operators."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from ibnorm_export.artifacts.float64_parameters import Widened, storage_identity
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.tensors import Arrays
from ibnorm_export.op.float64_mode import compute_in_float64
from ibnorm_export.op.torch_op import IBNorm

__all__ = ["Coverage", "measure_coverage"]

#: The most elements of constants that are kept, all together.
_MAX_ELEMENTS: Final = 1 << 20

#: Operators whose numbers are sizes, axes and positions, which a file states in another form.
_SHAPE_OPERATORS: Final = frozenset(
    {
        *("view", "_unsafe_view", "reshape", "expand", "permute", "transpose", "unsqueeze", "squeeze", "slice"),
        *("select", "arange", "zeros", "ones", "empty", "new_zeros", "new_ones", "new_empty", "repeat", "split"),
        *("t", "detach", "alias", "_to_copy", "clone", "contiguous", "movedim", "flatten", "unflatten"),
        *("new_empty_strided", "empty_strided", "as_strided", "cat", "stack", "unbind", "chunk"),
    }
)

#: Operators that change the order of axes.
_TURNING: Final = frozenset({"permute", "transpose"})

#: Operators that multiply, which is a square where both values are the same.
_PRODUCTS: Final = frozenset({"mul", "mul_"})

#: Operators that leave the values of an input as they are, in another shape or type.
_MOVING_OPERATORS: Final = frozenset(
    {
        *("view", "_unsafe_view", "reshape", "expand", "permute", "transpose", "unsqueeze", "squeeze", "t", "detach"),
        *("alias", "_to_copy", "clone", "contiguous", "flatten", "unflatten"),
    }
)

#: Operators by which code asks whether a mask has an effect, before it reads the answer with `_READING`.
_ASKING: Final = frozenset({"sum", "eq", "ne", "all", "any", "mean"})
_READING: Final = "_local_scalar_dense"

#: Operators that compare, and parts of the names of those that limit or choose. Numbers of all others are not limits: a
#: norm is given its size as a number, too.
_COMPARISONS: Final = frozenset({"lt", "le", "gt", "ge", "lt_", "le_", "gt_", "ge_"})

#: Operators that ask whether values are equal, which limits none.
_EQUALITIES: Final = frozenset({"eq", "ne", "eq_", "ne_"})
_LIMITING: Final = (
    *("clamp", "clip", "hard", "relu6", "threshold", "softplus", "shrink", "elu", "minimum", "maximum", "max", "min"),
    *(
        "where",
        "masked",
        "fill",
        "full",
        "scalar_tensor",
        "nan_to_num",
        "remainder",
        "fmod",
        "floor_divide",
        "bucketize",
    ),
    *("bitwise", "shift", "isclose", "topk"),
)


@dataclass(frozen=True, slots=True)
class Coverage:
    """What one run in float64 used.

    Args:
        weights: names of the state dict that take part in the output.
        norms: how often each IBNorm module ran, by module path, in the order of their first run.
        narrow_operators: operators that returned floating-point values of a dtype other than float64, although
            `compute_in_float64` widens casts: those that write to a tensor of another dtype.
        operators: names of the operators that ran, without their overloads.
        float_operators: how often each of them took floating-point data, outside of norms.
        truncates: whether one of them converted floating-point data to integers or truth values.
        numbers: numbers that operators were given: Python's own and those of tensors with one element.
        limits: those of them that an operator compares with, or limits a value to.
        equals: those of them that an operator asks whether a value is equal to.
        places: integers that operators were given that move, select or reshape values.
        constants: tensors that operators took or returned and that depend on no input, only small ones; and the names
            of the weights that each was computed from.
        uses: names of the operators that take the values of an input, by its name. What only moves them does not count.
        integers: dtypes of the integers that operators returned.
        integer_operators: how often each operator took data that is computed from integer inputs only, such as a mask,
            without those that only ask whether a mask has an effect.
    """

    weights: frozenset[str]
    norms: Mapping[str, int]
    _: KW_ONLY
    narrow_operators: frozenset[str] = frozenset()
    operators: frozenset[str] = frozenset()
    float_operators: Mapping[str, int] = field(default_factory=dict)
    truncates: bool = False
    numbers: frozenset[float] = frozenset()
    limits: frozenset[float] = frozenset()
    equals: frozenset[float] = frozenset()
    places: frozenset[int] = frozenset()
    constants: tuple[tuple[Tensor, frozenset[str]], ...] = ()
    uses: Mapping[str, frozenset[str]] = field(default_factory=dict)
    integers: frozenset[torch.dtype] = frozenset()
    integer_operators: Mapping[str, int] = field(default_factory=dict)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Records what operators take and return.

    Args:
        inputs: the inputs of the run by name. What is computed from them is data; everything else is constant.
    """

    def __init__(self, inputs: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.identities: set[int] = set()
        self.narrow: set[str] = set()
        self.operators: set[str] = set()
        self.float_operators: Counter[str] = Counter()
        self.truncates = False
        self.norms = 0  # how many norms are being computed, one within the other
        self.numbers: set[float] = set()
        self.limits: set[float] = set()
        self.equals: set[float] = set()
        self.places: set[int] = set()
        self.constants: dict[int, Tensor] = {}
        self._room = _MAX_ELEMENTS
        self.uses: dict[str, set[str]] = {name: set() for name in inputs}
        self.integers: set[torch.dtype] = set()
        self._data = WeakIdKeyDictionary(dict.fromkeys(inputs.values(), True))
        self._integer_operators: Counter[str] = Counter()
        self._integer_calls = 0
        #: What is computed from integer inputs only, and the calls of operators that made a question of it.
        self._integer: Any = WeakIdKeyDictionary({t: {} for t in inputs.values() if not t.is_floating_point()})
        self._read: dict[int, str] = {}  # questions that code read the answer of
        self._used: set[int] = set()  # questions whose answer is data as well
        self._inputs: Any = WeakIdKeyDictionary({tensor: name for name, tensor in inputs.items()})
        self._origins: Any = WeakIdKeyDictionary()  # torch leaves it untyped

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given, made = tree_leaves((args, kwargs)), [v for v in tree_leaves(result) if isinstance(v, Tensor)]
        name = str(func.overloadpacket).removeprefix("aten.")
        self.operators.add(name)
        tensors = [value for value in given if isinstance(value, Tensor)]
        self.identities.update(storage_identity(tensor) for tensor in tensors)
        if any(value.is_floating_point() for value in (*tensors, *made)):
            self.float_operators[name] += not self.norms
            if name in _PRODUCTS and len(tensors) == 2 and tensors[0] is tensors[1]:
                self.float_operators["square"] += not self.norms
            self.truncates |= name == "_to_copy" and not any(v.is_floating_point() for v in made)
        if any(value.is_floating_point() and value.dtype != torch.float64 for value in made):
            self.narrow.add(str(func))
        self.integers.update(value.dtype for value in made if not value.is_floating_point())
        for source in {self._inputs[tensor] for tensor in tensors if tensor in self._inputs}:
            if name in _MOVING_OPERATORS:
                self._inputs.update(dict.fromkeys(made, source))
            else:
                self.uses[source].add(name)
        self.places.update(v for v in given if type(v) is int)
        if "attention" in name:  # its scale follows from the size of a head
            self.numbers.update(float(tensor.shape[-1]) for tensor in tensors if tensor.dim())
        if name not in _SHAPE_OPERATORS:
            self._record_numbers(name, given, arguments=(*args, *(kwargs or {}).values()))
        self._count_on_integers(name, tensors, made)
        if any(tensor in self._data for tensor in tensors):
            self._data.update(dict.fromkeys(made, True))
            made = []
        else:
            self._origins.update(dict.fromkeys(made, frozenset().union(*(self.origins(t) for t in tensors))))
        # A weight whose values are only moved is recognised without being kept; a computed constant is not.
        turned = name in _TURNING and self._is_constant(tensors[0])
        for value in (*tensors, *made) if turned or name not in _SHAPE_OPERATORS else ():
            if self._is_constant(value):
                self._keep(value)
        return result

    def _record_numbers(self, name: str, given: list[Any], *, arguments: tuple[Any, ...]) -> None:
        """Record the numbers among the values that an operator was given, and those that it compares with."""
        stored = [float(v.item()) for v in given if isinstance(v, Tensor) and v.numel() == 1 and self._is_constant(v)]
        self.numbers.update(float(v) for v in given if isinstance(v, (int, float)) and not isinstance(v, bool))
        self.numbers.update(stored)
        # Numbers in lists are sizes.
        single = [float(v) for v in arguments if type(v) in (int, float)] + stored
        if name in _EQUALITIES:
            self.equals.update(single)
        elif name in _COMPARISONS or any(part in name for part in _LIMITING):
            self.limits.update(single)

    def _count_on_integers(self, name: str, tensors: list[Tensor], made: list[Tensor]) -> None:
        """Count an operator on data that is computed from integers only; a table makes other data of them."""
        given = [tensor for tensor in tensors if tensor in self._integer]
        if not given:
            return
        questions = {call: operator for tensor in given for call, operator in self._integer[tensor].items()}
        if name == _READING:
            self._read.update(questions)
        elif name not in (*_ASKING, *_MOVING_OPERATORS):
            self._used.update(questions)
        self._integer_calls += 1
        self._integer_operators[name] += 1
        if name != "embedding" and all(t in self._integer for t in tensors if t in self._data):
            own = {self._integer_calls: name} if name in _ASKING else {}
            chain = {**questions, **own} if own or name in _MOVING_OPERATORS else {}
            self._integer.update(dict.fromkeys(made, chain))

    @property
    def integer_operators(self) -> Mapping[str, int]:
        """How often each operator took data that is computed from integers only, without mere questions."""
        mere = Counter(operator for call, operator in self._read.items() if call not in self._used)
        return self._integer_operators - mere

    def origins(self, constant: Tensor) -> frozenset[int]:
        """Identities of the stored tensors that a constant was computed from."""
        known: frozenset[int] = self._origins.get(constant, frozenset())
        return known | {storage_identity(constant)}

    def _is_constant(self, value: Tensor) -> bool:
        return value not in self._data and not isinstance(value, Widened)

    def _keep(self, constant: Tensor) -> None:
        if constant.numel() == 1:
            self.numbers.add(float(constant.item()))
        elif 1 < constant.numel() <= self._room and id(constant) not in self.constants:
            self._room -= constant.numel()
            self.constants[id(constant)] = constant


@contextmanager
def _counted_norms(module: nn.Module, watch: _Watch) -> Iterator[Counter[str]]:
    """Count how often each norm runs within the block, and let the watch know while one is being computed.

    Yields:
        The counts by module path, in the order of the first run.
    """
    counts: Counter[str] = Counter()

    def enter(*_: Any) -> None:
        watch.norms += 1

    def leave(path: str) -> Callable[..., None]:
        def record(*_: Any) -> None:
            watch.norms -= 1
            counts.update([path])

        return record

    norms = [(path, inner) for path, inner in module.named_modules() if isinstance(inner, IBNorm)]
    hooks = [norm.register_forward_pre_hook(enter) for _, norm in norms]
    hooks += [norm.register_forward_hook(leave(path)) for path, norm in norms]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def measure_coverage(model: LoadedModel, truth: nn.Module, *, inputs: Arrays) -> Coverage:
    """Run the checkpoint once in float64 and record what it uses.

    Args:
        model: the checkpoint.
        truth: a float64 copy of its module.
        inputs: arrays by name.
    """
    tensors = [torch.from_numpy(inputs[spec.name]) for spec in model.inputs]
    tensors = [t.double() if t.is_floating_point() else t for t in tensors]
    watch = _Watch({spec.name: tensor for spec, tensor in zip(model.inputs, tensors, strict=True)})
    with _counted_norms(truth, watch) as norms, compute_in_float64(), torch.no_grad(), watch:
        model.entry(truth)(*tensors)
    names: dict[int, set[str]] = {}
    for name, tensor in truth.state_dict(keep_vars=True).items():
        names.setdefault(storage_identity(tensor), set()).add(name)
    used = {name for identity in watch.identities for name in names.get(identity, ())}
    constants = [
        (constant.detach(), frozenset(n for identity in watch.origins(constant) for n in names.get(identity, ())))
        for constant in watch.constants.values()
    ]
    return Coverage(
        frozenset(used),
        dict(norms),
        narrow_operators=frozenset(watch.narrow),
        operators=frozenset(watch.operators),
        float_operators=+watch.float_operators,
        truncates=watch.truncates,
        numbers=frozenset(watch.numbers),
        limits=frozenset(watch.limits),
        equals=frozenset(watch.equals),
        places=frozenset(watch.places),
        constants=tuple(constants),
        uses={name: frozenset(operators) for name, operators in watch.uses.items()},
        integers=frozenset(watch.integers),
        integer_operators=watch.integer_operators,
    )
