"""Sums of outer products of tokens, one sum per example, and their inner products without making them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from tensortape.stores.dtypes import Array

BLOCK_BYTES = 64 << 20  # of sums
BLOCK_ROWS = 2048  # tokens whose inner products are held at a time


@dataclass(frozen=True)
class OuterProducts:
    """G_i = sum_t g_t x_t^T of some examples.

    Args:
        g: [tokens, out], of all examples one after another; float64.
        x: [tokens, in].
        lengths: tokens of each example [examples].
    """

    g: Array
    x: Array
    lengths: Array

    @cached_property
    def sums(self) -> Array:
        """[examples, out, in]."""
        bounds = np.cumsum([0, *self.lengths.tolist()])
        return np.stack([self.g[a:b].T @ self.x[a:b] for a, b in pairwise(bounds.tolist())])

    def by_tokens(self, other: OuterProducts) -> Array:
        """<G_i, G_j> = sum_ts (g_it . g_js)(x_it . x_js); [examples, others]."""
        products = (self.g @ other.g.T) * (self.x @ other.x.T)
        return _summed(_summed(products, self.lengths).T, other.lengths).T

    def by_sums(self, other: OuterProducts) -> Array:
        """The same of the sums themselves."""
        found: Array = self.sums.reshape(len(self.lengths), -1) @ other.sums.reshape(len(other.lengths), -1).T
        return found


@dataclass(frozen=True)
class Plan:
    """How inner products of examples are computed: through tokens or of sums, and so many of either at a time.

    Args:
        rows, columns: tokens of each example on both sides.
        out, width: of each sum.
    """

    rows: Array
    columns: Array
    out: int
    width: int

    @cached_property
    def is_by_tokens(self) -> bool:
        """Whether a pair of examples takes no more multiplications through its tokens than a pair of sums, and its share of making
        them: those of a block of rows are kept while all columns go by."""
        kept = min(self._sums_at_once, len(self.rows))
        here, there = (lengths.sum() / max(len(lengths), 1) for lengths in (self.rows, self.columns))
        made = here / max(len(self.columns), 1) + there / max(kept, 1)
        return bool(here * there * (self.out + self.width) <= (1 + made) * self.out * self.width)

    def blocks(self, lengths: Array) -> Iterator[slice]:
        """Examples that are taken together, at least one."""
        sizes, most = (lengths, BLOCK_ROWS) if self.is_by_tokens else (np.ones_like(lengths), self._sums_at_once)
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
