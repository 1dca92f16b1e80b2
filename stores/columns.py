"""Columns as users see them: one value per row of a table, whichever parts hold it."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np

from . import dtypes, names
from .dtypes import TEXT, Array
from .errors import MissingExampleError, SchemaError, UnknownColumnError
from .index import Index, Places
from .part_reader import PartReader
from .quantize import Quantization
from .schema import ColumnSchema, Json

if TYPE_CHECKING:
    import dask.array
    import pandas as pd
    import torch
    import xarray


class Column:
    """Values on the rows of a table. `column[i]` is example i: [T_i, *feature], or one row in the example table."""

    def __init__(self, name: str, parts: list[PartReader], index: Index) -> None:
        self.name = name
        self._parts = parts
        self._index = index
        self._holders = [part for part in parts if name in part.state.columns]

    @property
    def dtype(self) -> np.dtype[Any]:
        """What values are returned as: bfloat16 as ml_dtypes.bfloat16, text as object."""
        return np.dtype(object) if self._schema.dtype == TEXT else dtypes.logical(self._schema.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, *feature)."""
        return (len(self), *self._schema.shape)

    @property
    def table(self) -> str:
        """The table whose rows it has values on."""
        return self._schema.table

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes of `rows()`."""
        return (self._schema.table.partition(".")[0], *self._schema.axes)

    @property
    def nbytes(self) -> int:
        """Bytes of all values as they are kept, before compression."""
        return sum(part.array(role).nbytes for part in self._holders for role in self._roles(part))

    @property
    def stored_bytes(self) -> int:
        """Bytes of the files they are in, checksums and indices included."""
        return sum(part.array(role).stored_bytes for part in self._holders for role in self._roles(part))

    @property
    def compress(self) -> str:
        """The codec of the values, or several with commas if parts differ; `none` for none."""
        return ", ".join(dict.fromkeys(self._roles(part)[0].codec for part in self._holders))

    @property
    def quantization(self) -> Quantization | None:
        """What quantising the column has cost, over all parts that hold it so; None for a column that is kept exactly."""
        found = [part.state.quantization[self.name] for part in self._holders if self.name in part.state.quantization]
        return sum(found, Quantization()) if found else None

    @property
    def site(self) -> Json | None:
        """The recorded site this column comes from, if it is one."""
        return self._schema.site

    @property
    def attributes(self) -> Json:
        """What the writer said of the column."""
        return self._schema.attributes

    @property
    def present(self) -> Array:
        """Per example of the run whether the column has a value; bool."""
        return self._places.part >= 0

    @property
    def lengths(self) -> Array:
        """Rows of each example of the run, -1 for one that has no value; int64."""
        return np.where(self.present, self._places.length, -1)

    @property
    def paths(self) -> list[str]:
        """The Zarr arrays of the values (for text of the UTF-8 bytes, quantised of the codes), one per part, relative to the run's
        root."""
        return [f"parts/{part.state.name}/{self._roles(part)[0].path}" for part in self._holders]

    @property
    def role_paths(self) -> dict[str, list[str]]:
        """The Zarr arrays of every role."""
        found: dict[str, list[str]] = {}
        for part in self._holders:
            for role in self._roles(part):
                found.setdefault(role.name, []).append(f"parts/{part.state.name}/{role.path}")
        return found

    @property
    def identity(self) -> str:
        """What tells these values from all others under the same name: the last records of the parts that hold them."""
        states = [part.state for part in self._holders]
        last = "".join(f"{part.name} {part.last} {'' if part.hidden_from is None else part.hidden_from} " for part in states)
        return hashlib.sha256(last.encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, example: int) -> Any: ...
    @overload
    def __getitem__(self, example: slice) -> list[Any]: ...
    def __getitem__(self, example: int | slice) -> Any:
        if isinstance(example, slice):
            return [self[number] for number in range(*example.indices(len(self._places.part)))]
        part, start, length = self._place(example)
        rows = self._slice(part, start, start + length)
        return rows if names.is_ragged(self._schema.table) else rows[0]

    def within(self, example: int, first: int, last: int) -> Array:
        """Rows [first, last) of an example, without reading the rest of it."""
        part, start, length = self._place(example)
        if not 0 <= first <= last <= length:
            raise IndexError(f"rows {first} to {last} of an example that has {length}")
        return self._slice(part, start + first, start + last)

    def rows(self, selection: Any = slice(None)) -> Any:
        """Rows by number, over all examples in order: an integer array, a boolean mask or a slice give [n, *feature], one integer
        gives [*feature]."""
        if isinstance(selection, (int, np.integer)) and not isinstance(selection, bool):
            return self._gather(_in_range(np.array([selection]), len(self)))[0]
        if isinstance(selection, slice):
            start, stop, step = selection.indices(len(self))
            if step == 1:
                return self._contiguous(start, max(stop, start))
            selection = np.arange(start, stop, step)
        return self._gather(_in_range(_numbers(selection, len(self)), len(self)))

    def blocks(self, rows: int = 65536) -> Iterator[Array]:
        """All rows in order, at most `rows` at a time; no copy where a block lies within one chunk."""
        for start in range(0, len(self), rows):
            yield self._contiguous(start, min(start + rows, len(self)))

    def several(self, slices: Sequence[slice]) -> list[Array]:
        """`rows` of several slices; those that have to be fetched come at the same time."""
        return self._holders[0].cache.each(self.rows, slices)

    def edges(self, unit: Literal["chunk", "shard"]) -> Array:
        """First rows of the stretches that lie in one chunk (or shard) of one part each, then the number of rows; int64."""
        first, part, begin = self._segments
        size = self._unit_rows(unit)[part]
        before = begin // size
        count = (begin + np.diff(first, append=len(self)) - 1) // size - before + 1
        segment = np.repeat(np.arange(len(first)), count)
        number = np.arange(len(segment)) - np.repeat(np.cumsum(count) - count, count) + before[segment]
        starts = np.maximum(number * size[segment], begin[segment]) - begin[segment] + first[segment]
        return np.append(starts, len(self))

    def to_torch(self) -> torch.Tensor:
        """All rows as one tensor in memory; bfloat16 as torch.bfloat16."""
        if self._schema.dtype == TEXT:
            raise SchemaError(f"column {self.name!r} is text, which torch has no dtype for")
        return dtypes.to_torch(self.rows(), self._schema.dtype)

    def to_dask(self) -> dask.array.Array:
        """All rows as a dask array, read where they are computed; its blocks are whole shards. Needs the extra `dask`."""
        from .lazy_arrays import to_dask

        return to_dask(self)

    def to_xarray(self) -> xarray.DataArray:
        """The same as a DataArray with the column's axes; `example` numbers each row's example. Needs the extra `xarray`."""
        from .lazy_arrays import to_xarray

        return to_xarray(self)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        rows: Array = self.rows()
        return rows if dtype is None else rows.astype(dtype)

    def __repr__(self) -> str:
        return f"<Column {self.name} {self._schema.dtype} {self.shape}>"

    def _roles(self, part: PartReader) -> list[Any]:
        return list(part.state.columns[self.name].arrays.values())

    @cached_property
    def _schema(self) -> ColumnSchema:
        return _agreed([part.state.columns[self.name] for part in self._holders])

    @cached_property
    def _places(self) -> Places:
        _agreed([part.state.columns[self.name] for part in self._holders])
        return self._index.places(self.name)

    @cached_property
    def _count(self) -> int:
        return int(self._places.length[self.present].sum())

    def _unit_rows(self, unit: Literal["chunk", "shard"]) -> Array:
        """Rows of a chunk, or a shard, in each part of the run; 1 where the part does not hold the column."""
        rows = np.ones(len(self._parts), np.int64)
        for number, part in enumerate(self._parts):
            if part in self._holders:
                arrays = self._column_of(number).arrays
                grid = arrays.get("end", next(iter(arrays.values()))).grid  # every other array has one row per row of the column
                rows[number] = (grid.chunk if unit == "chunk" else grid.shard)[0]
        return rows

    @cached_property
    def _segments(self) -> tuple[Array, Array, Array]:
        """Runs of rows that lie together: (first row of the column, part, first row in the part), sorted."""
        chosen = self.present & (self._places.length > 0)
        part, start, length = self._places.part[chosen], self._places.start[chosen], self._places.length[chosen]
        first = np.cumsum(length) - length
        breaks = np.ones(len(part), bool)
        breaks[1:] = (part[1:] != part[:-1]) | (start[1:] != start[:-1] + length[:-1])
        return first[breaks], part[breaks], start[breaks]

    def _contiguous(self, start: int, stop: int) -> Array:
        pieces = [self._slice(part, a, b) for part, a, b in self._spans(start, stop)]
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else np.empty((0, *self._schema.shape), self.dtype)

    def _spans(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        first, part, begin = self._segments
        for at in range(bisect_right(first, start) - 1, len(first)) if stop > start else ():
            end = first.item(at + 1) if at + 1 < len(first) else len(self)
            if first.item(at) >= stop:
                return
            a, b = max(start, first.item(at)), min(stop, end)
            offset = begin.item(at) - first.item(at)
            yield part.item(at), a + offset, b + offset

    def _gather(self, rows: Array) -> Array:
        first, part, begin = self._segments
        if not len(rows):
            return np.empty((0, *self._schema.shape), self.dtype)
        at = np.searchsorted(first, rows, "right") - 1 if len(first) > 1 else np.zeros(len(rows), np.int64)
        within = rows - first[at] + begin[at]
        owners = np.unique(part[at])
        if len(owners) == 1:
            return self._of(int(owners[0])).gather(self._column_of(int(owners[0])), within)
        out = np.empty((len(rows), *self._schema.shape), self.dtype)
        for owner in map(int, owners):
            here = np.flatnonzero(part[at] == owner)
            out[here] = self._of(owner).gather(self._column_of(owner), within[here])
        return out

    def _slice(self, part: int, start: int, stop: int) -> Array:
        return self._of(part).slice(self._column_of(part), start, stop)

    def _of(self, part: int) -> PartReader:
        return self._parts[part]

    def _column_of(self, part: int) -> ColumnSchema:
        return self._parts[part].state.columns[self.name]

    def _place(self, example: int) -> tuple[int, int, int]:
        """Part, first row and number of rows of an example."""
        number = self._number(example)
        part, start, length = (int(values[number]) for values in (self._places.part, self._places.start, self._places.length))
        if part < 0:
            raise MissingExampleError(f"column {self.name!r} has no value for example {self._index.id(number)!r}")
        return part, start, length

    def _number(self, example: int) -> int:
        count = len(self._places.part)
        if not -count <= example < count:
            raise IndexError(f"example {example} of a run that has {count}")
        return example % count


class Table(Mapping[str, Column]):
    """A row space and its columns, by short name."""

    def __init__(self, name: str, columns: dict[str, Column], index: Index) -> None:
        self.name = name
        self._columns = columns
        self._index = index

    @property
    def rows(self) -> int:
        """Rows of all examples."""
        return int(np.maximum(self.lengths, 0).sum())

    @property
    def lengths(self) -> Array:
        """Rows of each example of the run, -1 for one that has none recorded; int64."""
        return self._index.lengths(self.name) if names.is_ragged(self.name) else np.ones(len(self._index), np.int64)

    def to_pandas(self) -> pd.DataFrame:
        """The columns of one value per row, on all rows of the table; `example` numbers the example a row belongs to."""
        import pandas as pd

        small = {name: column for name, column in self._columns.items() if not column.shape[1:] and _shown(name, column)}
        owner = np.repeat(np.arange(len(self._index)), np.maximum(self.lengths, 0))
        frame = pd.DataFrame({name: _filled(column, self) for name, column in small.items()})
        if names.is_ragged(self.name):
            frame.insert(0, "example", owner, allow_duplicates=True)
        return frame

    def __getitem__(self, name: str) -> Column:
        if name not in self._columns:
            raise UnknownColumnError(f"table {self.name!r} has no column {name!r}; it has {', '.join(sorted(self._columns))}")
        return self._columns[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)

    def __repr__(self) -> str:
        return f"<Table {self.name}: {self.rows} rows, {len(self._columns)} columns>"


def _shown(name: str, column: Column) -> bool:
    """Whether a column is the user's rather than the run's own."""
    site = column.site or {}
    own = str(site.get("reduce")).rpartition("|")[2] in ("scale", "identity") or site.get("port") == "dropout"
    return not name.startswith(("start.", "length.")) and not own


def _filled(column: Column, table: Table) -> Any:
    """The column on every row of its table; None where an example has no value."""
    import pandas as pd

    if column.present.all():
        return column.rows()
    values = np.full(table.rows, None, object)
    values[np.repeat(column.present, np.maximum(table.lengths, 0))] = column.rows()
    return pd.Series(values, dtype=object)


def _agreed(schemas: list[ColumnSchema]) -> ColumnSchema:
    first = schemas[0]
    for other in schemas[1:]:
        if (other.dtype, other.shape) != (first.dtype, first.shape):
            raise SchemaError(
                f"column {first.name!r} is {first.dtype} {first.shape} in one part and {other.dtype} {other.shape} in another"
            )
    return first


def _numbers(selection: Any, count: int) -> Array:
    """Row numbers of an integer array or a boolean mask over all rows."""
    chosen = np.asarray(selection)
    if chosen.dtype == bool:
        if chosen.shape != (count,):
            raise IndexError(f"a mask of shape {chosen.shape} over a column of {count} rows")
        return np.flatnonzero(chosen)
    if chosen.ndim != 1 or (chosen.size and chosen.dtype.kind not in "iu"):
        raise TypeError(f"rows are picked by integers, a mask or a slice, not by {selection!r}")
    return chosen.astype(np.int64, copy=False)


def _in_range(rows: Array, count: int) -> Array:
    if len(rows) and not (rows.min() >= -count and rows.max() < count):
        raise IndexError(f"rows {int(rows.min())} to {int(rows.max())} of a column that has {count}")
    return np.where(rows < 0, rows + count, rows) if len(rows) and rows.min() < 0 else rows
