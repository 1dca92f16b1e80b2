"""One digest of everything a run holds, whatever order it was recorded in and whatever parts it lies in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from .columns import Column

Key = tuple[str | int, str, int]


def digest(keys: Sequence[Key], columns: Iterable[Column]) -> str:
    """SHA-256 over the keys, sorted, and for each column by name its dtype, shape and each example's values in that order."""
    order = sorted(range(len(keys)), key=keys.__getitem__)
    found = hashlib.sha256(json.dumps([keys[number] for number in order]).encode())
    for column in sorted(columns, key=lambda column: column.name):
        found.update(json.dumps([column.name, str(column.dtype), column.shape[1:]]).encode())
        for number in order:
            found.update(_cell(column[number]) if column.present[number] else b"absent")
    return found.hexdigest()


def _cell(values: Any) -> bytes:
    """One example's values with their number of rows in front; text as JSON."""
    array = np.asarray(values)
    content = json.dumps(array.tolist()).encode() if array.dtype.kind in "OUT" else array.tobytes()
    return f"{array.shape} ".encode() + content
