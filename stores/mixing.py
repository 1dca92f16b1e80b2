"""Batches cut from rows in order, or from a buffer in which they were mixed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .chosen_rows import ChosenRows
from .dtypes import Array
from .row_order import RowOrder


class InOrder:
    """Batches of rows as they lie in the run."""

    def __init__(self, sources: Sequence[ChosenRows], order: RowOrder) -> None:
        self._sources = sources
        self._order = order

    def batch(self, epoch: int, number: int) -> list[Array]:
        """One array per source; new ones."""
        first, last = self._order.places(number)
        found = [_room(source, last - first) for source in self._sources]
        for source, out in zip(self._sources, found, strict=True):
            source.read([(first, last)], out)
        return found


class Mixed:
    """Batches of the order's groups. A group is read once, into memory that is used again for the next; batches are copies."""

    def __init__(self, sources: Sequence[ChosenRows], order: RowOrder) -> None:
        self._sources = sources
        self._order = order
        self._held: tuple[int, int] | None = None
        self._rows: list[Array] = []
        self._mixing = np.empty(0, np.int64)

    def batch(self, epoch: int, number: int) -> list[Array]:
        """One array per source; new ones."""
        group = self._order.group_of(number)
        if self._held != (epoch, group):
            self._fill(epoch, group)
        begin = self._order.bounds(group)[0]
        first, last = self._order.places(number)
        return [rows.take(self._mixing[first - begin : last - begin], axis=0) for rows in self._rows]

    def __getstate__(self) -> dict[str, Any]:
        return {"sources": self._sources, "order": self._order}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Mixed.__init__(self, **state)

    def _fill(self, epoch: int, group: int) -> None:
        self._held = None  # until it is whole
        self._rows = self._rows or [_room(source, self._order.most) for source in self._sources]
        blocks = self._order.blocks(epoch, group)
        for source, rows in zip(self._sources, self._rows, strict=True):
            source.read(blocks, rows)
        self._mixing = self._order.mixing(epoch, group)
        self._held = (epoch, group)


def _room(source: ChosenRows, rows: int) -> Array:
    return np.empty((rows, *source.column.shape[1:]), source.column.dtype)
