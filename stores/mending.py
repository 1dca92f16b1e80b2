"""Mending the shards of one part: damaged chunks become fill values, and the examples they held rows of are given up."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from . import codecs, dtypes
from .commits import ShardRecord
from .dtypes import Array
from .errors import DamagedError
from .names import KEY_TABLES
from .part_reader import ArrayReader, PartReader
from .part_state import PartState
from .places import Place
from .schema import ArraySchema
from .shard_cache import ShardCache
from .shards import Shard, encode

_NAMING = ("example/id", "step/step")  # the columns that tell users which row it is


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
    columns = sorted(part.columns.values(), key=lambda column: (column.name not in _NAMING, column.table not in KEY_TABLES))
    arrays = [role for column in columns for role in sorted(column.arrays.values(), key=lambda role: role.name)]
    reader = PartReader(part, ShardCache(place, part.document.run, verify=True))
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
        reader = PartReader(self._part, ShardCache(self._place, self._part.document.run, verify=True))
        array = reader.array(wound.array)
        shard = _as_far_as_there(self._place, array, wound.number, wound.path)
        first, last = array.rows_in(wound.number)
        for chunk in wound.chunks:
            start, stop = array.geometry.rows_of(chunk, last - first)
            examples = reader.examples_of(wound.array.path, first + start, first + stop).tolist()
            self.withdrawn.update(examples)
            self.nameless.update(examples if f"{wound.array.path}/".startswith(tuple(f"{name}/" for name in _NAMING)) else ())
        rows = _salvaged_rows(shard, array, last - first, wound.chunks)
        encoded = encode(rows, array.geometry, dtypes.fill_value(wound.array.dtype))
        self._keep(wound.path)
        self._place.replace(wound.path, encoded.buffers)
        size = None if array.geometry.codec == codecs.NONE else encoded.nbytes
        record = ShardRecord(last - first, encoded.crcs, size)
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
        chunks = range(array.chunks_in(number)) if shard is None else shard.damaged()
        if chunks or shard is None or not _is_whole(place, array, number, path, shard):
            yield Wound(schema, number, path, tuple(chunks))


def _is_whole(place: Place, array: ArrayReader, number: int, path: str, shard: Shard) -> bool:
    """Whether all but the rows is right too; of a tail that has grown since it was committed only its length is looked at."""
    try:
        array.check_size(number)
    except DamagedError:
        return False
    return place.size(path) != array.file_bytes(number) or shard.structure_is_right()


def _as_far_as_there(place: Place, array: ArrayReader, number: int, path: str) -> Shard | None:
    """A shard out of whatever its file holds, be it too little; None where nothing can be told from that."""
    content = place.read(path) if place.exists(path) else b""
    if array.geometry.codec == codecs.NONE:
        needed = array.file_bytes(number)
        content = content[:needed].ljust(needed, b"\0")
    try:
        return array.shard_of(number, content)
    except DamagedError:
        return None


def _salvaged_rows(shard: Shard | None, array: ArrayReader, rows: int, damaged: tuple[int, ...]) -> Array:
    """The shard's rows, those of damaged chunks as fill values."""
    found = array.filled(rows)
    bad = {array.geometry.rows_of(chunk, rows) for chunk in damaged}
    for start in range(0, rows, array.geometry.chunk_rows):
        stop = min(start + array.geometry.chunk_rows, rows)
        if shard is not None and (start, stop) not in bad:
            found[start:stop] = shard.slice(start, stop)
    return found
