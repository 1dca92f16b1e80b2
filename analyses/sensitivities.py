"""How a target changes along concepts: gradients projected onto their vectors and onto those of random sets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

from tensortape.stores.dtypes import Array

from .readings import weighted
from .sweep import Accumulator, Block


@dataclass(frozen=True)
class Sensitivity:
    """Of gradients and vectors.

    Args:
        dots: gradient * vector; [rows, K], float64.
        positive, mean: of random vectors, the share of rows with a product above 0, and the mean product; [R].
        spread: root mean square distance of gradients from their mean, in units of their root mean square length; nan if all are 0,
            infinite if any is not finite.
    """

    dots: Array
    positive: Array
    mean: Array
    spread: float


class Sensitivities(Accumulator):
    """`Sensitivity` of the rows of one column.

    Args:
        vectors: [d, K]; all products are kept.
        random: [d, R]; only their counts and sums are.
    """

    state = ("count", "total", "square", "positive", "sums")
    count: Array
    total: Array
    square: Array
    positive: Array
    sums: Array

    def __init__(self, vectors: Array, random: Array) -> None:
        self.vectors, self.random = vectors, random
        self.dots: list[Array] = []

    def init(self) -> Self:
        """An empty one with the same vectors."""
        empty = super().init()
        empty.dots = []
        return empty

    def update(self, block: Block) -> None:
        """Project a block."""
        x = weighted(block)
        random = x @ self.random.astype(x.dtype)
        self.dots.append((x @ self.vectors.astype(x.dtype)).astype(np.float64))
        self.add("count", len(x))
        self.add("total", x.sum(0, dtype=np.float64))
        self.add("square", np.square(x, dtype=np.float64).sum())
        self.add("positive", (random > 0).sum(0))
        self.add("sums", random.sum(0, dtype=np.float64))

    def merge(self, other: Self) -> None:
        """Append the rows that come after."""
        super().merge(other)
        self.dots += other.dots

    def finalize(self) -> Sensitivity:
        """Of all rows, in order."""
        count = int(self.count)
        return Sensitivity(np.concatenate(self.dots), self.positive / count, self.sums / count, self._spread(count))

    def _spread(self, count: int) -> float:
        square = float(self.square) / count
        if not np.isfinite(square):
            return float("inf")
        return float(np.sqrt(max(1 - np.square(self.total / count).sum() / square, 0))) if square else float("nan")
