"""How alike the columns of a block arrange its rows: the unbiased Hilbert-Schmidt independence criterion of minibatches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

import numpy as np

from tensortape.stores.dtypes import Array

from .gram import features
from .sweep import Accumulator, Block

Kernel = Literal["linear", "rbf"]
LEAST_ROWS = 4


class Hsic(Accumulator):
    """HSIC_1 (Song et al. 2012, eq. 5) of each two columns of each block, a minibatch; [blocks, columns, columns], float64.

    Args:
        widths: features of each column.
        kernel: `linear`, or `rbf` with the median distance of the block's rows as its width.
    """

    found: list[Array]

    def __init__(self, widths: Sequence[int], kernel: Kernel) -> None:
        self.edges, self.kernel = np.cumsum([0, *widths]), kernel

    def init(self) -> Self:
        """No blocks yet."""
        empty = super().init()
        empty.found = []
        return empty

    def update(self, block: Block) -> None:
        """Take a minibatch."""
        x = features(block).astype(np.float64)
        x -= x.mean(0)
        rows = len(x)
        columns = [x[:, first:last] for first, last in zip(self.edges[:-1], self.edges[1:], strict=True)]
        centred = np.stack([_centred(_similar(column, self.kernel)).ravel() for column in columns])
        self.found.append(centred @ centred.T / (rows * (rows - 3)))

    def merge(self, other: Self) -> None:
        """Take the minibatches of another."""
        self.found += other.found

    def finalize(self) -> Array:
        """One matrix per minibatch."""
        return np.stack(self.found)


def _similar(x: Array, kernel: Kernel) -> Array:
    """Kernel of each two rows; [n, n]."""
    products: Array = x @ x.T
    if kernel == "linear":
        return products
    squares = np.diagonal(products)
    distances = np.maximum(squares[:, None] + squares - 2 * products, 0)
    width = np.median(np.sqrt(distances[np.triu_indices(len(x), 1)]))
    found: Array = np.exp(-distances / (2 * width**2)) if width else np.ones_like(products)
    return found


def _centred(kernel: Array) -> Array:
    """A kernel without its diagonal, centred so that inner products are unbiased (Székely & Rizzo 2014); [n, n]."""
    rows = len(kernel)
    np.fill_diagonal(kernel, 0)
    sums = kernel.sum(0) / (rows - 2)
    found: Array = kernel - sums - sums[:, None] + sums.sum() / (rows - 1)
    np.fill_diagonal(found, 0)
    return found
