"""Columns stored in few bits beside a scale per example; read as float32, the scale multiplied back."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np

from .columns import Column
from .dtypes import Array


class ScaledColumn(Column):
    """A column whose stored values were divided by `scale`, a column of the example table."""

    scale: Column

    @property
    def dtype(self) -> np.dtype[Any]:
        """What values are returned as."""
        return np.dtype(np.float32)

    def __getitem__(self, example: int | slice) -> Any:
        found = super().__getitem__(example)
        if isinstance(example, slice):
            return found  # each of them came through here
        return np.asarray(found, np.float32) * self.scale[example]

    def within(self, example: int, first: int, last: int) -> Array:
        """Rows [first, last) of an example."""
        found: Array = super().within(example, first, last).astype(np.float32) * self.scale[example]
        return found

    def rows(self, selection: Any = slice(None)) -> Any:
        """Rows by number, as of any column."""
        found = np.asarray(super().rows(selection), np.float32)
        scales = self._spread[selection]
        return found * scales.reshape(*np.shape(scales), *[1] * (found.ndim - np.ndim(scales)))

    def blocks(self, rows: int = 65536) -> Iterator[Array]:
        """All rows in order, at most `rows` at a time."""
        for start in range(0, len(self), rows):
            yield self.rows(slice(start, min(start + rows, len(self))))

    @cached_property
    def _spread(self) -> Array:
        """The scale of every row."""
        there = self.present
        scales = np.array([self.scale[int(number)] for number in np.flatnonzero(there)], np.float32)
        return np.repeat(scales, self._places.length[there])
