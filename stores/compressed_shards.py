"""Shards of frames: found through the index, expanded one chunk at a time, and kept for a while."""

from __future__ import annotations

import threading
from collections import OrderedDict
from itertools import count
from typing import Any

import google_crc32c
import numpy as np

from . import codecs
from .dtypes import Array
from .errors import DamagedError
from .geometry import CRC_BYTES, Geometry
from .shards import Load, Shard, present, read_index

RECENT_BYTES = 64 << 20


class RecentChunks:
    """Expanded chunks of all shards of a run, bounded in bytes: the least recently used ones go first, the last one stays."""

    def __init__(self, most: int = RECENT_BYTES) -> None:
        self._most = most
        self._bytes = 0
        self._chunks: OrderedDict[tuple[int, int], Array] = OrderedDict()
        self._lock = threading.Lock()
        self.numbers = count()  # one per shard, so that a shard that was opened anew finds nothing of its former self

    def get(self, key: tuple[int, int]) -> Array | None:
        """A chunk by number of shard and chunk, if it is still there."""
        with self._lock:
            found = self._chunks.get(key)
            if found is not None:
                self._chunks.move_to_end(key)
            return found

    def put(self, key: tuple[int, int], chunk: Array) -> None:
        """Keep a chunk."""
        with self._lock:
            before = self._chunks.pop(key, None)
            self._bytes += chunk.nbytes - (0 if before is None else before.nbytes)
            self._chunks[key] = chunk
            while self._bytes > self._most and len(self._chunks) > 1:
                self._bytes -= self._chunks.popitem(last=False)[1].nbytes


class CompressedShard(Shard):
    """Committed rows of one compressed shard. `damaged` expands the chunks it is asked for, and reading takes what it left.

    Raises:
        DamagedError: the index is not that of a shard with these rows; or, on reading, a chunk cannot be expanded.
    """

    def __init__(
        self,
        data: Any,
        geometry: Geometry,
        rows: int,
        crcs: Array,
        recent: RecentChunks,
        *,
        verify: bool = True,
        load: Load = present,
    ) -> None:
        super().__init__(data, geometry, rows, crcs, verify=verify, load=load)
        self._load([(max(self.nbytes - geometry.index_bytes, 0), self.nbytes)])
        self._recent = recent
        self._number = next(recent.numbers)
        found = read_index(self._bytes, geometry)
        if found is None or len(found) < geometry.chunks_for(rows):
            raise DamagedError("the shard's index is damaged, or that of another shard")
        self._places = found

    def structure_is_right(self) -> bool:
        """Whether the parts that only foreign readers use are right too."""
        present = self._geometry.chunks_for(self._rows)
        return len(self._places) == present and all(map(self._stored_crc_is_right, range(present)))

    def gather(self, rows: Array) -> Array:
        """Rows by number, in any order, as one copy."""
        if self._geometry.pieces > 1:
            return self._split_rows(rows)
        chunk, within = np.divmod(rows, self._geometry.chunk_rows)
        out = np.empty((len(rows), *self._geometry.shape), self._geometry.dtype)
        for number in np.unique(chunk).tolist():
            here = np.flatnonzero(chunk == number)
            out[here] = self._chunk(number)[within[here]]
        return out

    @property
    def _is_aligned(self) -> bool:
        return True

    def _across(self, start: int, stop: int) -> Array:
        rows = self._geometry.chunk_rows
        out = np.empty((stop - start, *self._geometry.shape), self._geometry.dtype)
        for first in range(start - start % rows, stop, rows):
            a, b = max(start, first), min(stop, first + rows)
            out[a - start : b - start] = self._chunk(first // rows)[a - first : b - first]
        return out

    def _chunk(self, number: int) -> Array:
        return self._expanded(number).view(self._geometry.dtype).reshape(self._geometry.grid.chunk)

    def _expanded(self, number: int) -> Array:
        """The bytes of a chunk, uint8, read-only."""
        key = self._number, number
        found = self._recent.get(key)
        if found is None:
            found = codecs.expand(self._frame(number)[:-CRC_BYTES], self._geometry.codec, self._geometry.chunk_bytes)
            found.flags.writeable = False
            self._recent.put(key, found)
        return found

    def _check(self, chunk: int) -> bool:
        """Whether a chunk can be expanded and, unless the disk is trusted, is the one that was committed."""
        if self._verify and not self._stored_crc_is_right(chunk):
            return False  # seen before the decoder is given anything
        try:
            content = self._expanded(chunk)
        except DamagedError:
            return False
        used = self._geometry.committed_bytes(chunk, self._rows)
        good = not self._verify or google_crc32c.value(content[:used]) == int(self._crcs[chunk])
        self._good[chunk] = good
        return good

    def _stored_crc_is_right(self, chunk: int) -> bool:
        frame = self._frame(chunk)
        crc: int = google_crc32c.value(frame[:-CRC_BYTES])
        return crc == int.from_bytes(frame[-CRC_BYTES:].tobytes(), "little")

    def _span(self, chunk: int) -> tuple[int, int]:
        offset, size = map(int, self._places[chunk])
        return offset, offset + size

    def _frame(self, number: int) -> Array:
        offset, size = map(int, self._places[number])
        return self._bytes[offset : offset + size]
