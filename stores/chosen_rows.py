"""The rows that several columns of one table have for the same examples, numbered alike for all of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from .columns import Column
from .dtypes import Array


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

    def edges(self) -> Array:
        """First rows of the blocks that lie in one chunk each, and the number of rows at the end; int64."""
        cuts = self.column.edges("chunk")
        at = np.maximum(np.searchsorted(self._there, cuts, "right") - 1, 0)
        inside = np.clip(cuts - self._there[at] + self._here[at], self._here[at], self._ends[at])
        return np.unique(np.concatenate([[0], inside, [self.count]]))

    def read(self, start: int, stop: int, out: Array) -> None:
        """Rows [start, stop) into `out` [stop - start, *feature]."""
        for first, last, row in self._spans(start, stop):
            out[first - start : last - start] = self.column.rows(slice(row, row + last - first))

    def _spans(self, start: int, stop: int) -> Iterator[tuple[int, int, Any]]:
        """Stretches that lie together in the column: first and one past the last of our rows, first row of the column."""
        for at in range(int(np.searchsorted(self._here, start, "right")) - 1, len(self._here)):
            here = self._here.item(at)
            if here >= stop:
                return
            first, last = max(start, here), min(stop, self._ends.item(at))
            yield first, last, self._there.item(at) + first - here
