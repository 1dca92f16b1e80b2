"""What parsed documents hold, looked at before anything goes by it. Each function says what was found and what was expected."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from .errors import DamagedError, StoreError

MOST = 1 << 62  # of anything that is counted: sums of two still fit int64
Kinds = Mapping[str, tuple[type, ...]]
TEXT, COUNT, OBJECT, LIST = (str,), (int,), (dict,), (list,)
OPTIONAL_COUNT, OPTIONAL_TEXT, OPTIONAL_OBJECT = (int, type(None)), (str, type(None)), (dict, type(None))
_NAMES = {
    str: "text",
    int: "an integer",
    float: "a number",
    dict: "an object",
    list: "a list",
    type(None): "null",
}


@contextmanager
def named(where: str) -> Iterator[None]:
    """Errors of ours begin with the object they are about."""
    try:
        yield
    except StoreError as error:
        raise type(error)(f"{where}: {error}") from None


def members(value: Any, what: str, kinds: Kinds, optional: Kinds | None = None) -> dict[str, Any]:
    """An object that has all members of `kinds`, and any of `optional`, each of one of the types given; others may be there."""
    found: dict[str, Any] = of_kind(value, what, OBJECT)
    for name, kind in kinds.items():
        if name not in found:
            raise DamagedError(f"{what} has no {name!r}")
        if type(found[name]) not in kind:
            raise unexpected(f"{name!r} of {what}", found[name], _one_of(kind))
    if optional:
        members(found, what, {name: kind for name, kind in optional.items() if name in found})
    return found


def of_kind(value: Any, what: str, kind: tuple[type, ...]) -> Any:
    """A value of one of the types (exactly: true is no integer)."""
    if type(value) not in kind:
        raise unexpected(what, value, _one_of(kind))
    return value


def number(value: Any, what: str, least: int = 0, most: int = MOST) -> int:
    """An integer, least <= n <= most."""
    if type(value) is not int or not least <= value <= most:
        raise unexpected(what, value, f"an integer from {least} to {most}")
    return value


def numbers(values: Any, what: str, least: int = 0, most: int = MOST) -> tuple[int, ...]:
    """A list of such integers."""
    for value in of_kind(values, what, LIST):
        if type(value) is not int or not least <= value <= most:
            raise unexpected(what, values, f"integers from {least} to {most}")
    return tuple(values)


def finite(value: Any, what: str) -> float:
    """A number, neither negative nor infinite."""
    if type(value) not in (int, float) or not 0 <= value <= 1e308 or not math.isfinite(value):
        raise unexpected(what, value, "a number of 0 or more")
    return float(value)


def counts(value: Any, what: str) -> dict[str, int]:
    """An object whose members are integers of 0 or more."""
    for name, count in of_kind(value, what, OBJECT).items():
        if type(count) is not int or not 0 <= count <= MOST:
            raise unexpected(f"{name!r} of {what}", count, f"an integer from 0 to {MOST}")
    found: dict[str, int] = value
    return found


def texts(value: Any, what: str) -> dict[str, str]:
    """An object whose members are texts."""
    members(value, what, dict.fromkeys(of_kind(value, what, OBJECT), TEXT))
    found: dict[str, str] = value
    return found


def rows_of(value: Any, what: str, length: int) -> list[list[Any]]:
    """A list of lists of so many entries."""
    for row in of_kind(value, what, LIST):
        if type(row) is not list or len(row) != length:
            raise unexpected(f"an entry of {what}", row, f"a list of {length}")
    found: list[list[Any]] = value
    return found


def unexpected(what: str, value: Any, expected: str) -> DamagedError:
    """The error for a value that is not what it must be."""
    return DamagedError(f"{what} is {shown(value)}, where {expected} was expected")


def shown(value: Any) -> str:
    """A value in a message, cut."""
    short = type(value) is list and len(value) <= 16 and all(map(_is_plain, value))
    text = ascii(value) if short or _is_plain(value) else f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _is_plain(value: Any) -> bool:
    """Whether a value can be shown: not what is nested, nor integers that would have thousands of digits."""
    return value is None or type(value) in (str, float, bool) or (type(value) is int and value.bit_length() <= 256)


def _one_of(kind: tuple[type, ...]) -> str:
    return " or ".join(_NAMES[each] for each in kind)
