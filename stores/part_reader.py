"""Committed rows of one part."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from . import codecs, dtypes
from .commits import ShardRecord
from .compressed_shards import RecentChunks
from .dtypes import TEXT, Array
from .errors import DamagedError
from .geometry import Geometry
from .names import is_ragged
from .part_checks import check_bounds, check_shards
from .part_state import ArrayState, PartState
from .parts import shard_path
from .places.loaded import Loaded
from .schema import ArraySchema, ColumnSchema
from .shard_cache import ShardCache, file_bytes, shard_of
from .shards import Shard

UNASKED = 16 << 20  # bytes that are allocated before anybody has looked whether there are files for them


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
        return sum(file_bytes(record, self.geometry) for record in self._shards.values())

    def slice(self, start: int, stop: int) -> Array:
        """Rows [start, stop): a read-only view within one chunk, a copy otherwise."""
        if stop <= start:
            return np.empty((0, *self._schema.shape), self.geometry.dtype)
        if start // self._stretch == (stop - 1) // self._stretch:
            return self._read(start, stop)
        self.check_there(start, stop)
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
        for number, record in sorted(self._shards.items()):
            yield number, self._path(number), self._sealed(record.rows)

    def open(self, number: int) -> Shard:
        """One shard, unchecked."""
        record = self._shards.get(number)
        if record is None:
            raise DamagedError(f"{self._path(number)}: no commit record names this shard")
        return self._part.cache.get(self._path(number), self.geometry, record, sealed=self._sealed(record.rows))

    def shard_of(self, number: int, content: bytes) -> Shard:
        """A shard as if its file held `content`; DamagedError where that cannot be one."""
        return shard_of(Loaded(content), self.geometry, self._shards[number], RecentChunks())

    def chunks_in(self, number: int) -> int:
        """How many chunks of a shard were committed."""
        return len(self._shards[number].crcs)

    def filled(self, rows: int) -> Array:
        """Rows of the fill value."""
        return np.full((rows, *self._schema.shape), dtypes.fill_value(self._schema.dtype), self.geometry.dtype)

    def file_bytes(self, number: int) -> int:
        """The size a shard's file had when it was committed."""
        return file_bytes(self._shards[number], self.geometry)

    def check_size(self, number: int) -> None:
        """DamagedError unless a shard's file is there and large enough, or just as large where it cannot have grown."""
        record = self._shards[number]
        self._part.cache.check_size(self._path(number), self.geometry, record, sealed=self._sealed(record.rows))

    def rows_in(self, number: int) -> tuple[int, int]:
        """First and one past the last committed row of a shard."""
        first = number * self.geometry.shard_rows
        return first, first + self._shards[number].rows

    def check_there(self, start: int, stop: int) -> None:
        """DamagedError unless the files of rows [start, stop) can hold them; not asked for rows that take little memory."""
        if (stop - start) * max(self.geometry.chunk_row_bytes * self.geometry.pieces, 8) > UNASKED:
            for number in range(start // self.geometry.shard_rows, -(-stop // self.geometry.shard_rows)):
                self.check_size(number)

    @cached_property
    def _shards(self) -> dict[int, ShardRecord]:
        """Shards by number; DamagedError unless they are those of the committed rows."""
        found = self._state.shards
        check_shards(f"parts/{self._part.state.name}/{self._schema.path}", found, self.rows, self.geometry)
        return found

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
        # The tail of a part that was sealed or repaired may be replaced by a longer one: its writer need not have been gone.
        return self._part.state.kind == "closed" or rows == self.geometry.shard_rows

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
        if schema.path not in self._arrays:
            self._arrays[schema.path] = ArrayReader(self, schema)
        return self._arrays[schema.path]

    def slice(self, column: ColumnSchema, start: int, stop: int) -> Array:
        """Rows [start, stop) of a column in its logical dtype; text as an object array of strings."""
        if column.dtype == TEXT:
            return self._text(column, start, stop)
        return _values(column, {role: self.array(array).slice(start, stop) for role, array in column.arrays.items()})

    def gather(self, column: ColumnSchema, rows: Array) -> Array:
        """Rows of a column by number, in any order."""
        if column.dtype == TEXT:
            return self._texts(column, rows)
        return _values(column, {role: self.array(array).gather(rows) for role, array in column.arrays.items()})

    @cached_property
    def kept(self) -> Array:
        """Numbers of the part's examples (or training steps) that no repair has withdrawn and no rewinding superseded; int64."""
        steps = self.state.columns[f"{self.state.key_table}/step"]
        self.array(steps.arrays["values"]).check_there(0, self.state.examples)
        kept = np.ones(self.state.examples, bool)
        for first, count in self.state.withdrawn:
            kept[first : first + count] = False
        if self.state.hidden_from is not None:
            kept &= self.slice(steps, 0, self.state.examples) < self.state.hidden_from
        return np.flatnonzero(kept)

    @property
    def id_kind(self) -> str:
        """The kind of its ids."""
        return "int64" if self.state.key_table == "step" else self.state.columns["example/id"].dtype

    def keys(self) -> tuple[list[Any], list[str], list[int]]:
        """ids, phases and steps of the kept examples; a training step has its writer's rank for an id."""
        if self.state.key_table == "step":
            count = len(self.kept)
            return [self.state.document.rank] * count, [""] * count, self._of_kept(self.state.columns["step/step"]).tolist()
        names = ("example/id", "example/phase", "example/step")
        ids, phases, steps = (self._of_kept(self.state.columns[name]).tolist() for name in names)
        return ids, phases, steps

    def last_step(self) -> int:
        """The latest training step of the kept examples, or of the steps themselves; -1 without any."""
        return int(self._of_kept(self.state.columns[f"{self.state.key_table}/step"]).max(initial=-1))

    def bounds(self, table: str) -> tuple[Array, Array]:
        """First row and number of rows of every kept example in a ragged table; int64 each."""
        if table not in self._bounds:
            columns = (self.state.columns[f"example/{kind}.{table}"] for kind in ("start", "length"))
            start, length = map(self._of_kept, columns)
            check_bounds(f"parts/{self.state.name}", table, start, length, self.state.rows[table])
            self._bounds[table] = start, length
        return self._bounds[table]

    def examples_in(self, path: str, start: int, stop: int) -> str:
        """Which examples own rows of an array, for a message."""
        found = self.examples_of(path, start, stop)
        if not len(found):
            return f" (rows {start} to {stop - 1} of this array)"
        what = f"{self.state.key_table}s"
        ids = None if self._owner[path][0].name == self._named_by else self.ids_of(found)
        if ids is None:
            return f" ({what} number {found[0]} to {found[-1]} of the part)"
        return f" ({what} {ids[0]!r} to {ids[1]!r})"

    def ids_of(self, examples: Array) -> tuple[str | int, str | int] | None:
        """The ids of the first and the last of some of the part's examples; None where they are damaged too."""
        try:
            first, last = self.gather(self.state.columns[self._named_by], examples[[0, -1]]).tolist()
        except DamagedError:
            return None
        return first, last

    def examples_of(self, path: str, start: int, stop: int) -> Array:
        """The kept examples (by number in the part) that rows [start, stop) of the array at `path` belong to; int64, sorted.

        None where what would tell is damaged itself.
        """
        column, role = self._owner[path]
        try:
            start, stop = self._rows_of_text(column, role, start, stop)
            begin, length = self.bounds(column.table) if is_ragged(column.table) else (self.kept, 1)
        except DamagedError:
            return self.kept[:0]
        return self.kept[(begin < stop) & (begin + length > start) & (np.asarray(length) > 0)]

    @property
    def _named_by(self) -> str:
        """The column that tells users which example, or which training step, a row is."""
        return "step/step" if self.state.key_table == "step" else "example/id"

    def _rows_of_text(self, column: ColumnSchema, role: str, start: int, stop: int) -> tuple[int, int]:
        """The rows of a column that depend on elements [start, stop) of one of its arrays."""
        if role == "end":
            return start, stop + 1  # a text begins where the one before it ends
        if role != "utf8":
            return start, stop
        array = self.array(column.arrays["end"])
        ends = array.slice(0, array.rows)
        begins = np.concatenate([np.zeros(1, np.int64), ends])[: len(ends)]
        rows = np.flatnonzero((begins < stop) & (ends > start))
        return (int(rows[0]), int(rows[-1]) + 1) if len(rows) else (0, 0)

    def _of_kept(self, column: ColumnSchema) -> Array:
        """A column of the example table, without withdrawn examples."""
        if len(self.kept) == self.state.examples:
            return self.slice(column, 0, self.state.examples)
        return self.gather(column, self.kept) if len(self.kept) else self.slice(column, 0, 0)

    @cached_property
    def _owner(self) -> dict[str, tuple[ColumnSchema, str]]:
        columns = self.state.columns.values()
        return {array.path: (column, role) for column in columns for role, array in column.arrays.items()}

    def _texts(self, column: ColumnSchema, rows: Array) -> Array:
        """Texts by number; nothing between them is decoded."""
        ends = self.array(column.arrays["end"])
        stop, start = ends.gather(rows), np.where(rows > 0, ends.gather(np.maximum(rows - 1, 0)), 0)
        self._check_ends(column, start, stop)
        first = int(start.min())
        utf8: bytes = self.array(column.arrays["utf8"]).slice(first, int(stop.max())).tobytes()
        texts = np.empty(len(rows), object)
        texts[:] = self._decoded(column, utf8, zip((start - first).tolist(), (stop - first).tolist(), strict=True))
        return texts

    def _text(self, column: ColumnSchema, start: int, stop: int) -> Array:
        ends = self.array(column.arrays["end"]).slice(max(start - 1, 0), stop)
        if start == 0:
            ends = np.concatenate([np.zeros(1, np.int64), ends])
        texts = np.empty(stop - start, object)
        if len(texts):
            self._check_ends(column, ends[:-1], ends[1:])
            utf8: bytes = self.array(column.arrays["utf8"]).slice(int(ends[0]), int(ends[-1])).tobytes()
            edges = (ends - ends[0]).tolist()
            texts[:] = self._decoded(column, utf8, pairwise(edges))
        return texts

    def _check_ends(self, column: ColumnSchema, start: Array, stop: Array) -> None:
        if start.min() < 0 or (start > stop).any() or stop.max() > self.array(column.arrays["utf8"]).rows:
            raise DamagedError(f"parts/{self.state.name}/{column.arrays['end'].path}: texts end where no text can")

    def _decoded(self, column: ColumnSchema, utf8: bytes, edges: Iterable[tuple[int, int]]) -> list[str]:
        try:
            return [utf8[a:b].decode() for a, b in edges]
        except UnicodeDecodeError as error:
            path = f"parts/{self.state.name}/{column.arrays['utf8'].path}"
            raise DamagedError(f"{path}: not UTF-8 ({error.reason})") from None
