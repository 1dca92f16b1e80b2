"""Keys: what identifies an example. A key is (id, phase, step); ids are text or int64, one kind per run."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, cast

import numpy as np

from . import dtypes, names
from .dtypes import Array
from .errors import KeyRepeatedError, SchemaError

PHASE = "record"
STEP = -1
_MERGE_AT = 1 << 16
_LOWEST, _HIGHEST = -(1 << 63), (1 << 63) - 1

Ids = list[str] | list[int]


def normalise(ids: Any) -> Ids:
    """Ids given as strings, integers, an array or a tensor, as a list of one kind; SchemaError for anything else."""
    values = ids.tolist() if hasattr(ids, "tolist") else ids
    if isinstance(values, (str, bytes, set, frozenset, dict)) or not hasattr(values, "__len__"):
        raise SchemaError(f"ids must be a sequence of strings or integers, one per example; got {ids!r}")
    plain = [value.item() if isinstance(value, np.generic) else value for value in values]
    if all(isinstance(value, str) for value in plain):
        names.check_text("".join(plain), "ids")
        return cast("list[str]", plain)
    if all(isinstance(value, int) and not isinstance(value, bool) for value in plain):
        return _checked_integers(plain)
    kinds = sorted({type(value).__name__ for value in plain})
    raise SchemaError(f"ids must all be strings or all be integers; got {' and '.join(kinds)}: {plain[:4]!r}")


def check_key(phase: Any, step: Any) -> None:
    """SchemaError unless the phase is text and the step an integer of 64 bits."""
    if not isinstance(phase, str):
        raise SchemaError(f"phase must be text, such as 'train'; got {phase!r}")
    names.check_text(phase, "phase")
    if not isinstance(step, (int, np.integer)) or isinstance(step, bool) or not _LOWEST <= step <= _HIGHEST:
        raise SchemaError(f"step must be an integer of 64 bits; got {step!r}")


def _checked_integers(ids: list[int]) -> list[int]:
    wrong = [id_ for id_ in ids if not _LOWEST <= id_ <= _HIGHEST]
    if wrong:
        raise SchemaError(f"id {wrong[0]} does not fit int64; give such ids as text")
    return ids


def kind_of(ids: Ids) -> str:
    """`text` or `int64`."""
    return dtypes.TEXT if isinstance(ids[0], str) else "int64"


def digest(id_: str | int, phase: str = PHASE, step: int = STEP) -> bytes:
    """16 bytes that stand for a key."""
    kind, text = ("s", str(id_)) if isinstance(id_, str) else ("i", str(int(id_)))
    return hashlib.blake2b(f"{kind}{len(text)} {text}{len(phase)} {phase}{int(step)}".encode(), digest_size=16).digest()


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
        self._sorted = np.empty((0, 2), np.uint64)  # digests as two integers each, sorted by the first
        self._recent: set[bytes] = set()

    def add(self, digests: Iterable[bytes]) -> None:
        """Add keys; those that are there already are not counted twice."""
        self._recent.update(digests)
        if len(self._recent) >= _MERGE_AT:
            self._merge()

    def has(self, key: bytes) -> bool:
        """Whether the digest is held."""
        if key in self._recent:
            return True
        first, second = np.frombuffer(key, np.uint64)
        start, stop = np.searchsorted(self._sorted[:, 0], first, "left"), np.searchsorted(self._sorted[:, 0], first, "right")
        return bool((self._sorted[start:stop, 1] == second).any())

    def digests(self) -> Array:
        """All of them, as two 64-bit integers each; [n, 2], sorted."""
        if self._recent:
            self._merge()
        return self._sorted

    def _merge(self) -> None:
        recent = np.frombuffer(b"".join(self._recent), np.uint64).reshape(-1, 2)
        self._sorted, self._recent = np.unique(np.concatenate([self._sorted, recent]), axis=0), set()

    def __contains__(self, key: str | int | tuple[str | int, str, int]) -> bool:
        return self.has(digest(*key) if isinstance(key, tuple) else digest(key))

    def __len__(self) -> int:
        return len(self.digests()) if len(self._sorted) else len(self._recent)


def digests(ids: Sequence[str] | Sequence[int], phase: str, step: int) -> list[bytes]:
    """One digest per id."""
    return [digest(id_, phase, step) for id_ in ids]
