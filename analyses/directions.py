"""Many linear directions of one column in one reading: sums of sets of rows that they are made of, and rows projected onto them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

from tensortape.stores.dtypes import Array

from .gram import chosen, features
from .readings import weighted
from .sweep import Accumulator, Block


@dataclass(frozen=True)
class SetTotals:
    """Sums of rows less a shift: of each of several sets [sets, d], and of all rows that the sets divide [d]; float64."""

    shift: Array
    size: int
    totals: Array
    count: int
    total: Array

    @property
    def means(self) -> Array:
        """Mean of each set; [sets, d]."""
        found: Array = self.shift + self.totals / self.size
        return found

    @property
    def rest(self) -> Array:
        """Mean of the rows outside each set; [sets, d]."""
        found: Array = self.shift + (self.total - self.totals) / (self.count - self.size)
        return found

    @property
    def differences(self) -> Array:
        """Mean of each set less that of the rows outside; [sets, d]."""
        found: Array = self.totals / self.size - (self.total - self.totals) / (self.count - self.size)
        return found


class SetSums(Accumulator):
    """`SetTotals` of sets of one size, which divide the same rows in two.

    Args:
        shift: [d].
        sets: the tag [n, sets] with 1 for rows in a set, 0 for those outside, and -1, in all sets, for rows that are left out.
        size: rows of each set.
    """

    state = ("totals", "count", "total")
    totals: Array
    count: Array
    total: Array

    def __init__(self, shift: Array, sets: str, size: int) -> None:
        self.shift, self.sets, self.size = shift, sets, size

    def update(self, block: Block) -> None:
        """Sums of a block, by one matrix product for all sets."""
        sets = block.tags[self.sets]
        here = sets[:, 0] >= 0
        x = chosen(weighted(block), here)
        x = x - self.shift.astype(x.dtype)
        self.add("totals", ((chosen(sets, here) == 1).T.astype(x.dtype) @ x).astype(np.float64))
        self.add("count", len(x))
        self.add("total", x.sum(0, dtype=np.float64))

    def finalize(self) -> SetTotals:
        """The totals."""
        return SetTotals(self.shift, self.size, self.totals, int(self.count), self.total)


class Dots(Accumulator):
    """Products of rows with vectors, [n, K], float64.

    Args:
        vectors: [d, K].
        shift: [d]; near the mean of the rows, so that nothing is lost where that is large.
    """

    def __init__(self, vectors: Array, shift: Array) -> None:
        self.vectors, self.shift = vectors, shift
        self.found: list[Array] = []

    def init(self) -> Self:
        """An empty one with the same vectors."""
        empty = super().init()
        empty.found = []
        return empty

    def update(self, block: Block) -> None:
        """Project a block."""
        x = features(block)
        self.found.append(((x - self.shift.astype(x.dtype)) @ self.vectors.astype(x.dtype)).astype(np.float64))

    def merge(self, other: Self) -> None:
        """Append the rows that come after."""
        self.found += other.found

    def finalize(self) -> Array:
        """Of all rows, in order."""
        found = np.concatenate(self.found) if self.found else np.zeros((0, self.vectors.shape[1]))
        shifted: Array = found + self.shift @ self.vectors
        return shifted
