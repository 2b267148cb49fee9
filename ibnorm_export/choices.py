"""Check the values of options: one of a few, whole numbers, and numbers."""

from __future__ import annotations

import enum
import math
import operator
from collections.abc import Iterable
from typing import SupportsFloat, SupportsIndex, TypeVar

from ibnorm_export.errors import IBNormError, quoted

__all__ = ["choice", "real_number", "whole_number", "whole_numbers"]

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
    raise error(f"{name} is {quoted(value)}; it must be one of {', '.join(kind)}")


def whole_number(
    value: object,
    *,
    name: str,
    least: int,
    most: int | None = None,
    hint: str = "",
    error: type[IBNormError] = IBNormError,
) -> int:
    """Return an option that is a whole number, such as Python's or NumPy's integers.

    Args:
        value: the number. Text and booleans are not converted: "4" may be a mistake for something else.
        name: name of the option, for the message.
        least, most: the smallest and the largest legal value; None means no limit.
        hint: what the message adds, e.g. what None means.
        error: class of the error that is raised.

    Raises:
        IBNormError: the value is not a whole number, or is outside the range.
    """
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        raise error(f"{name} is {quoted(value)}; it must be a whole number{hint}")
    number = operator.index(value)
    if number < least or (most is not None and number > most):
        legal = f"at least {least}" if most is None else f"{least} to {most}"
        raise error(f"{name} is {quoted(number)}; it must be {legal}{hint}")
    return number


def real_number(
    value: object,
    *,
    name: str,
    least: float | None = None,
    above: float | None = None,
    finite: bool = True,
    error: type[IBNormError] = IBNormError,
) -> float:
    """Return an option that is a number, as a float.

    Args:
        value: the number. Text and booleans are not converted.
        name: name of the option, for the message.
        least: the smallest legal value; None means no limit.
        above: the number that every legal value exceeds; None means no limit.
        finite: whether infinity is illegal. NaN always is.
        error: class of the error that is raised.

    Raises:
        IBNormError: the value is not a number, or is outside the range.
    """
    if isinstance(value, bool) or not isinstance(value, (SupportsFloat, SupportsIndex)):
        raise error(f"{name} is {quoted(value)}; it must be a number")
    try:
        number = float(value)
    except (OverflowError, ValueError, TypeError):  # an integer beyond a float's range, or an array of several numbers
        number = math.nan
    fits = (least is None or number >= least) and (above is None or number > above)
    if not fits or math.isnan(number) or (finite and math.isinf(number)):
        limits = [] if least is None else [f"at least {least:g}"]
        limits += [] if above is None else [f"above {above:g}"]
        legal = " and ".join(["finite", *limits] if finite else limits or ["a number"])
        raise error(f"{name} is {quoted(value)}; it must be {legal}")
    return number


def whole_numbers(value: object, *, name: str, least: int, error: type[IBNormError] = IBNormError) -> tuple[int, ...]:
    """Return an option that is a list of whole numbers, as a tuple that is not empty; see `whole_number`."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise error(f"{name} is {quoted(value)}; it must be a list of whole numbers")
    found = tuple(whole_number(item, name=f"a value of {name}", least=least, error=error) for item in value)
    if not found:
        raise error(f"{name} is empty; it must hold at least one number")
    return found
