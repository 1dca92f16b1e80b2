"""Rows on their way to disk: one buffer per array, at most one shard large."""

from __future__ import annotations

from collections.abc import Iterator

from . import dtypes
from .dtypes import Array
from .schema import ArraySchema
from .shards import Geometry


class RowBuffer:
    """Collects blocks of rows until a shard is full. Rows are never copied into place: a shard is written from its blocks."""

    def __init__(self, schema: ArraySchema) -> None:
        self.schema = schema
        self.geometry = Geometry(schema.grid, schema.shape, dtypes.stored(schema.dtype))
        self.rows = 0
        self.blocks: list[Array] = []

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

    def take(self, block: Array, *, copy: bool) -> Iterator[tuple[int, list[Array]]]:
        """Add rows [n, *shape]; yields (number, blocks) of each shard that is now full, to be written before the next step.

        Rows that stay in the buffer are copied where the caller may change them (`copy`), or where a small rest would keep a large
        block alive.
        """
        start = 0
        while start < len(block):
            step = min(self.geometry.shard_rows - self.held, len(block) - start)
            piece, number = block[start : start + step], self.shard
            full = self.held + step == self.geometry.shard_rows
            self.blocks.append(piece.copy() if not full and (copy or step < len(block)) else piece)
            if full:
                yield number, self.blocks
                self.blocks = []
            self.rows += step
            start += step
