"""Rows on their way to disk: one buffer per array, at most one shard large."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from . import dtypes
from .dtypes import Array
from .schema import ArraySchema
from .shards import Geometry


class RowBuffer:
    """Collects rows until a shard is full. Rows that make a whole shard by themselves pass through without a copy."""

    def __init__(self, schema: ArraySchema) -> None:
        self.schema = schema
        self.geometry = Geometry(schema.grid, schema.shape, dtypes.stored(schema.dtype))
        self.rows = 0
        self._held: Array | None = None

    @property
    def shard(self) -> int:
        """Number of the shard that is being filled."""
        return self.rows // self.geometry.shard_rows

    @property
    def held(self) -> int:
        """Rows of that shard so far."""
        return self.rows % self.geometry.shard_rows

    @property
    def held_bytes(self) -> int:
        """Bytes those rows take."""
        return self.held * self.geometry.chunk_row_bytes * self.geometry.pieces

    def take(self, block: Array) -> Iterator[tuple[int, Array]]:
        """Add rows [n, *shape]; yields (number, rows) of each shard that is now full, to be written before the next step."""
        start = 0
        while start < len(block):
            step = min(self.geometry.shard_rows - self.held, len(block) - start)
            piece, number = block[start : start + step], self.shard
            full = self.held + step == self.geometry.shard_rows
            if full and self.held == 0:
                yield number, piece
            else:
                self._storage[self.held : self.held + step] = piece
                if full:
                    yield number, self._storage
            self.rows += step
            start += step

    def tail(self) -> Array:
        """The rows of the shard that is being filled."""
        return self._storage[: self.held]

    @property
    def _storage(self) -> Array:
        if self._held is None:
            self._held = np.empty((self.geometry.shard_rows, *self.schema.shape), self.geometry.dtype)
        return self._held
