"""Classes of Python and of common packages that checkpoints hold, each with a function that makes plain data of it."""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from ibnorm_export.errors import quoted
from ibnorm_export.models.containers.safe_pickle import Allowed, PlainObject, RefusedClassError, UnreadableError

__all__ = ["NumpyArray", "plain_classes"]

#: Subclasses of dict, whose attributes are the items again or options of the class.
_DICTS: Final = (
    "collections.OrderedDict",
    "collections.Counter",
    "easydict.EasyDict",
    "addict.addict.Dict",
    "munch.Munch",
    "munch.DefaultMunch",
    "box.box.Box",
    "yacs.config.CfgNode",
    "fvcore.common.config.CfgNode",
    "detectron2.config.config.CfgNode",
    "mmengine.config.config.ConfigDict",
    "mmcv.utils.config.ConfigDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "lightning.pytorch.utilities.parsing.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "lightning.fabric.utilities.data.AttributeDict",
)

#: Classes that only have attributes.
_OBJECTS: Final = (
    "argparse.Namespace",
    "types.SimpleNamespace",
    "uuid.UUID",
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    *(f"omegaconf.nodes.{kind}Node" for kind in ("Any", "String", "Integer", "Float", "Boolean", "Bytes", "Path")),
)

#: Types that appear as a value, such as the factory of a defaultdict. Text stands for them.
_TYPES: Final = ("typing.Any", "typing.Union", "typing.Optional", "builtins.object", "builtins.type")

_POSIX: Final = ("PosixPath", "PurePosixPath", "Path", "PurePath")
_WINDOWS: Final = ("WindowsPath", "PureWindowsPath")
_NUMPY_CODE: Final = re.compile(r"[fiubc](1|2|4|8|16)|[US]\d{1,6}")
_MOST_ITEMS: Final = 10_000_000  # of a range or an array that stands for settings


class _NumpyType(PlainObject):
    """A dtype of NumPy, as the code that its pickle gives."""

    __slots__ = ("_code", "_order")

    def __init__(self, code: object, align: object = False, copy: object = True) -> None:
        super().__init__("numpy.dtype")
        if isinstance(code, str) and code.startswith("O"):
            raise RefusedClassError("an array of NumPy that holds Python objects")
        if not isinstance(code, str) or not _NUMPY_CODE.fullmatch(code):
            raise UnreadableError(f"an array of NumPy has the dtype {quoted(code)}, which is not a number or text")
        self._code, self._order = code, "="

    def set_state(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", ">", "|", "="):
            raise UnreadableError("a dtype of NumPy is damaged")
        self._order = state[1]

    def array(self, data: object) -> NDArray[Any]:
        """The values of bytes, in one dimension."""
        content = data.encode("latin-1") if isinstance(data, str) else data
        if not isinstance(content, bytes):
            raise UnreadableError("an array of NumPy has no bytes")
        return np.frombuffer(content, np.dtype(self._order + self._code))


class NumpyArray(PlainObject):
    """An array of NumPy."""

    __slots__ = ("_array",)

    def __init__(self, *_ignored: object) -> None:
        super().__init__("numpy.ndarray")
        self._array: NDArray[Any] = np.zeros(0)

    def set_state(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) != 5 or not isinstance(state[2], _NumpyType):
            raise UnreadableError("an array of NumPy is damaged")
        _, shape, dtype, fortran, data = state
        self._array = dtype.array(data).reshape(shape, order="F" if fortran else "C")

    def to_list(self) -> Any:
        """The values as nested lists; None if there are more than settings have."""
        return self._array.tolist() if self._array.size <= 10_000 else None


def _numpy_from_buffer(data: object, dtype: object, shape: object, order: object) -> NumpyArray:
    array = NumpyArray()
    array.set_state((1, shape, dtype, order == "F", data))
    return array


def _numpy_scalar(dtype: object, data: object = b"") -> Any:
    if not isinstance(dtype, _NumpyType):
        raise UnreadableError("a number of NumPy is damaged")
    (value,) = dtype.array(data)
    return value.item()


def _bytes(data: object = b"", encoding: object = "latin-1") -> bytes:
    if isinstance(data, str):
        return data.encode("latin-1")
    if isinstance(data, bytes):
        return data
    if isinstance(data, list):
        return bytes(data)
    raise UnreadableError(f"it makes bytes of {type(data).__name__}")


def _text(*parts: object) -> str:
    if not all(isinstance(part, (str, int, float)) for part in parts):
        raise UnreadableError("it makes text of other data")
    return ", ".join(map(str, parts))


def _dict(*_ignored: object) -> dict[Any, Any]:
    return {}


def _counter(items: object = None) -> dict[Any, Any]:
    return dict(items) if isinstance(items, dict) else {}


def _list(items: object = (), *_ignored: object) -> list[Any]:
    return list(items) if isinstance(items, (list, tuple)) else []


def _set(items: object = ()) -> list[Any]:
    """A list, since the values of a set are hashed, and hashing a deep tuple overflows the stack."""
    return _list(items)


def _range(*bounds: object) -> Any:
    whole = [bound for bound in bounds if isinstance(bound, int)]
    if len(whole) != 3 or len(numbers := range(whole[0], whole[1], whole[2])) > _MOST_ITEMS:
        raise UnreadableError("a range is damaged")
    return list(numbers)


def _slice(*bounds: object) -> str:
    return f"slice({', '.join(map(_text, bounds))})"


def _complex(real: object = 0.0, imaginary: object = 0.0) -> complex:
    if not isinstance(real, (int, float)) or not isinstance(imaginary, (int, float)):
        raise UnreadableError("a complex number is damaged")
    return complex(real, imaginary)


def _reconstructor(cls: object, *_base_and_state: object) -> Any:
    """An object without arguments, as protocols 0 and 1 write it."""
    if not isinstance(cls, Allowed):
        raise UnreadableError("it makes an object of data")
    return cls.make()


def _moment(kind: Callable[..., Any]) -> Callable[..., str]:
    def make(*arguments: object) -> str:
        if not all(isinstance(argument, (int, str, bytes)) for argument in arguments):
            raise UnreadableError("a date is damaged")
        if len(arguments) == 2 and isinstance(arguments[0], bytes):  # with a time zone, which is text here
            return f"{kind(arguments[0])} {arguments[1]!s}"
        return str(kind(*arguments))

    return make


def plain_classes() -> dict[str, Any]:
    """What a checkpoint may contain besides tensors: full name in a pickle -> an `Allowed`, or a constant."""
    makers: dict[str, Callable[..., Any]] = {
        **dict.fromkeys(_DICTS, _dict),
        "collections.OrderedDict": _ordered_dict,
        "collections.Counter": _counter,
        "collections.defaultdict": _dict,
        "collections.deque": _list,
        "builtins.dict": _dict,
        "builtins.list": _list,
        "builtins.tuple": _list,
        "builtins.set": _set,
        "builtins.frozenset": _set,
        "builtins.bytes": _bytes,
        "builtins.bytearray": _bytes,
        "builtins.complex": _complex,
        "builtins.range": _range,
        "builtins.xrange": _range,
        "builtins.unicode": _text,
        "builtins.slice": _slice,
        **{f"builtins.{kind}": _text for kind in ("int", "float", "str", "bool")},
        "_codecs.encode": _bytes,
        "copyreg._reconstructor": _reconstructor,
        "torch.torch_version.TorchVersion": _text,
        "torch.device": _text,
        "torch.serialization._get_layout": _text,
        "torch.Size": lambda sizes=(): tuple(sizes) if isinstance(sizes, (list, tuple)) else (),
        "datetime.datetime": _moment(datetime.datetime),
        "datetime.date": _moment(datetime.date),
        "datetime.time": _moment(datetime.time),
        "datetime.timezone": lambda *parts: f"UTC {_text(*parts)}",
        "decimal.Decimal": _text,
        "datetime.timedelta": _moment(datetime.timedelta),
        "numpy.dtype": _NumpyType,
        "numpy.ndarray": NumpyArray,
        **{f"numpy.{core}.multiarray.scalar": _numpy_scalar for core in ("core", "_core")},
        **{f"numpy.{core}.numeric._frombuffer": _numpy_from_buffer for core in ("core", "_core")},
        **{f"numpy.{core}.multiarray._reconstruct": NumpyArray for core in ("core", "_core")},
    }
    for name in _OBJECTS:
        makers[name] = lambda *_ignored, name=name: PlainObject(name)
    for module in ("pathlib", "pathlib._local"):
        makers |= {f"{module}.{kind}": lambda *parts: str(PurePosixPath(*map(_text, parts))) for kind in _POSIX}
        makers |= {f"{module}.{kind}": lambda *parts: str(PureWindowsPath(*map(_text, parts))) for kind in _WINDOWS}
    dtypes = {f"torch.{name}": found for name in dir(torch) if isinstance(found := getattr(torch, name), torch.dtype)}
    return {
        **{name: Allowed(name, make) for name, make in makers.items()},
        **dict(zip(_TYPES, _TYPES, strict=True)),
        **dtypes,
    }


def _ordered_dict(items: object = ()) -> dict[Any, Any]:
    """An OrderedDict; protocols 0 and 1 give its items as pairs."""
    pairs = items if isinstance(items, list) else []
    if not all(isinstance(pair, (list, tuple)) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs):
        raise UnreadableError("an OrderedDict is damaged")
    return dict(pairs)
