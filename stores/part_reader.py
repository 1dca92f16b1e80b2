"""Committed rows of one part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from . import codecs, dtypes
from .dtypes import TEXT, Array
from .errors import DamagedError
from .geometry import Geometry
from .part_state import ArrayState, PartState
from .parts import shard_path
from .schema import ArraySchema, ColumnSchema
from .shard_cache import ShardCache, file_bytes
from .shards import Shard


class ArrayReader:
    """Rows of one array of a part, in the stored dtype."""

    def __init__(self, part: PartReader, schema: ArraySchema) -> None:
        self._part = part
        self._schema = schema
        self._state = part.state.arrays.get(schema.path, ArrayState())
        self.geometry = Geometry(schema.grid, schema.shape, dtypes.stored(schema.dtype), schema.codec)
        # Rows that are read at once: all of a shard where they are mapped, a chunk's where they have to be expanded first.
        self._stretch = self.geometry.shard_rows if schema.codec == codecs.NONE else self.geometry.chunk_rows

    @property
    def rows(self) -> int:
        """Committed rows."""
        return self._state.rows

    @property
    def nbytes(self) -> int:
        """Bytes of those rows, before compression."""
        return self.rows * self.geometry.chunk_row_bytes * self.geometry.pieces

    @property
    def stored_bytes(self) -> int:
        """Bytes of the files they are in."""
        return sum(file_bytes(record, self.geometry) for record in self._state.shards.values())

    def slice(self, start: int, stop: int) -> Array:
        """Rows [start, stop): a read-only view within one chunk, a copy otherwise."""
        if stop <= start:
            return np.empty((0, *self._schema.shape), self.geometry.dtype)
        if start // self._stretch == (stop - 1) // self._stretch:
            return self._read(start, stop)
        out = np.empty((stop - start, *self._schema.shape), self.geometry.dtype)
        for first in range(start - start % self._stretch, stop, self._stretch):
            a, b = max(start, first), min(stop, first + self._stretch)
            out[a - start : b - start] = self._read(a, b)
        return out

    def gather(self, rows: Array) -> Array:
        """Rows by number, in any order."""
        stretch = rows // self._stretch
        touched = _distinct(stretch)
        if len(touched) == 1:
            return self._gather_from(rows)
        out: Array = np.empty((len(rows), *self._schema.shape), self.geometry.dtype)
        for number in touched:
            here = np.flatnonzero(stretch == number)
            out[here] = self._gather_from(rows[here])
        return out

    def shards(self) -> Iterator[tuple[int, str, bool]]:
        """(number, path, sealed) of each shard."""
        for number, record in sorted(self._state.shards.items()):
            yield number, self._path(number), self._sealed(record.rows)

    def open(self, number: int) -> Shard:
        """One shard, unchecked."""
        record = self._state.shards.get(number)
        if record is None:
            raise DamagedError(f"{self._path(number)}: no commit record names this shard")
        return self._part.cache.get(self._path(number), self.geometry, record, sealed=self._sealed(record.rows))

    def rows_in(self, number: int) -> tuple[int, int]:
        """First and one past the last committed row of a shard."""
        first = number * self.geometry.shard_rows
        return first, first + self._state.shards[number].rows

    def _read(self, start: int, stop: int) -> Array:
        """Rows [start, stop) of one stretch."""
        number = start // self.geometry.shard_rows
        first = number * self.geometry.shard_rows
        shard = self._checked_open(number, start - first, stop - first)
        self._check(number, shard, shard.chunks_of(start - first, stop - first))
        return shard.slice(start - first, stop - first)

    def _gather_from(self, rows: Array) -> Array:
        """Rows of one stretch."""
        number = int(rows[0]) // self.geometry.shard_rows
        within = rows - number * self.geometry.shard_rows
        shard = self._checked_open(number, int(within.min()), int(within.max()) + 1)
        chunks = _distinct(within // self.geometry.chunk_rows) * self.geometry.pieces
        pieces = np.arange(self.geometry.pieces)
        self._check(number, shard, (chunks[:, None] + pieces).reshape(-1))
        return shard.gather(within)

    def _checked_open(self, number: int, start: int, stop: int) -> Shard:
        first = number * self.geometry.shard_rows
        try:
            return self.open(number)
        except DamagedError as error:
            raise DamagedError(f"{error}{self._part.examples_in(self._schema.path, first + start, first + stop)}") from None

    def _check(self, number: int, shard: Shard, chunks: Any) -> None:
        for chunk in shard.damaged(chunks):
            first = number * self.geometry.shard_rows
            start, stop = shard.rows_of(chunk)
            affected = self._part.examples_in(self._schema.path, first + start, first + stop)
            raise DamagedError(f"{self._path(number)}: chunk {chunk} does not hold the bytes that were committed{affected}")

    def _sealed(self, rows: int) -> bool:
        return self._part.state.closed or rows == self.geometry.shard_rows

    def _path(self, number: int) -> str:
        return shard_path(self._part.state.name, self._schema.path, number, len(self._schema.shape) + 1)


def _distinct(numbers: Array) -> Array:
    """The distinct values of small numbers from 0 on, sorted; without sorting all of them."""
    seen = np.zeros(int(numbers.max()) + 1, bool)
    seen[numbers] = True
    return np.flatnonzero(seen)


def _values(column: ColumnSchema, arrays: Mapping[str, Array]) -> Array:
    """Rows of a column in its logical dtype, from those of its arrays by role."""
    if column.quantized is None:
        return dtypes.from_stored(arrays["values"], column.dtype)
    return column.quantized.decode(arrays, column.dtype)


class PartReader:
    """All columns of one part."""

    def __init__(self, state: PartState, cache: ShardCache) -> None:
        self.state = state
        self.cache = cache
        self._arrays: dict[str, ArrayReader] = {}
        self._bounds: dict[str, tuple[Array, Array]] = {}

    def array(self, schema: ArraySchema) -> ArrayReader:
        """One array of one of the part's columns."""
        return self._arrays.setdefault(schema.path, ArrayReader(self, schema))

    def slice(self, column: ColumnSchema, start: int, stop: int) -> Array:
        """Rows [start, stop) of a column in its logical dtype; text as an object array of strings."""
        if column.dtype == TEXT:
            return self._text(column, start, stop)
        return _values(column, {role: self.array(array).slice(start, stop) for role, array in column.arrays.items()})

    def gather(self, column: ColumnSchema, rows: Array) -> Array:
        """Rows of a column by number, in any order."""
        if column.dtype == TEXT:
            texts: Array = self._text(column, int(rows.min()), int(rows.max()) + 1)[rows - rows.min()]
            return texts
        return _values(column, {role: self.array(array).gather(rows) for role, array in column.arrays.items()})

    def keys(self) -> tuple[list[Any], list[str], list[int]]:
        """ids, phases and steps of all examples."""
        names = ("example/id", "example/phase", "example/step")
        ids, phases, steps = (self.slice(self.state.columns[name], 0, self.state.examples).tolist() for name in names)
        return ids, phases, steps

    def bounds(self, table: str) -> tuple[Array, Array]:
        """First row and number of rows of every example in a ragged table; int64 each."""
        if table not in self._bounds:
            columns = (self.state.columns[f"example/{kind}.{table}"] for kind in ("start", "length"))
            start, length = (self.slice(column, 0, self.state.examples) for column in columns)
            self._bounds[table] = start, length
        return self._bounds[table]

    def examples_in(self, path: str, start: int, stop: int) -> str:
        """Which examples own rows of an array, for a message; empty where that cannot be told."""
        found = self.examples_of(path, start, stop)
        if found is None:
            return f" (rows {start} to {stop - 1} of this array)"
        first, last = found
        ids = self.slice(self.state.columns["example/id"], first, last + 1)
        return f" (examples {ids[0]!r} to {ids[-1]!r})"

    def examples_of(self, path: str, start: int, stop: int) -> tuple[int, int] | None:
        """First and last example (by number in the part) that own rows [start, stop) of the array at `path`."""
        column = self._owner[path]
        if column.table == "example" or path.endswith("/utf8"):
            return None  # the example table itself is damaged, ids perhaps included; and bytes of text are not rows
        begin, length = self.bounds(column.table)
        touched = np.flatnonzero((begin < stop) & (begin + length > start))
        return (int(touched[0]), int(touched[-1])) if len(touched) else None

    @cached_property
    def _owner(self) -> dict[str, ColumnSchema]:
        return {array.path: column for column in self.state.columns.values() for array in column.arrays.values()}

    def _text(self, column: ColumnSchema, start: int, stop: int) -> Array:
        ends = self.array(column.arrays["end"]).slice(max(start - 1, 0), stop)
        if start == 0:
            ends = np.concatenate([np.zeros(1, np.int64), ends])
        texts = np.empty(stop - start, object)
        if len(texts):
            utf8: bytes = self.array(column.arrays["utf8"]).slice(int(ends[0]), int(ends[-1])).tobytes()
            edges = (ends - ends[0]).tolist()
            texts[:] = [utf8[a:b].decode() for a, b in pairwise(edges)]
        return texts
