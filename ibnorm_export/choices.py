"""Values that are one of a few: an option may be given as a member of an enum or as the member's text."""

from __future__ import annotations

import enum
from typing import TypeVar

from ibnorm_export.errors import IBNormError

__all__ = ["choice"]

_Choice = TypeVar("_Choice", bound=enum.StrEnum)


def choice(kind: type[_Choice], value: object, *, name: str, error: type[IBNormError] = IBNormError) -> _Choice:
    """Return the member of an enum that a value is or names.

    Args:
        kind: the enum.
        value: a member, or its text.
        name: name of the option, for the message.
        error: class of the error that is raised.

    Raises:
        IBNormError: the value is neither; the message lists the members.
    """
    for member in kind:
        if isinstance(value, str) and value == member:
            return member
    raise error(f"{name} is {repr(value)[:200]}; it must be one of {', '.join(kind)}")
