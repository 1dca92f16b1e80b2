"""JSON of documents that may come from anybody: bounded in size, in values and in depth, and with one meaning only."""

from __future__ import annotations

import json
import re
from typing import Any

from .errors import DamagedError

MOST = 16 << 20  # bytes of a document
MOST_OF_RECORD = 32 << 20  # a commit record has 8 digits for every chunk touched: enough for a commit of 2 TiB
MOST_VALUES = 1 << 20  # one takes up to 200 bytes of memory, however few of the document
DEEPEST = 64
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse(content: bytes, where: str, *, most: int = MOST) -> Any:
    """What a document says.

    Raises:
        DamagedError: over `most` bytes or 2^20 values, nested deeper than the interpreter's stack, not UTF-8, a member twice in an
            object, NaN or infinity, text that is no Unicode. It begins with `where`.
    """
    if len(content) > most:
        raise DamagedError(f"{where}: a document of {len(content)} bytes, where one has at most {most}")
    if content.count(b",") + content.count(b"[") + content.count(b"{") > MOST_VALUES:
        raise DamagedError(f"{where}: a document of more than {MOST_VALUES} values")
    try:
        found = json.loads(content.decode(), object_pairs_hook=_object, parse_constant=_refused)
        if _SURROGATE.search(content):
            json.dumps(found, ensure_ascii=False).encode()  # halves of pairs cannot be encoded
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{where}: not a JSON document ({error})") from None
    return found


def check_shallow(value: Any, what: str) -> None:
    """DamagedError for a value that is nested deeper than 64 levels, which could not be compared or written again."""
    level = [value]
    for _ in range(DEEPEST):
        level = [each for one in level for each in (one.values() if type(one) is dict else one) if type(each) in (dict, list)]
        if not level:
            return
    raise DamagedError(f"{what} is nested deeper than {DEEPEST} levels")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a member stands twice in an object")
    return found


def _refused(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")
