"""Sums of rows and of their products: what means, covariances, LDA, ridge, PCA and whitening are made of.

A covariance from raw sums is wrong where a mean is large beside its deviation, as in some dimensions of most language models. All
sums are therefore of rows less a fixed shift, the mean of the first rows read; they are added up in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tensortape.stores.dtypes import Array

from .sweep import Accumulator, Block
from .tasks import Selection


@dataclass(frozen=True)
class Sums:
    """Of `count` rows x less a `shift` [d]: their sum `total` [d] and the sum of their outer products `outer` [d, d]; float64."""

    shift: Array
    count: int
    total: Array
    outer: Array

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.shift, self.count + other.count, self.total + other.total, self.outer + other.outer)

    @cached_property
    def offset(self) -> Array:
        """The mean less the shift; [d]."""
        found: Array = self.total / self.count
        return found

    @property
    def mean(self) -> Array:
        """Mean of the rows; [d]."""
        found: Array = self.shift + self.offset
        return found

    @cached_property
    def covariance(self) -> Array:
        """Biased covariance of the rows; [d, d]."""
        found: Array = self.outer / self.count - np.outer(self.offset, self.offset)
        return found

    @property
    def deviation(self) -> Array:
        """Standard deviation of each dimension, 1 for one that is constant; [d]."""
        variance = np.diagonal(self.covariance)
        constant = variance <= (self.mean * np.finfo(np.float32).eps) ** 2  # what is left of rounding
        return np.where(constant, 1.0, np.sqrt(np.maximum(variance, 0)))


class Gram(Accumulator):
    """`Sums` of the rows of one column.

    Args:
        shift: [d].
        selection: only these rows.
        key: to be kept under.
    """

    state = ("count", "total", "outer")
    count: Array
    total: Array
    outer: Array

    def __init__(self, shift: Array, selection: Selection | None = None, key: str | None = None) -> None:
        self.shift, self.selection, self.key = shift, selection, key

    def update(self, block: Block) -> None:
        """X^T X of a block."""
        x = chosen(features(block), None if self.selection is None else self.selection.rows(block.tags))
        x = x - self.shift.astype(x.dtype)
        self.add("count", len(x))
        self.add("total", x.sum(0, dtype=np.float64))
        self.add("outer", (x.T @ x).astype(np.float64))

    def finalize(self) -> Sums:
        """The sums."""
        return Sums(self.shift, int(self.count), self.total, self.outer)


@dataclass(frozen=True)
class ClassTotals:
    """Rows of each class: how many [K], and the sum of them less a shift [K, d]; float64."""

    shift: Array
    counts: Array
    totals: Array

    @property
    def offsets(self) -> Array:
        """Mean of each class less the shift; [K, d]; 0 for an empty class."""
        found: Array = self.totals / np.maximum(self.counts, 1)[:, None]
        return found


class ClassSums(Accumulator):
    """`ClassTotals` of the rows of one column.

    Args:
        shift: [d].
        labels: the tag with classes 0 to K - 1; rows with -1 are left out.
        classes: K.
        selection: only these rows.
        key: to be kept under.
    """

    state = ("counts", "totals")
    counts: Array
    totals: Array

    def __init__(self, shift: Array, labels: str, classes: int, selection: Selection | None = None, key: str | None = None) -> None:
        self.shift, self.labels, self.classes, self.key = shift, labels, classes, key
        self.selection = selection or Selection(labels)

    def update(self, block: Block) -> None:
        """Counts and sums by class of a block."""
        here = self.selection.rows(block.tags)
        x, labels = chosen(features(block), here), block.tags[self.labels][here]
        one_hot = (labels[:, None] == np.arange(self.classes)).astype(x.dtype)
        self.add("counts", np.bincount(labels, minlength=self.classes))
        self.add("totals", (one_hot.T @ (x - self.shift.astype(x.dtype))).astype(np.float64))

    def finalize(self) -> ClassTotals:
        """The totals."""
        return ClassTotals(self.shift, self.counts, self.totals)


def features(block: Block) -> Array:
    """The rows of a block's first column, features in one axis; [n, d]."""
    return block.values[0].reshape(len(block.rows), -1)


def chosen(rows: Array, here: Array | None) -> Array:
    """The rows that are chosen, without a copy if all are."""
    return rows if here is None or here.all() else rows[here]


def shift_of(block: Block) -> Array:
    """What to take from rows before they are summed: the mean of a first block; [d], float64.

    Rounded to the rows' dtype, in which it is taken from them: a mean of 3000 is otherwise off by the rounding, 1e-4.
    """
    x = features(block)
    found: Array = x.mean(0, dtype=np.float64).astype(x.dtype).astype(np.float64)
    return found
