"""Where the chunks of a shard lie: arithmetic over a grid, a row's shape and its dtype."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from . import codecs
from .layout import Grid

CRC_BYTES = 4


@dataclass(frozen=True)
class Geometry:
    """Where the chunks of one array's shards lie. `shape` is the feature shape of the array's rows.

    Places in the file (`stride`, `file_bytes`) are those of uncompressed shards.
    """

    grid: Grid
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    codec: str = codecs.NONE

    @cached_property
    def shard_rows(self) -> int:
        """Rows per shard."""
        return self.grid.shard[0]

    @cached_property
    def chunk_rows(self) -> int:
        """Rows per chunk."""
        return self.grid.chunk[0]

    @cached_property
    def pieces(self) -> int:
        """Chunks side by side along the first feature axis (1 unless rows are over 8 MiB)."""
        return self.grid.shard[1] // self.grid.chunk[1] if len(self.grid.chunk) > 1 else 1

    @cached_property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk without its checksum."""
        return math.prod(self.grid.chunk) * self.dtype.itemsize

    @cached_property
    def chunk_row_bytes(self) -> int:
        """Bytes of one row inside one chunk."""
        return self.chunk_bytes // self.chunk_rows

    @cached_property
    def stride(self) -> int:
        """Bytes from one chunk to the next."""
        return self.chunk_bytes + CRC_BYTES

    @cached_property
    def slots(self) -> int:
        """Chunks a full shard holds."""
        return self.shard_rows // self.chunk_rows * self.pieces

    @cached_property
    def index_bytes(self) -> int:
        """Bytes of a shard's index with its checksum."""
        return 16 * self.slots + CRC_BYTES

    def chunks_for(self, rows: int) -> int:
        """Chunks present when the shard holds `rows` rows."""
        return -(-rows // self.chunk_rows) * self.pieces

    def file_bytes(self, rows: int) -> int:
        """Size of a shard file that holds `rows` rows."""
        return self.chunks_for(rows) * self.stride + self.index_bytes

    def rows_of(self, chunk: int, rows: int) -> tuple[int, int]:
        """First and one past the last of a shard's `rows` rows that chunk number `chunk` holds."""
        first = chunk // self.pieces * self.chunk_rows
        return first, min(first + self.chunk_rows, rows)

    def committed_bytes(self, chunk: int, rows: int) -> int:
        """Bytes of chunk number `chunk` that belong to the first `rows` rows of the shard."""
        first = chunk // self.pieces * self.chunk_rows
        return min(self.chunk_rows, max(rows - first, 0)) * self.chunk_row_bytes
