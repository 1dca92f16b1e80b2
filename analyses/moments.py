"""Sums over rows, one per feature: means, deviations, extremes, shares of zeros; and of activations times gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

from tensortape.stores.dtypes import Array

from .gram import features
from .sweep import Accumulator, Block


@dataclass(frozen=True)
class Spread:
    """Of `count` rows, for each feature [d]: mean, standard deviation (over `count`; both float64), least and greatest value,
    and which share of the rows is exactly zero, or positive. NaN in a row makes a feature's numbers NaN, shares apart."""

    count: int
    mean: Array
    deviation: Array
    least: Array
    greatest: Array
    zero: Array
    positive: Array

    @property
    def unit(self) -> Array:
        """The deviation, 1 for a feature that is constant; [d]."""
        constant = self.deviation <= np.abs(self.mean) * np.finfo(np.float32).eps  # what is left of rounding
        return np.where(constant, 1.0, self.deviation)


class Moments(Accumulator):
    """`Spread` of the rows of one column.

    Args:
        shift: what rows are summed less, [d]; see `shift_of`.
    """

    state = ("count", "total", "square", "zeros", "positives", "least", "greatest")
    count: Array
    total: Array
    square: Array
    zeros: Array
    positives: Array
    least: Array
    greatest: Array

    def __init__(self, shift: Array) -> None:
        self.shift = shift

    def init(self) -> Self:
        """No rows yet."""
        empty = super().init()
        empty.least, empty.greatest = np.array(np.inf), np.array(-np.inf)
        return empty

    def update(self, block: Block) -> None:
        """Sums of a block."""
        x = features(block)
        above = x - self.shift.astype(x.dtype)
        self.add("count", len(x))
        self.add("total", above.sum(0, dtype=np.float64))
        self.add("square", np.square(above, out=above).sum(0, dtype=np.float64))
        self.add("zeros", (x == 0).sum(0))
        self.add("positives", (x > 0).sum(0))
        self._extend(x.min(0), x.max(0))

    def merge(self, other: Self) -> None:
        """Add the sums, and take the wider range."""
        for name in ("count", "total", "square", "zeros", "positives"):
            self.add(name, getattr(other, name))
        self._extend(other.least, other.greatest)

    def finalize(self) -> Spread:
        """The numbers."""
        count, offset = int(self.count), self.total / self.count
        variance = np.maximum(self.square / count - offset**2, 0)
        mean, deviation = self.shift + offset, np.sqrt(variance)
        return Spread(count, mean, deviation, self.least, self.greatest, self.zeros / count, self.positives / count)

    def _extend(self, least: Array, greatest: Array) -> None:
        self.least, self.greatest = np.minimum(self.least, least), np.maximum(self.greatest, greatest)


@dataclass(frozen=True)
class Attribution:
    """Of activation a and gradient dy/da, for each feature [d]: mean of |a * dy/da|, and of a * dy/da; float64."""

    importance: Array
    signed: Array


class Products(Accumulator):
    """`Attribution` of the rows of two columns, activations and gradients."""

    state = ("count", "absolute", "signed")
    count: Array
    absolute: Array
    signed: Array

    def update(self, block: Block) -> None:
        """Sums of a block."""
        activations, gradients = (rows.reshape(len(block.rows), -1) for rows in block.values)
        products = activations * gradients
        self.add("count", len(products))
        self.add("signed", products.sum(0, dtype=np.float64))
        self.add("absolute", np.abs(products, out=products).sum(0, dtype=np.float64))

    def finalize(self) -> Attribution:
        """The means."""
        return Attribution(self.absolute / self.count, self.signed / self.count)
