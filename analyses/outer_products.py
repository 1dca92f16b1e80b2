"""Sums of outer products of tokens, one sum per example, and their inner products without making them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tensortape.stores.dtypes import Array

BLOCK_BYTES = 64 << 20  # of sums
BLOCK_ROWS = 2048  # tokens whose inner products are held at a time


@dataclass(frozen=True)
class Factors:
    """Some sums G_i = sum_t g_t x_t^T by what they are made of.

    Args:
        g: [tokens, out], of all examples one after another; float64.
        x: [tokens, in].
        lengths: tokens of each example [examples].
    """

    g: Array
    x: Array
    lengths: Array

    def products(self, other: Factors) -> Array:
        """<G_i, G_j> = sum_ts (g_it . g_js)(x_it . x_js); [examples, others]."""
        products = self.g @ other.g.T
        products *= self.x @ other.x.T
        return _summed(_summed(products, self.lengths).T, other.lengths).T


@dataclass(frozen=True)
class Sums:
    """Some sums G_i themselves; [examples, out * in], float64."""

    flat: Array

    def products(self, other: Sums) -> Array:
        """<G_i, G_j>; [examples, others]."""
        found: Array = self.flat @ other.flat.T
        return found


@dataclass(frozen=True)
class Plan:
    """How inner products of examples are computed: of factors or of sums, and so many of either at a time.

    Args:
        rows, columns: tokens of each example on both sides.
        out, width: of each sum.
    """

    rows: Array
    columns: Array
    out: int
    width: int

    @cached_property
    def is_of_factors(self) -> bool:
        """Whether a pair of examples takes no more multiplications through its tokens than a pair of sums, and its share of making
        them: those of a block of rows are kept while all columns go by."""
        kept = min(self._sums_at_once, len(self.rows))
        here, there = (lengths.sum() / max(len(lengths), 1) for lengths in (self.rows, self.columns))
        made = here / max(len(self.columns), 1) + there / max(kept, 1)
        return bool(here * there * (self.out + self.width) <= (1 + made) * self.out * self.width)

    def blocks(self, lengths: Array) -> Iterator[slice]:
        """Examples that are taken together, at least one."""
        sizes, most = (lengths, BLOCK_ROWS) if self.is_of_factors else (np.ones_like(lengths), self._sums_at_once)
        start = 0
        while start < len(lengths):
            fitting = int(np.searchsorted(np.cumsum(sizes[start:]), most, "right"))
            yield slice(start, start + max(fitting, 1))
            start += max(fitting, 1)

    @property
    def _sums_at_once(self) -> int:
        return max(1, BLOCK_BYTES // (8 * self.out * self.width))


def _summed(values: Array, lengths: Array) -> Array:
    """Sums of so many rows each; [examples, ...]."""
    found = np.zeros((len(lengths), *values.shape[1:]))
    here = lengths > 0
    if here.any():
        found[here] = np.add.reduceat(values, (np.cumsum(lengths) - lengths)[here], axis=0)
    return found
