"""The bytes of a shard: the one file that knows them.

An uncompressed Zarr v3 shard (codec `sharding_indexed`, inner codecs `bytes` little-endian and `crc32c`, index at the end) is
plain: chunk after chunk in C order of the chunk grid, each followed by its crc32c (4 bytes, little-endian); then one (offset,
nbytes) pair of unsigned 64-bit integers per chunk of the grid, both 2^64-1 for an absent one; then the index's own crc32c.
Chunks that hold no row at the time of writing are absent and a partly filled one is padded with the fill value. Because the
position of every chunk follows from the shape, reading needs no index: a memory map and arithmetic.

A compressed shard has a frame in place of each chunk's bytes (codecs `bytes`, the one that compresses, `crc32c`). Frames have sizes
of their own, so reading such a shard does need the index; `compressed_shards` does that.

Besides the checksum in the file there is the one in the commit record. It covers only the *committed* rows of the chunk, so it
stays right when a longer tail replaces the file, and a stale or swapped file cannot pass. It is taken before compression.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any

import google_crc32c
import numpy as np

from . import codecs
from .dtypes import Array
from .geometry import CRC_BYTES, Geometry

_ABSENT = np.uint64(2**64 - 1)
_THREADS = min(4, os.cpu_count() or 1)


@dataclass(frozen=True)
class Encoded:
    """A shard ready to be written: buffers in file order, and the crc32c of each chunk's rows (for the commit record)."""

    buffers: list[Array | bytes]
    crcs: Array

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return sum(map(_size, self.buffers))


def encode(rows: Array, geometry: Geometry, fill: float | int | bool) -> Encoded:
    """The bytes of a shard that holds `rows` [n, *feature] of the stored dtype, 1 <= n <= shard rows; views where possible."""
    buffers: list[Array | bytes] = []
    committed: list[int] = []
    sizes: list[int] = []
    starts = range(0, len(rows), geometry.chunk_rows)
    chunks = (found for first in starts for found in _chunks(rows[first : first + geometry.chunk_rows], geometry, fill))
    for body, stored, crc in _bodies(chunks, geometry):
        buffers += (body, _little(stored))
        committed.append(crc)
        sizes.append(_size(body) + CRC_BYTES)
    plain = geometry.codec == codecs.NONE
    buffers.append(_plain_index(len(sizes), geometry) if plain else _index(np.array(sizes, "<u8"), geometry))
    return Encoded(buffers, np.array(committed, "<u4"))


def _bodies(chunks: Iterable[tuple[Array, int]], geometry: Geometry) -> Iterator[tuple[Array | bytes, int, int]]:
    """What stands in the shard for each chunk, the crc32c of that, and the crc32c of the bytes that belong to rows."""
    if geometry.codec == codecs.NONE:
        return (_plain(chunk, used) for chunk, used in chunks)
    given, frame = list(chunks), partial(_framed, geometry.codec)
    if len(given) == 1:
        return iter([frame(*given[0])])
    with ThreadPoolExecutor(_THREADS) as pool:
        return pool.map(frame, *zip(*given, strict=True))


def _plain(chunk: Array, used: int) -> tuple[Array, int, int]:
    crc = google_crc32c.value(chunk)
    return chunk, crc, crc if used == chunk.nbytes else _crc_of_rows(chunk, used)


def _framed(codec: str, chunk: Array, used: int) -> tuple[bytes, int, int]:
    frame = codecs.compress(chunk, codec)
    return frame, google_crc32c.value(frame), _crc_of_rows(chunk, used)


def _crc_of_rows(chunk: Array, used: int) -> int:
    crc: int = google_crc32c.value(chunk.reshape(-1).view("u1")[:used])
    return crc


def _size(buffer: Array | bytes) -> int:
    return len(buffer) if isinstance(buffer, bytes) else buffer.nbytes


def _chunks(rows: Array, geometry: Geometry, fill: float | int | bool) -> list[tuple[Array, int]]:
    """The chunks, side by side, of at most one chunk's rows, each with the bytes that belong to rows."""
    used = len(rows) * geometry.chunk_row_bytes
    if geometry.pieces == 1:
        return [(_padded(rows, geometry.grid.chunk, fill), used)]
    width = geometry.grid.chunk[1]
    cuts = [rows[:, start : start + width] for start in range(0, geometry.shape[0], width)]
    return [(_padded(cut, geometry.grid.chunk, fill), used) for cut in cuts]


def _padded(rows: Array, chunk: tuple[int, ...], fill: float | int | bool) -> Array:
    if rows.shape == chunk:
        return np.ascontiguousarray(rows)
    whole = np.full(chunk, fill, rows.dtype)
    whole[tuple(slice(size) for size in rows.shape)] = rows
    return whole


@lru_cache(maxsize=256)
def _plain_index(present: int, geometry: Geometry) -> bytes:
    return _index(np.full(present, geometry.stride, "<u8"), geometry)


def _index(sizes: Array, geometry: Geometry) -> bytes:
    """The index of a shard whose first chunks take so many bytes each, checksums included."""
    index = np.full((geometry.slots, 2), _ABSENT, "<u8")
    index[: len(sizes), 0] = np.cumsum(sizes) - sizes
    index[: len(sizes), 1] = sizes
    body = index.tobytes()
    return body + _little(google_crc32c.value(body))


def read_index(data: Array, geometry: Geometry) -> Array | None:
    """(offset, bytes) of every chunk in a shard's bytes; None for an index that is damaged, or not of chunks one after another."""
    end = len(data) - geometry.index_bytes
    if end <= 0:
        return None
    found = np.frombuffer(data[end:-CRC_BYTES].tobytes(), "<u8").reshape(-1, 2)
    sizes = found[found[:, 1] != _ABSENT, 1]
    # Each size is looked at before their sum, which could come round to the right one.
    fits = len(sizes) > 0 and sizes.min() > CRC_BYTES and sizes.max() <= end and sizes.sum() == end
    return found[: len(sizes)] if fits and _index(sizes, geometry) == data[end:].tobytes() else None


def _little(crc: int) -> bytes:
    return crc.to_bytes(CRC_BYTES, "little")


Load = Callable[[Iterable[tuple[int, int]]], None]  # what makes spans of bytes right that come from far away


def present(spans: Iterable[tuple[int, int]]) -> None:
    """For bytes that are all here."""


class Shard:
    """Committed rows of one shard, read from its bytes; each chunk is checked against the commit record when first touched."""

    def __init__(
        self,
        data: Any,
        geometry: Geometry,
        rows: int,
        crcs: Array,
        *,
        verify: bool = True,
        load: Load = present,
    ) -> None:
        self._bytes = np.frombuffer(data, np.uint8)
        self._geometry = geometry
        self._rows = rows
        self._crcs = crcs
        self._good = np.zeros(len(crcs), bool)
        self._verify = verify
        self._load = load  # spans of the bytes are right only after this, where they come from far away

    def damaged(self, chunks: Sequence[int] | Array | None = None) -> list[int]:
        """The chunks (all, unless some are named) whose committed rows are not the ones committed."""
        chosen = np.arange(len(self._crcs)) if chunks is None else np.asarray(chunks)
        new = chosen[~self._good[chosen]].tolist()
        if new:
            self._load(map(self._span, new))
        return [chunk for chunk in new if not self._check(chunk)]

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return len(self._bytes)

    def rows_of(self, chunk: int) -> tuple[int, int]:
        """First and one past the last row of the shard that chunk number `chunk` holds."""
        return self._geometry.rows_of(chunk, self._rows)

    def structure_is_right(self) -> bool:
        """Whether the parts that only foreign readers use (stored checksums, index) are right too."""
        present = self._geometry.chunks_for(self._rows)
        self._load([(present * self._geometry.stride, len(self._bytes))])
        tail: bytes = self._bytes[present * self._geometry.stride :].tobytes()
        return tail == _plain_index(present, self._geometry) and all(map(self._stored_crc_is_right, range(present)))

    def chunks_of(self, start: int, stop: int) -> range:
        """The chunks that hold rows [start, stop)."""
        geometry = self._geometry
        return range(start // geometry.chunk_rows * geometry.pieces, geometry.chunks_for(stop))

    def slice(self, start: int, stop: int) -> Array:
        """Rows [start, stop) of the stored dtype: a read-only view within one chunk, a copy across several."""
        geometry = self._geometry
        first, last = start // geometry.chunk_rows, (stop - 1) // geometry.chunk_rows
        if geometry.pieces > 1:
            return self._split_rows(np.arange(start, stop))
        if first == last and self._is_aligned:
            return self._chunk(first)[start - first * geometry.chunk_rows : stop - first * geometry.chunk_rows]
        return self._across(start, stop)

    def gather(self, rows: Array) -> Array:
        """Rows by number, in any order, as one copy."""
        geometry = self._geometry
        if geometry.pieces > 1:
            return self._split_rows(rows)
        words, per_row = self._words
        chunk, within = np.divmod(rows, geometry.chunk_rows)
        unit = words.itemsize
        start = (chunk * geometry.stride + within * geometry.chunk_row_bytes) // unit
        # One row is `per_row` words; the view overlaps itself, so row starts may lie at any word.
        windows = np.lib.stride_tricks.as_strided(words, (len(words) - per_row + 1, per_row), (unit, unit), writeable=False)
        found: Array = windows[start]
        return found.view(geometry.dtype).reshape(len(rows), *geometry.shape)

    @property
    def _is_aligned(self) -> bool:
        """Whether every chunk can be seen as its dtype where it lies: checksums push chunks to multiples of their four bytes."""
        return self._geometry.dtype.itemsize <= CRC_BYTES

    @cached_property
    def _words(self) -> tuple[Array, int]:
        unit = math.gcd(self._geometry.chunk_row_bytes, CRC_BYTES)
        end = self._geometry.chunks_for(self._rows) * self._geometry.stride
        return self._bytes[:end].view(f"<u{unit}"), self._geometry.chunk_row_bytes // unit

    def _chunk(self, number: int) -> Array:
        start = number * self._geometry.stride
        return self._bytes[start : start + self._geometry.chunk_bytes].view(self._geometry.dtype).reshape(self._geometry.grid.chunk)

    def _across(self, start: int, stop: int) -> Array:
        geometry = self._geometry
        out = np.empty((stop - start, *geometry.shape), geometry.dtype)
        flat = out.reshape(-1).view("u1").reshape(stop - start, -1)
        for first in range(start - start % geometry.chunk_rows, stop, geometry.chunk_rows):
            a, b = max(start, first), min(stop, first + geometry.chunk_rows)
            at = first // geometry.chunk_rows * geometry.stride + (a - first) * geometry.chunk_row_bytes
            flat[a - start : b - start].reshape(-1)[:] = self._bytes[at : at + (b - a) * geometry.chunk_row_bytes]
        return out

    def _split_rows(self, rows: Array) -> Array:
        """Rows over 8 MiB: one row per chunk row, cut along the first feature axis."""
        geometry = self._geometry
        out = np.empty((len(rows), *geometry.shape), geometry.dtype)
        width = geometry.grid.chunk[1]
        for place, row in enumerate(rows):
            for piece in range(geometry.pieces):
                target = out[place, piece * width : (piece + 1) * width]
                target[...] = self._chunk(int(row) * geometry.pieces + piece)[0, : len(target)]
        return out

    def _span(self, chunk: int) -> tuple[int, int]:
        """Where a chunk and its checksum lie."""
        return chunk * self._geometry.stride, (chunk + 1) * self._geometry.stride

    def _check(self, chunk: int) -> bool:
        start = chunk * self._geometry.stride
        used = self._geometry.committed_bytes(chunk, self._rows)
        self._good[chunk] = not self._verify or google_crc32c.value(self._bytes[start : start + used]) == int(self._crcs[chunk])
        return bool(self._good[chunk])

    def _stored_crc_is_right(self, chunk: int) -> bool:
        end = (chunk + 1) * self._geometry.stride
        body, stored = self._bytes[end - self._geometry.stride : end - CRC_BYTES], self._bytes[end - CRC_BYTES : end]
        crc: int = google_crc32c.value(body)
        return crc == int.from_bytes(stored.tobytes(), "little")
