"""Mending the shards of one part: damaged chunks become fill values, and the examples they held rows of are given up."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from . import dtypes
from .commits import ShardRecord
from .dtypes import Array
from .errors import DamagedError
from .part_reader import ArrayReader, PartReader
from .part_state import PartState
from .places import Place
from .schema import ArraySchema
from .shard_cache import ShardCache
from .shards import Shard, encode


@dataclass(frozen=True)
class Wound:
    """A shard that is not what was committed: of which array, its number and path, and its damaged chunks (none: its index is)."""

    array: ArraySchema
    number: int
    path: str
    chunks: tuple[int, ...]


def wounds(place: Place, part: PartState) -> list[Wound]:
    """Every shard of a part that is not what was committed, in the order in which they can be mended.

    What tells which examples are concerned comes first: ids, then the example table, and the ends of texts before their bytes.
    """
    columns = sorted(part.columns.values(), key=lambda column: (column.name != "example/id", column.table != "example"))
    arrays = [role for column in columns for role in sorted(column.arrays.values(), key=lambda role: role.name)]
    reader = PartReader(part, ShardCache(place, verify=True))
    return [wound for array in arrays for wound in _wounds(place, reader.array(array), array)]


class Mending:
    """Mends the shards of a part, one after another.

    Args:
        keep: copies an object aside before it is replaced.
    """

    def __init__(self, place: Place, part: PartState, keep: Callable[[str], None]) -> None:
        self._place, self._part, self._keep = place, part, keep
        self.shards: dict[str, dict[int, ShardRecord]] = {}
        self.withdrawn: set[int] = set()
        self.nameless: set[int] = set()  # those whose ids are damaged themselves

    def mend(self, wound: Wound) -> None:
        """Replace a shard by what is left of it, and withdraw the examples of the rest."""
        reader = PartReader(self._part, ShardCache(self._place, verify=True))
        array = reader.array(wound.array)
        shard = _as_far_as_there(self._place, array, wound.number, wound.path)
        first, last = array.rows_in(wound.number)
        for chunk in wound.chunks:
            start, stop = shard.rows_of(chunk)
            examples = reader.examples_of(wound.array.path, first + start, first + stop).tolist()
            self.withdrawn.update(examples)
            self.nameless.update(examples if f"{wound.array.path}/".startswith("example/id/") else ())
        encoded = encode(_salvaged_rows(shard, array, last - first), array.geometry, dtypes.fill_value(wound.array.dtype))
        self._keep(wound.path)
        self._place.replace(wound.path, encoded.buffers)
        record = ShardRecord(last - first, encoded.crcs)
        self.shards.setdefault(wound.array.path, {})[wound.number] = record
        self._part.arrays[wound.array.path].apply(array.rows, {wound.number: record})
        self._part.withdrawn = spans({*self.withdrawn, *_numbers(self._part.withdrawn)})


def spans(numbers: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Numbers as spans [first, count]."""
    ordered = np.array(sorted(numbers), np.int64)
    if not len(ordered):
        return ()
    runs = np.split(ordered, np.flatnonzero(np.diff(ordered) > 1) + 1)
    return tuple((int(run[0]), len(run)) for run in runs)


def _numbers(withdrawn: Iterable[tuple[int, int]]) -> list[int]:
    return [number for first, count in withdrawn for number in range(first, first + count)]


def _wounds(place: Place, array: ArrayReader, schema: ArraySchema) -> Iterable[Wound]:
    for number, path, _ in array.shards():
        shard = _as_far_as_there(place, array, number, path)
        chunks = shard.damaged()
        if chunks or not _is_whole(place, array, number, path, shard):
            yield Wound(schema, number, path, tuple(chunks))


def _is_whole(place: Place, array: ArrayReader, number: int, path: str, shard: Shard) -> bool:
    """Whether all but the rows is right too; of a tail that has grown since it was committed only its length is looked at."""
    try:
        array.check_size(number)
    except DamagedError:
        return False
    return place.size(path) != array.file_bytes(number) or shard.structure_is_right()


def _as_far_as_there(place: Place, array: ArrayReader, number: int, path: str) -> Shard:
    """A shard out of whatever its file holds: nothing, too little, or other bytes."""
    needed = array.file_bytes(number)
    content = place.read(path) if place.exists(path) else b""
    return array.shard_of(number, content[:needed].ljust(needed, b"\0"))


def _salvaged_rows(shard: Shard, array: ArrayReader, rows: int) -> Array:
    """The shard's rows, those of damaged chunks as fill values."""
    found = array.filled(rows)
    bad = {shard.rows_of(chunk) for chunk in shard.damaged()}
    every = range(0, rows, array.geometry.chunk_rows)
    for start in every:
        stop = min(start + array.geometry.chunk_rows, rows)
        if (start, stop) not in bad:
            found[start:stop] = shard.slice(start, stop)
    return found
