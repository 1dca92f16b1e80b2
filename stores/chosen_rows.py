"""The rows that several columns of one table have for the same examples, numbered alike for all of them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence

import numpy as np

from .columns import Column
from .dtypes import Array

_AT_ONCE = 16


class ChosenRows:
    """Rows of a column that belong to some examples, numbered from 0; the other rows of the column are left out."""

    def __init__(self, column: Column, chosen: Array) -> None:
        self.column = column
        rows = np.where(column.present, column.lengths, 0)
        wanted = np.flatnonzero(chosen & (rows > 0))
        length = rows[wanted]
        here, there = np.cumsum(length) - length, (np.cumsum(rows) - rows)[wanted]
        breaks = np.diff(there - here, prepend=-1) != 0  # a shift of -1 is none that there is
        self.count = int(length.sum())
        self._here, self._there = here[breaks], there[breaks]
        self._ends = np.append(self._here[1:], self.count)

    @property
    def places(self) -> bytes:
        """What tells these rows from others of the column."""
        found: bytes = self._here.tobytes() + self._there.tobytes()
        return found

    def edges(self) -> Array:
        """First rows of the blocks that lie in one chunk each, and the number of rows at the end; int64."""
        if not self.count:
            return np.zeros(1, np.int64)
        cuts = self.column.edges("chunk")
        at = np.maximum(np.searchsorted(self._there, cuts, "right") - 1, 0)
        inside = np.clip(cuts - self._there[at] + self._here[at], self._here[at], self._ends[at])
        return np.unique(np.concatenate([[0], inside, [self.count]]))

    def between(self, start: int, stop: int) -> Array:
        """Rows [start, stop); no copy where they lie in one chunk."""
        found = self.column.several(list(self._spans(start, stop)))
        if len(found) == 1:
            return found[0]
        return np.concatenate(found) if found else self.column.rows(slice(0))

    def take(self, rows: Array) -> Array:
        """Rows by number, in any order."""
        at = np.searchsorted(self._here, rows, "right") - 1
        found: Array = self.column.rows(rows - self._here[at] + self._there[at])
        return found

    def read(self, blocks: Sequence[tuple[int, int]], out: Array) -> None:
        """The rows of blocks [first, last), one block after another, into `out` [rows, *feature]."""
        at = 0
        # A few at a time: what is not mapped is then hardly held twice, and numpy copies without returning to Python in between.
        for start in range(0, len(blocks), _AT_ONCE):
            spans = [span for first, last in blocks[start : start + _AT_ONCE] for span in self._spans(first, last)]
            found = self.column.several(spans)
            rows = sum(map(len, found))
            np.concatenate(found, out=out[at : at + rows])
            at += rows

    def _spans(self, start: int, stop: int) -> Iterator[slice]:
        """Where rows [start, stop) lie in the column."""
        for at in range(bisect_right(self._here, start) - 1, len(self._here)):
            here = self._here.item(at)
            if here >= stop:
                return
            shift = self._there.item(at) - here
            yield slice(max(start, here) + shift, min(stop, self._ends.item(at)) + shift)
