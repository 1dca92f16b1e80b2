"""Rows on their way to disk: one buffer per array, one shard large.

Buffers are allocated once and reused. Holding on to the arrays that were appended would save a copy, but long-lived small blocks
between a model's short-lived large ones keep the allocator from giving memory back: the process then grows with the recording.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import numpy as np

from . import dtypes
from .dtypes import Array
from .geometry import Geometry
from .schema import ArraySchema


class RowBuffer:
    """Collects rows until a shard is full. Rows that make a whole shard by themselves pass through without a copy."""

    def __init__(self, schema: ArraySchema) -> None:
        self.schema = schema
        self.geometry = Geometry(schema.grid, schema.shape, dtypes.stored(schema.dtype), schema.codec)
        self.rows = 0

    @property
    def shard(self) -> int:
        """Number of the shard that is being filled."""
        return self.rows // self.geometry.shard_rows

    @property
    def held(self) -> int:
        """Rows of that shard so far."""
        return self.rows % self.geometry.shard_rows

    @property
    def nbytes(self) -> int:
        """Bytes of a whole shard: what the buffer takes once it has taken a row."""
        return self.geometry.shard_rows * self.geometry.chunk_row_bytes * self.geometry.pieces

    @property
    def held_bytes(self) -> int:
        """Bytes those rows take."""
        return self.held * self.geometry.chunk_row_bytes * self.geometry.pieces

    def take(self, block: Array) -> Iterator[tuple[int, Array]]:
        """Add rows [n, *shape]; yields (number, rows) of each shard that is now full, to be written before the next step."""
        start = 0
        while start < len(block):
            held, number = self.held, self.shard
            piece = block[start : start + self.geometry.shard_rows - held]
            full = held + len(piece) == self.geometry.shard_rows
            if not full or held:
                self._storage[held : held + len(piece)] = piece
            if full:
                yield number, self._storage if held else piece
            self.rows += len(piece)
            start += len(piece)

    def tail(self) -> Array:
        """The rows of the shard that is being filled."""
        return self._storage[: self.held]

    @cached_property
    def _storage(self) -> Array:
        return np.empty((self.geometry.shard_rows, *self.schema.shape), self.geometry.dtype)
