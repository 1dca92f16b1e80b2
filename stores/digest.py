"""One digest of everything a run holds, whatever order it was recorded in and whatever parts it lies in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from .columns import Column
from .names import is_bookkeeping

Key = tuple[str | int, str, int]


def digest(keyed: Iterable[tuple[Sequence[Key], Iterable[Column]]]) -> str:
    """SHA-256 over the keys of each kind of row (examples, training steps), sorted, and what columns have for them.

    Of each column, by name: its dtype, shape and each example's values in the order of keys; keys and bounds apart.
    """
    found = hashlib.sha256()
    for keys, columns in keyed:
        order = sorted(range(len(keys)), key=keys.__getitem__)
        found.update(json.dumps([keys[number] for number in order]).encode())
        own = [column for column in columns if not is_bookkeeping(column.name)]
        for column in sorted(own, key=lambda column: column.name):
            _add(found, column, order)
    return found.hexdigest()


def _add(found: hashlib._Hash, column: Column, order: Sequence[int]) -> None:
    found.update(json.dumps([column.name, str(column.dtype), column.shape[1:]]).encode())
    for number in order:
        found.update(_cell(column[number]) if column.present[number] else b"absent")


def _cell(values: Any) -> bytes:
    """One example's values with their number of rows in front; text as JSON."""
    array = np.asarray(values)
    content = json.dumps(array.tolist()).encode() if array.dtype.kind in "OUT" else array.tobytes()
    return f"{array.shape} ".encode() + content
