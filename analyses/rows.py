"""Rows of a table as analyses read them: tokens, words or spans merged from tokens, or examples; with what is known of each."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np

from tensortape.stores import Column
from tensortape.stores.chosen_rows import ChosenRows
from tensortape.stores.dtypes import Array

from .sweep import Block

PIECE_BYTES = 32 << 20
BLOCK_BYTES = 4 << 20
_DENSE = 4  # reading everything is faster than picking unless fewer than one row in so many is wanted
Pool = Literal["first", "last", "mean"]
Join = Pool | Literal["sum"]  # gradients of a mean are sums


@dataclass(frozen=True)
class Merged:
    """Rows that are made of several: those from `first` to `last` (exclusive) each, in order, joined as `pool` says.

    Averages and sums are taken in float32 (float64 of float64).
    """

    first: Array
    last: Array
    pool: Join = "mean"

    def sources(self, start: int, stop: int) -> tuple[Array, Array]:
        """Rows that rows [start, stop) are made of, and where each begins among them."""
        first, last = self.first[start:stop], self.last[start:stop]
        if self.pool not in ("mean", "sum"):
            return (first if self.pool == "first" else last - 1), np.arange(len(first))
        lengths = last - first
        begins = np.cumsum(lengths) - lengths
        return np.repeat(first - begins, lengths) + np.arange(lengths.sum()), begins

    def join(self, values: Array, begins: Array) -> Array:
        """[n, *feature] of the rows they are made of."""
        if self.pool not in ("mean", "sum"):
            return values
        found: Array = np.add.reduceat(values, begins, axis=0)
        if self.pool == "mean":
            lengths = np.diff(np.append(begins, len(values)))
            found /= lengths.astype(values.dtype).reshape(-1, *[1] * (values.ndim - 1))
        return found


@dataclass(frozen=True)
class Rows:
    """A source of rows of one or more columns of a table, for the examples that have all of them.

    Args:
        columns: of one table.
        examples: which examples; bool, one per example of the run.
        tags: what is known of each row, one array entry per row.
        wanted: rows that blocks are to hold, bool; all if not given.
        merged: how rows are made of rows of the table; each is a row of the table if not given.
    """

    columns: tuple[Column, ...]
    examples: Array
    tags: Mapping[str, Array] = field(default_factory=dict)
    wanted: Array | None = None
    merged: Merged | None = None

    @cached_property
    def chosen(self) -> tuple[ChosenRows, ...]:
        """The columns' rows, numbered alike."""
        return tuple(ChosenRows(column, self.examples) for column in self.columns)

    def __len__(self) -> int:
        return self.chosen[0].count if self.merged is None else len(self.merged.first)

    def pieces(self) -> list[RowsPiece]:
        """Pieces of about 32 MiB, which begin where chunks do; those without wanted rows are left out."""
        edges = self._edges()
        bounds = zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)
        return [self._piece(start, stop) for start, stop in bounds if self.wanted is None or self.wanted[start:stop].any()]

    def key(self, what: str, here: Array, *more: Array) -> str:
        """A name for what is computed of the rows where `here` is True, from these rows and nothing else."""
        made: list[bytes | Array] = [] if self.merged is None else [self.merged.pool.encode(), self.merged.first, self.merged.last]
        found = hashlib.sha256()
        for part in (*(rows.places for rows in self.chosen), *made, np.packbits(here), *more):
            found.update(part if isinstance(part, bytes) else part.tobytes())
        columns = ", ".join(f"{column.name} {column.identity}" for column in self.columns)
        return f"{what} of {columns}, {int(here.sum())} of {len(here)} rows {found.hexdigest()}"

    def first_block(self) -> Block:
        """The first rows, as accumulators see them."""
        return next(self.pieces()[0].blocks())

    def _edges(self) -> Array:
        widest = max(self.chosen, key=lambda rows: rows.column.nbytes)
        edges = widest.edges()
        size = max(sum(rows.column.nbytes // max(len(rows.column), 1) for rows in self.chosen), 1)
        begins = np.unique(edges[:-1] * size // PIECE_BYTES, return_index=True)[1]
        cuts = np.append(edges[begins], edges[-1])
        return cuts if self.merged is None else np.unique(np.searchsorted(self.merged.first, cuts))

    def _piece(self, start: int, stop: int) -> RowsPiece:
        merged = self.merged
        return RowsPiece(
            self.chosen,
            start,
            stop,
            {name: tag[start:stop] for name, tag in self.tags.items()},
            None if self.wanted is None else self.wanted[start:stop],
            None if merged is None else replace(merged, first=merged.first[start:stop], last=merged.last[start:stop]),
        )


@dataclass(frozen=True)
class RowsPiece:
    """Rows [start, stop) of a source, as one task reads them."""

    chosen: Sequence[ChosenRows]
    start: int
    stop: int
    tags: Mapping[str, Array]
    wanted: Array | None
    merged: Merged | None

    def blocks(self) -> Iterator[Block]:
        """Blocks of about 4 MiB of float32."""
        width = sum(math.prod(rows.column.shape[1:]) for rows in self.chosen)
        size = max(64, BLOCK_BYTES // (4 * width))
        for start in range(0, self.stop - self.start, size):
            stop = min(start + size, self.stop - self.start)
            wanted = None if self.wanted is None else self.wanted[start:stop]
            if wanted is None or wanted.any():
                yield self._block(start, stop, wanted)

    def _block(self, start: int, stop: int, wanted: Array | None) -> Block:
        values = tuple(self._values(rows, start, stop) for rows in self.chosen) if wanted is None or _is_dense(wanted) else None
        rows = np.arange(self.start + start, self.start + stop)
        tags = {name: tag[start:stop] for name, tag in self.tags.items()}
        if wanted is None:
            return Block(values, rows, tags)  # type: ignore[arg-type]
        at = np.flatnonzero(wanted)
        found = (
            tuple(one[at] for one in values) if values is not None else tuple(self._picked(one, start + at) for one in self.chosen)
        )
        return Block(found, rows[at], {name: tag[at] for name, tag in tags.items()})

    def _values(self, rows: ChosenRows, start: int, stop: int) -> Array:
        """All rows from start to stop."""
        if self.merged is None:
            return _wide(rows.between(self.start + start, self.start + stop))
        first = int(self.merged.first[start])
        sources, begins = self.merged.sources(start, stop)
        return self.merged.join(_wide(rows.between(first, int(self.merged.last[stop - 1])))[sources - first], begins)

    def _picked(self, rows: ChosenRows, at: Array) -> Array:
        """Some rows only."""
        return picked(rows, self.merged, at if self.merged is not None else self.start + at)


def picked(rows: ChosenRows, merged: Merged | None, at: Array) -> Array:
    """Rows by number, in any order, as accumulators see them."""
    if merged is None:
        return _wide(rows.take(at))
    some = replace(merged, first=merged.first[at], last=merged.last[at])
    sources, begins = some.sources(0, len(at))
    return some.join(_wide(rows.take(sources)), begins)


def _is_dense(wanted: Array) -> bool:
    return int(wanted.sum()) * _DENSE > len(wanted)


def _wide(array: Array) -> Array:
    """float64 as it is, everything else as float32; contiguous."""
    return np.ascontiguousarray(array if array.dtype == np.float64 else array.astype(np.float32))
