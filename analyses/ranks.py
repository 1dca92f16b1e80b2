"""Quantiles and areas under the ROC curve of every feature, from one reading in bounded memory, with a bound on their error.

Features are sketched side by side (Manku, Rajagopalan & Lindsay 1998; Karnin, Lang & Liberty 2016, without its coin): rows are held
until they are too many, then each feature's values are sorted and every other one is dropped, so that each of those left stands for
two. A compaction of values of weight w moves no rank by more than w rows. The sum of these is the bound; it is 0, and all is exact,
until rows are more than may be held. Unlike a histogram's, it needs no range and holds for values of any scale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np

from tensortape.stores.dtypes import Array

from .gram import features
from .sweep import Accumulator, Block

_AT_ONCE = 1 << 22  # values that are sorted at a time for the results
_ROUNDING = 1e-6  # of a share times a number of rows, in rows


class Sketch:
    """Rows, of which `levels[h]` holds some that stand for 2^h each. `error`: rows that any rank may be off by.

    Args:
        size: rows that a level may hold.
    """

    def __init__(self, size: int) -> None:
        self.size, self.error = size, 0
        self.levels: list[list[Array]] = [[]]
        self._compactions = 0

    def add(self, rows: Array, level: int = 0) -> None:
        """Take rows [n, d] that stand for 2^level each."""
        self.levels.extend([] for _ in range(level + 1 - len(self.levels)))
        self.levels[level].append(rows)
        if sum(map(len, self.levels[level])) > self.size:
            self._compact(level)

    def merge(self, other: Sketch) -> None:
        """Take the rows of another."""
        self.error += other.error
        for level, held in enumerate(other.levels):
            for rows in held:
                self.add(rows, level)

    def weighted(self) -> tuple[Array, Array]:
        """The rows that are held [m, d], and how many each stands for [m]; `ValueError` if there are none."""
        weights = [np.full(sum(map(len, held)), 1 << level) for level, held in enumerate(self.levels)]
        return np.concatenate([rows for held in self.levels for rows in held]), np.concatenate(weights)

    def _compact(self, level: int) -> None:
        """Drop every other value; beginning with the first and with the second by turns, so that errors tend to cancel."""
        held = np.sort(np.concatenate(self.levels[level]).T, axis=1).T
        even = len(held) - len(held) % 2
        self.levels[level] = [held[even:]]
        self.error += 1 << level
        self._compactions += 1
        self.add(np.ascontiguousarray(held[self._compactions % 2 : even : 2]), level + 1)


@dataclass(frozen=True)
class Order:
    """What sketches know of the values of each feature.

    Args:
        values: [m, d]. weights: rows that each stands for [m]. groups: class of each [m], -1 for none.
        errors: rows that a rank may be off by, of the rows without a class and of those of each; [1 + K].
    """

    values: Array
    weights: Array
    groups: Array
    errors: Array

    @property
    def error(self) -> float:
        """How far the rank of a quantile may be off, as a share of all rows."""
        return float(self.errors.sum() / self.weights.sum())

    def quantiles(self, shares: Sequence[float]) -> Array:
        """The least value that at least such a share of the rows does not exceed; [q, d]."""
        wanted = np.ceil(np.array(shares) * self.weights.sum() - _ROUNDING)
        return np.concatenate([self._quantiles(columns, wanted) for columns in self._columns], 1)

    def areas(self) -> Array:
        """Area under the ROC curve of each class against the other classes: in which share of pairs of rows the one of the class is
        higher, with equal ones as half; [K, d]."""
        return np.concatenate([self._areas(columns) for columns in self._columns], 1)

    def area_errors(self) -> Array:
        """How far each class's areas may be off; [K]."""
        rows = np.bincount(self.groups + 1, self.weights, len(self.errors))[1:]
        errors = self.errors[1:]
        found: Array = errors / rows + (errors.sum() - errors) / (rows.sum() - rows)
        return found

    @cached_property
    def _columns(self) -> list[slice]:
        width = max(1, _AT_ONCE // len(self.values))
        return [slice(start, start + width) for start in range(0, self.values.shape[1], width)]

    def _quantiles(self, columns: slice, wanted: Array) -> Array:
        values = self.values[:, columns]
        order = np.argsort(values, axis=0, kind="stable")
        reached = np.cumsum(self.weights[order], axis=0)
        at = np.array([(reached < rank).sum(0) for rank in wanted])
        return np.take_along_axis(np.take_along_axis(values, order, 0), np.minimum(at, len(values) - 1), 0)

    def _areas(self, columns: slice) -> Array:
        here, classes = self.groups >= 0, len(self.errors) - 1
        values, weights, groups = self.values[here, columns], self.weights[here], self.groups[here]
        order = np.argsort(values, axis=0, kind="stable")
        ranks = _middle_ranks(np.take_along_axis(values, order, 0), weights[order])
        cells = groups[order] * values.shape[1] + np.arange(values.shape[1])
        sums = np.bincount(cells.ravel(), (weights[order] * ranks).ravel(), classes * values.shape[1]).reshape(classes, -1)
        rows = np.bincount(groups, weights, classes)[:, None]
        found: Array = (sums - rows**2 / 2) / (rows * (rows.sum() - rows))
        return found


class Ranks(Accumulator):
    """`Order` of the rows of one column.

    Args:
        sizes: rows that a sketch's level may hold, of the rows without a class and of those of each; [1 + K].
        labels: the tag with classes 0 to K - 1 and -1 for none; not needed without classes.
    """

    sketches: list[Sketch]

    def __init__(self, sizes: Sequence[int], labels: str | None = None) -> None:
        self.sizes, self.labels = tuple(sizes), labels

    def init(self) -> Self:
        """No rows yet."""
        empty = super().init()
        empty.sketches = [Sketch(size) for size in self.sizes]
        return empty

    def update(self, block: Block) -> None:
        """Take the rows of a block, class by class."""
        x = features(block)
        classes = np.full(len(x), -1) if self.labels is None else block.tags[self.labels]
        for number in np.unique(classes).tolist():
            self.sketches[number + 1].add(x[classes == number])

    def merge(self, other: Self) -> None:
        """Take the rows of another; its own are left to it."""
        for mine, theirs in zip(self.sketches, other.sketches, strict=True):
            mine.merge(theirs)

    def finalize(self) -> Order:
        """What is held, together."""
        held = [(number, *sketch.weighted()) for number, sketch in enumerate(self.sketches) if any(map(len, sketch.levels))]
        groups = np.concatenate([np.full(len(weights), number - 1) for number, _, weights in held])
        errors = np.array([sketch.error for sketch in self.sketches])
        return Order(np.concatenate([v for _, v, _ in held]), np.concatenate([w for _, _, w in held]), groups, errors)


def sizes(rows: Sequence[int], width: int, memory: int) -> list[int]:
    """Rows that the levels of each of several sketches may hold, so that all of them together hold about `memory` bytes.

    Args:
        rows: of each sketch, in all.
        width: bytes of a row.
    """
    left = memory // width
    room = left
    for number, count in enumerate(sorted(rows)):  # those that need less than an equal share leave it to the others
        room = left // (len(rows) - number)
        if count > room:
            break
        left -= count
    return [_size(count, max(room, 2)) for count in rows]


def _size(rows: int, room: int) -> int:
    """Of one sketch: as many as there are levels share the room; there is one more each time the rows double."""
    if rows <= room:
        return max(rows, 1)
    return max(room // (2 + math.ceil(math.log2(rows / room))), 2)


def _middle_ranks(values: Array, weights: Array) -> Array:
    """Weight below each of sorted values, and half of that equal to it; [m, d]."""
    through = np.cumsum(weights, axis=0, dtype=np.float64)
    new = np.ones(values.shape, bool)
    new[1:] = values[1:] != values[:-1]
    last = np.ones(values.shape, bool)
    last[:-1] = new[1:]
    below = np.maximum.accumulate(np.where(new, through - weights, 0), axis=0)
    upto = np.minimum.accumulate(np.where(last, through, np.inf)[::-1], axis=0)[::-1]
    found: Array = (below + upto) / 2
    return found
