"""The rows in which each feature is highest, in memory that does not grow with the rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

from tensortape.stores.dtypes import Array

from .gram import features
from .sweep import Accumulator, Block


@dataclass(frozen=True)
class Peaks:
    """For each feature its highest values, falling, and the numbers of their rows; both [d, k]. Of equal values the first rows."""

    values: Array
    rows: Array


class Highest(Accumulator):
    """`Peaks` of the rows of one column.

    What is held of each feature is in the order of the rows, and rows come in order: so of equal values the first ones are those on
    the left. NaN counts as minus infinity.

    Args:
        most: rows to keep of each feature.
    """

    values: Array | None
    rows: Array

    def __init__(self, most: int) -> None:
        self.most = most

    def init(self) -> Self:
        """No rows yet."""
        empty = super().init()
        empty.values, empty.rows = None, np.zeros((0, 0), np.int64)
        return empty

    def update(self, block: Block) -> None:
        """Take the rows of a block that are higher than the lowest of those held."""
        values = features(block).T
        self._take(values, np.broadcast_to(block.rows, values.shape))

    def merge(self, other: Self) -> None:
        """Take the rows of another."""
        if other.values is not None:
            self._take(other.values, other.rows)

    def finalize(self) -> Peaks:
        """The rows, highest first."""
        assert self.values is not None, "a sweep has at least one row"
        order = np.argsort(-self.values, axis=1, kind="stable")
        return Peaks(np.take_along_axis(self.values, order, 1), np.take_along_axis(self.rows, order, 1))

    def _take(self, values: Array, rows: Array) -> None:
        """Values and row numbers, [d, n]."""
        if self.values is None:
            self.values, self.rows = values[:, :0], rows[:, :0]
        if self.values.shape[1] < self.most:
            self.values, self.rows = self._best(np.concatenate([self.values, values], 1), np.concatenate([self.rows, rows], 1))
            return
        # Most blocks hold nothing new for most features. A maximum that is NaN has to be looked at.
        beaten = ~(values.max(1) <= self.values.min(1))
        if beaten.any():
            pool = np.concatenate([self.values[beaten], values[beaten]], 1)
            self.values[beaten], self.rows[beaten] = self._best(pool, np.concatenate([self.rows[beaten], rows[beaten]], 1))

    def _best(self, values: Array, rows: Array) -> tuple[Array, Array]:
        """The highest of each feature, and their rows, in the order they are given."""
        count = values.shape[1]
        if count <= self.most:
            return _finite(values), rows
        values = _finite(values)
        lowest = np.partition(values, count - self.most, axis=1)[:, count - self.most, None]
        above, equal = values > lowest, values == lowest
        left = self.most - above.sum(1, keepdims=True)
        chosen = above | (equal & (np.cumsum(equal, 1, dtype=np.int32) <= left))
        return values[chosen].reshape(len(values), -1), rows[chosen].reshape(len(values), -1)


def _finite(values: Array) -> Array:
    return np.where(np.isnan(values), -np.inf, values)
