"""What a run holds already, for a writer that resumes it: keys, and in which columns each has values."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from . import keys, names
from .dtypes import Array
from .index import Index
from .keys import KeySet
from .part_reader import PartReader
from .part_state import hide_from, read_parts
from .places import Place
from .schema import ColumnSchema
from .shard_cache import ShardCache


class Held:
    """Keys by the columns they were written with. `x in held` takes an id or a whole (id, phase, step)."""

    def __init__(self) -> None:
        self._groups: dict[frozenset[str], KeySet] = {}

    def add(self, columns: Iterable[str], digests: Iterable[bytes]) -> None:
        """Add keys that have these columns, bookkeeping apart."""
        own = frozenset(name for name in columns if not names.is_bookkeeping(name))
        self._groups.setdefault(own, KeySet()).add(digests)

    def columns(self, digest: bytes) -> frozenset[str]:
        """The columns a key has values in; none for a key that is not held."""
        return frozenset[str]().union(*(columns for columns, held in self._groups.items() if held.has(digest)))

    def has(self, digest: bytes) -> bool:
        """Whether a key is held, in whatever columns."""
        return any(held.has(digest) for held in self._groups.values())

    def __contains__(self, key: str | int | tuple[str | int, str, int]) -> bool:
        return any(key in held for held in self._groups.values())

    def __len__(self) -> int:
        if len(self._groups) == 1:
            return len(next(iter(self._groups.values())))
        found = [held.digests() for held in self._groups.values()]
        return len(np.unique(np.concatenate(found), axis=0)) if found else 0


@dataclass(frozen=True)
class Holdings:
    """What a run held when it was opened for writing: keys, the kind of its ids, the schemas of its columns.

    `steps` is the last training step that each rank has a value of, by column of the step table; `last_step` that of anything.
    """

    held: Held = field(default_factory=Held)
    id_kind: str | None = None
    columns: dict[str, ColumnSchema] = field(default_factory=dict)
    steps: dict[int, dict[str, int]] = field(default_factory=dict)
    last_step: int = -1


def holdings(place: Place, run: str, session: str = "", from_step: int | None = None) -> Holdings:
    """Everything committed so far, by all parts, but for what this session supersedes of others."""
    held, columns, steps = Held(), dict[str, ColumnSchema](), dict[int, dict[str, int]]()
    cache, kind, latest = ShardCache(place, run, verify=True), None, -1
    for part in read_parts(place, run):
        if from_step is not None and part.document.session != session:
            hide_from(part, [from_step])
        columns.update(part.columns)
        reader = PartReader(part, cache)
        latest = max(latest, reader.last_step())
        if part.key_table == "step":
            last = steps.setdefault(part.document.rank, {})
            last.update({name: max([last.get(name, 0), *reader.keys()[2]]) for name in part.columns})
        else:
            held.add(part.columns, map(keys.digest, *reader.keys()))
            kind = reader.id_kind
    return Holdings(held, kind, columns, steps, latest)


class Lengths:
    """How many rows the examples of a run have in its ragged tables."""

    def __init__(self, place: Place, run: str) -> None:
        cache = ShardCache(place, run, verify=True)
        self._index = Index([PartReader(part, cache) for part in read_parts(place, run) if part.key_table == "example"])
        every = zip(*(column.tolist() for column in self._index.keys), strict=True)
        self._numbers = {keys.digest(*key): number for number, key in enumerate(every)}
        self._lengths: dict[str, Array] = {}

    def knows(self, digests: Iterable[bytes]) -> bool:
        """Whether all of these keys were in the run when it was read."""
        return all(digest in self._numbers for digest in digests)

    def of(self, table: str, digests: Iterable[bytes]) -> Array:
        """Rows of each of these examples; -1 where the run has none recorded."""
        if table not in self._lengths:
            self._lengths[table] = self._index.lengths(table)
        found: Array = self._lengths[table][[self._numbers[digest] for digest in digests]]
        return found
