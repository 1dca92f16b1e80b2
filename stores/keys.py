"""Keys: what identifies an example. A key is (id, phase, step); ids are text or int64, one kind per run."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, cast

import numpy as np

from . import dtypes
from .errors import KeyRepeatedError, SchemaError

PHASE = "record"
STEP = -1
_MERGE_AT = 1 << 16

Ids = list[str] | list[int]


def normalise(ids: Any) -> Ids:
    """Ids given as strings, integers, an array or a tensor, as a list of one kind; SchemaError for anything else."""
    if isinstance(ids, str) or not hasattr(ids, "__len__"):
        raise SchemaError(f"ids must be a sequence of strings or integers, one per example; got {ids!r}")
    values = ids.tolist() if hasattr(ids, "tolist") else list(ids)
    if all(isinstance(value, str) for value in values):
        return cast("list[str]", values)
    if all(isinstance(value, (int, np.integer)) and not isinstance(value, bool) for value in values):
        return [int(value) for value in values]
    kinds = sorted({type(value).__name__ for value in values})
    raise SchemaError(f"ids must all be strings or all be integers; got {' and '.join(kinds)}: {values[:4]!r}")


def kind_of(ids: Ids) -> str:
    """`text` or `int64`."""
    return dtypes.TEXT if isinstance(ids[0], str) else "int64"


def digest(id_: str | int, phase: str = PHASE, step: int = STEP) -> bytes:
    """16 bytes that stand for a key."""
    return hashlib.blake2b(f"{type(id_).__name__}\0{id_}\0{phase}\0{step}".encode(), digest_size=16).digest()


def content_id(tokens: Any) -> str:
    """An id made of the kept tokens themselves (`ids="content"`)."""
    return hashlib.blake2b(np.ascontiguousarray(tokens, "<i8").tobytes(), digest_size=16).hexdigest()


def check_unique(ids: Ids) -> None:
    """KeyRepeatedError if an id stands twice."""
    repeated = [id_ for id_, times in Counter[str | int](ids).items() if times > 1]
    if repeated:
        raise KeyRepeatedError(f"id {repeated[0]!r} is given twice; every example needs an id of its own")


class KeySet:
    """Keys held as digests: 16 bytes each, however many there are. `x in keys` takes an id or a whole (id, phase, step)."""

    def __init__(self) -> None:
        self._sorted = np.empty(0, "S16")
        self._recent: set[bytes] = set()

    def add(self, digests: Iterable[bytes]) -> None:
        """Add keys that are not there yet."""
        self._recent.update(digests)
        if len(self._recent) >= _MERGE_AT:
            self._sorted = np.sort(np.concatenate([self._sorted, np.array(list(self._recent), "S16")]))
            self._recent = set()

    def has(self, key: bytes) -> bool:
        """Whether the digest is held."""
        if key in self._recent:
            return True
        place = int(np.searchsorted(self._sorted, np.bytes_(key)))
        return place < len(self._sorted) and self._sorted[place] == np.bytes_(key)

    def __contains__(self, key: str | int | tuple[str | int, str, int]) -> bool:
        return self.has(digest(*key) if isinstance(key, tuple) else digest(key))

    def __len__(self) -> int:
        return len(self._sorted) + len(self._recent)


def digests(ids: Sequence[str] | Sequence[int], phase: str, step: int) -> list[bytes]:
    """One digest per id."""
    return [digest(id_, phase, step) for id_ in ids]
