"""Read pickles as data: of all that a pickle can name, only an allow-list exists, and no code of it is imported.

Python's own recipe ("Restricting Globals" in the documentation of pickle) replaces `find_class`. This reader goes
further, because what a pickle may do with an allowed class matters too. It calls nothing but the functions of the
allow-list, changes nothing but the containers that it has made itself, and uses the unpickler that is written in
Python: the one in C reserves memory for whatever index a few bytes of the file name.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable, Mapping
from typing import IO, Any, ClassVar, Final

from ibnorm_export.errors import printable, shortened

__all__ = ["Allowed", "PlainObject", "RefusedClassError", "UnreadableError", "read_pickle", "shown"]

#: Types of keys that dicts and sets of a pickle may have. A tuple is hashed recursively, without a limit of depth.
_KEYS: Final = (str, bytes, int, float, type(None))

#: Names of Python 2, which protocols 0 to 2 write, and today's.
_MODULES: Final = {"__builtin__": "builtins", "copy_reg": "copyreg"}

#: Instructions that are refused: calls and registries of old protocols, and buffers outside the pickle.
_NEEDLESS: Final = (
    pickle.INST,
    pickle.OBJ,
    pickle.EXT1,
    pickle.EXT2,
    pickle.EXT4,
    pickle.NEXT_BUFFER,
    pickle.READONLY_BUFFER,
)


def shown(value: object) -> str:
    """Text of a file as a message shows it: shortened, on one line, without characters that a terminal obeys."""
    return printable(" ".join(shortened(str(value)).splitlines()))


class UnreadableError(Exception):
    """A pickle is damaged, or does what data does not need."""


class RefusedClassError(UnreadableError):
    """A pickle names a class or function outside the allow-list.

    Args:
        name: what it names, with its module.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = shown(name)


class PlainObject:
    """An object of a pickle as data: the name of its class, and its attributes.

    Args:
        kind: the class that the pickle names, with its module.
        key: whether it may be the key of a dict.
    """

    __slots__ = ("fields", "kind")

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.fields: dict[str, Any] = {}

    def set_state(self, state: object) -> None:
        """Take the attributes that the pickle gives: a dict, or a pair of dicts for a class with slots."""
        parts = state if isinstance(state, tuple) else (state,)
        for part in parts:
            if isinstance(part, dict):
                self.fields |= {str(name): value for name, value in part.items() if isinstance(name, str)}
            elif part is not None:
                raise UnreadableError(f"the attributes of {self.kind} are {type(part).__name__}")


class Allowed:
    """A class or function of the allow-list: its name, and what makes its object.

    Args:
        name: its full name in a pickle.
        make: called in place of the class or function. It must be safe with any arguments.
    """

    __slots__ = ("make", "name")

    def __init__(self, name: str, make: Callable[..., Any]) -> None:
        self.name, self.make = name, make


def _checked_key(key: object) -> Any:
    flat = isinstance(key, tuple) and all(isinstance(part, _KEYS) for part in key)
    if not flat and not isinstance(key, (*_KEYS, PlainObject)):
        raise UnreadableError(f"a dict or set has a key of the type {type(key).__name__}")
    return key


class _Reader(pickle._Unpickler):
    # Attributes and methods of the base, which type checkers do not know.
    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]
    read: Callable[[int], bytes]

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, stream: IO[bytes], allowed: Mapping[str, Any], *, storage: Callable[[object], Any]) -> None:
        super().__init__(stream, encoding="utf-8")
        self._allowed, self._storage = allowed, storage

    def find_class(self, module: str, name: str) -> Any:
        full = f"{_MODULES.get(module, module)}.{name}"
        if full not in self._allowed:
            raise RefusedClassError(full)
        return self._allowed[full]

    def persistent_load(self, pid: object) -> Any:
        return self._storage(pid)

    def _make(self, cls: object, arguments: object) -> None:
        if not isinstance(cls, Allowed) or not isinstance(arguments, tuple):
            raise UnreadableError(f"it calls {type(cls).__name__}, which is data")
        self.append(cls.make(*arguments))

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        self._make(self.stack.pop(), arguments)

    def load_newobj_ex(self) -> None:
        if self.stack.pop():
            raise UnreadableError("it calls a class with keywords")
        self.load_reduce()

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, PlainObject):
            target.set_state(state)
        elif not isinstance(target, dict):  # the attributes of a dict, such as a flag, are not content
            raise UnreadableError(f"it sets attributes of {type(target).__name__}")

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def load_setitems(self) -> None:
        self._set_items(self.pop_mark())

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise UnreadableError(f"it sets items of {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_checked_key(key)] = value

    def load_append(self) -> None:
        self._extend([self.stack.pop()])

    def load_appends(self) -> None:
        self._extend(self.pop_mark())

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list):
            raise UnreadableError(f"it appends to {type(target).__name__}")
        target.extend(items)

    def load_additems(self) -> None:
        items, target = self.pop_mark(), self.stack[-1]
        if not isinstance(target, set):
            raise UnreadableError(f"it adds to {type(target).__name__}")
        target.update(map(_checked_key, items))

    def load_frozenset(self) -> None:
        items = self.pop_mark()  # before `append`, which it replaces
        self.append(frozenset(map(_checked_key, items)))

    def load_bytearray(self) -> None:
        (size,) = struct.unpack("<Q", self.read(8))
        self.append(self.read(size))  # bytearray(size) would reserve what the file only states

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._set_items(items)

    def load_refused(self) -> None:
        raise UnreadableError("it has an instruction that data does not need")

    dispatch |= {
        pickle.REDUCE[0]: load_reduce,
        pickle.NEWOBJ[0]: load_reduce,
        pickle.NEWOBJ_EX[0]: load_newobj_ex,
        pickle.BUILD[0]: load_build,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.APPEND[0]: load_append,
        pickle.APPENDS[0]: load_appends,
        pickle.ADDITEMS[0]: load_additems,
        pickle.FROZENSET[0]: load_frozenset,
        pickle.DICT[0]: load_dict,
        pickle.BYTEARRAY8[0]: load_bytearray,
        **dict.fromkeys((opcode[0] for opcode in _NEEDLESS), load_refused),
    }


def _no_storage(pid: object) -> Any:
    raise UnreadableError("it refers to data outside the pickle")


def read_pickle(
    stream: IO[bytes], allowed: Mapping[str, Any], *, storage: Callable[[object], Any] = _no_storage
) -> Any:
    """Read one pickle of a stream; nothing of it runs.

    Args:
        stream: a binary stream; it is left at the end of the pickle.
        allowed: what exists for the pickle, by full name: an `Allowed`, or a constant.
        storage: called with each persistent id; returns what stands for it.

    Raises:
        RefusedClassError: the pickle names anything else.
        UnreadableError: the pickle is damaged, or does what data does not need.
    """
    try:
        return _Reader(stream, allowed, storage=storage).load()
    except UnreadableError:
        raise
    except (
        *(pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError),
        *(OverflowError, MemoryError, RecursionError),
    ) as error:  # what the instructions of a damaged pickle raise
        raise UnreadableError(shortened(f"{type(error).__name__}: {error}")) from error
